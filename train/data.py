"""From tables to batches: pairs of notes for training, single notes for evaluation, and the collator for both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset as Table
from torch.utils.data import Dataset

from modeling_notellm2 import NoteLLM2Processor
from modeling_notellm2.processing_notellm2 import EncodedNote
from pairs.files import to_arrow
from train.features import VisionFeatureTable
from train.losses import RelatedNotes


@dataclass
class NoteGroup:
    """Notes that belong together: one for evaluation, the two of a related pair for training.

    Attributes:
        notes: the notes.
        indices: their rows in the table of notes, which is how the loss and the metrics know them.
        features: what the frozen tower sees in the images of that table; `None`: it is run on the pixels.
    """

    notes: list[Mapping[str, Any]]
    indices: list[int]
    features: VisionFeatureTable | None = None


class PairDataset(Dataset[NoteGroup]):
    """Every unordered pair of related notes once.

    The loss treats both notes alike, so that (a, b) and (b, a) of a table of pairs are one example.

    Args:
        notes: table of notes with `note_id`.
        pairs: table with `note_id` and `related_note_id`.
        features: the frozen tower's output for these notes, if it is kept.

    Raises:
        ValueError: no pairs, or a pair of a note that the table of notes lacks.
    """

    def __init__(self, notes: Table, pairs: Table, features: VisionFeatureTable | None = None) -> None:
        # In Arrow and NumPy, as ten million pairs are common: 16 bytes a pair, and no note is read.
        note_ids = to_arrow(notes.select_columns("note_id"))["note_id"].combine_chunks()
        if not len(pairs):
            raise ValueError(
                "there are no pairs to train on: see that views and notes name the same note_id, lower the "
                "pairs' min_score or min_count, or bring more views."
            )
        ends = []
        for name in ("note_id", "related_note_id"):
            column = to_arrow(pairs.select_columns(name))[name]
            rows = pc.index_in(column, value_set=note_ids)
            if rows.null_count:
                missing = column[pc.index(pc.is_null(rows), True).as_py()].as_py()
                raise ValueError(
                    f"pairs name the note {missing!r}, which the notes lack: build the pairs of these notes."
                )
            ends.append(rows.to_numpy())
        unordered = np.sort(np.stack(ends, axis=1).astype(np.int64), axis=1)
        firsts = np.unique(unordered[:, 0] * len(notes) + unordered[:, 1], return_index=True)[1]
        self.notes = notes
        self.features = features
        self.pairs = unordered[np.sort(firsts)]  # (P, 2) int64 rows of `notes`, in the order of the table

    @property
    def related(self) -> RelatedNotes:
        """All these pairs, for the loss."""
        return RelatedNotes(self.pairs, len(self.notes))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, position: int) -> NoteGroup:
        a, b = self.pairs[position].tolist()
        return NoteGroup([self.notes[a], self.notes[b]], [a, b], self.features)


class NoteDataset(Dataset[NoteGroup]):
    """Every note of a table once, for evaluation. `features` as in `PairDataset`."""

    def __init__(self, notes: Table, features: VisionFeatureTable | None = None) -> None:
        self.notes = notes
        self.features = features

    def __len__(self) -> int:
        return len(self.notes)

    def __getitem__(self, position: int) -> NoteGroup:
        return NoteGroup([self.notes[position]], [position], self.features)


@dataclass
class NoteCollator:
    """Groups of notes ─► one batch: the first notes of all groups, then the second ones.

    Attributes:
        processor: the model's processor.
    """

    processor: NoteLLM2Processor

    def __call__(self, groups: Sequence[NoteGroup]) -> dict[str, Any]:
        """Returns the processor's tensors and `note_index` (B,) int64; where the groups come with a table of vision
        features, these in place of the pixels."""
        width = len(groups[0].notes)
        notes = [group.notes[i] for i in range(width) for group in groups]
        indices = [group.indices[i] for i in range(width) for group in groups]
        features = groups[0].features
        encoded = [self.processor.encode_note(note, index) for note, index in zip(notes, indices, strict=True)]
        return self.collate_encoded(encoded, indices, features)

    def collate_encoded(
        self, encoded: Sequence[EncodedNote], indices: Sequence[int], features: VisionFeatureTable | None
    ) -> dict[str, Any]:
        """The same of notes that the processor has encoded already."""
        batch = dict(self.processor.collate(encoded, decode_images=features is None))
        if features is not None:
            batch |= features.stack(indices)
        batch["note_index"] = torch.tensor(indices)
        return batch


__all__ = ["NoteCollator", "NoteDataset", "NoteGroup", "PairDataset"]
