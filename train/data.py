"""From tables to batches: planned batches of notes for training, single notes for evaluation."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset as Table
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from modeling_notellm2 import NoteError, NoteLLM2Processor
from modeling_notellm2.processing_notellm2 import TEXT_FIELDS, EncodedNote, has_image, read_image
from pairs.files import to_arrow
from train.batches import BatchPlan, BatchPlanner
from train.features import VisionFeatureTable
from train.losses import ContrastiveTargets
from train.related import RelatedNotes

logger = logging.getLogger(__name__)

BadImages = Literal["text-only", "drop-pair", "raise"]


class PairDataset(Dataset[tuple[int, int]]):
    """Notes and every unordered pair of related ones once.

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
        self.related = RelatedNotes(self.pairs, len(notes))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """The rows of the two notes of a pair. (Batches are made by plans, see `PlanDataset`.)"""
        a, b = self.pairs[position].tolist()
        return a, b


class PlanDataset(Dataset[BatchPlan]):
    """Hands plans from a `BatchPlanner` on to a `PlanCollator`, which loads what this process has to encode.

    The length, which `Trainer` takes for the number of examples, is that of the pairs.
    """

    def __init__(self, planner: BatchPlanner) -> None:
        self.planner = planner

    def set_epoch(self, epoch: int) -> None:
        """`accelerate` tells data sets the epoch, also where a resumed run wraps the batch sampler."""
        self.planner.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.planner.pairs)

    def __getitem__(self, plan: BatchPlan) -> BatchPlan:
        return plan


class NoteItem(NamedTuple):
    """One note of a table by its row; `features` are those of the table's images, if they are kept."""

    notes: Table
    row: int
    features: VisionFeatureTable | None


class NoteDataset(Dataset[NoteItem]):
    """Every note of a table once, for evaluation. `features` as in `PairDataset`."""

    def __init__(self, notes: Table, features: VisionFeatureTable | None = None) -> None:
        self.notes = notes
        self.features = features

    def __len__(self) -> int:
        return len(self.notes)

    def __getitem__(self, row: int) -> NoteItem:
        if not 0 <= row < len(self):
            raise IndexError(f"note {row} of {len(self)}")
        return NoteItem(self.notes, row, self.features)


class NoteReader:
    """Notes of a table as the processor encodes them, with a rule for images that cannot be read.

    Args:
        notes: table of notes.
        processor: the model's processor.
        features: what the frozen tower sees in their images; None: the images are decoded.
        bad_images: what becomes of a note whose image cannot be read. `text-only`: it is encoded as a note without
            image; `drop-pair`: neither it nor its pairs are learned from; `raise`: an error ends the run.
    """

    def __init__(
        self,
        notes: Table,
        processor: NoteLLM2Processor,
        features: VisionFeatureTable | None = None,
        bad_images: BadImages = "raise",
    ) -> None:
        self.notes = notes
        self.processor = processor
        self.features = features
        self.bad_images = bad_images
        self._reported: set[int] = set()

    def read(
        self, row: int, withhold_text: bool = False, withhold_image: bool = False
    ) -> tuple[EncodedNote | None, bool]:
        """One note, and whether its image could not be read.

        Args:
            row: its row.
            withhold_text: leave its text out, if it has an image.
            withhold_image: leave its image out, if it has a text.

        Returns:
            The note, its image decoded where `features` is None; None where `bad_images` leaves nothing of it.

        Raises:
            NoteError: the note cannot be read.
        """
        note = self.notes[row]
        has_text = any(note.get(name) for name in TEXT_FIELDS)
        try:
            encoded = self.processor.encode_note(note, row)
            if encoded.image is not None and self.features is None:
                encoded = self.processor.load_image(encoded)
            elif encoded.image is not None and self.features is not None:
                self.features.check(row)
        except NoteError as error:
            if self.bad_images == "raise" or note.get("image") is None:
                raise
            text = self._text_alone(note, row) if has_text else None  # raises where the fault is the text's
            self._report(row, error)
            return None if self.bad_images == "drop-pair" else text, True
        if encoded.image is not None and has_text:
            if withhold_image:
                return self._text_alone(note, row), False
            if withhold_text:
                blank = self.processor.encode_note({"image": note["image"]}, row)
                return replace(encoded, input_ids=blank.input_ids), False
        return encoded, False

    def collate(self, encoded: Sequence[EncodedNote]) -> dict[str, Tensor]:
        """Notes from `read` ─► the inputs of the model; with `features`, these in place of the pixels."""
        batch = dict(self.processor.collate(encoded, decode_images=self.features is None))
        return batch if self.features is None else batch | self.features(encoded)

    def stand_in(self, row: int = 0) -> EncodedNote:
        """An empty text, in the place of a note of which nothing is left."""
        return self.processor.encode_note("-", row)

    def _text_alone(self, note: Mapping[str, Any], row: int) -> EncodedNote:
        return self.processor.encode_note({**note, "image": None}, row)

    def _report(self, row: int, error: NoteError) -> None:
        if row not in self._reported:  # in a long run it comes again and again
            self._reported.add(row)
            loss = "it and its pairs are left out" if self.bad_images == "drop-pair" else "its image is left out"
            logger.warning("note_id %r: %s; %s", self.notes[row].get("note_id"), error, loss)


def without_bad_images(notes: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[int, NoteError]]:
    """Try all images, and give the notes with those that can be read, and what is wrong with the others, by row.

    Every note keeps its place, also one of which nothing is left: none must drop out of an evaluation.
    """
    result, bad = [], {}
    for row, note in enumerate(tqdm(notes, desc="images", unit="note")):
        try:
            if has_image(note):
                read_image(note["image"], row)
        except NoteError as error:
            bad[row] = error
        result.append({**note, "image": None} if row in bad else dict(note))
    return result, bad


@dataclass
class NoteCollator:
    """Items of one `NoteDataset` ─► one batch of tensors.

    Attributes:
        processor: the model's processor.
        bad_images: `raise`, or `text-only`: a note must not drop out of an evaluation. One of which nothing is left
            keeps its place as an empty text.
    """

    processor: NoteLLM2Processor
    bad_images: Literal["text-only", "raise"] = "raise"
    _reader: NoteReader | None = field(default=None, init=False, repr=False)

    def __call__(self, items: Sequence[NoteItem]) -> dict[str, Any]:
        """Returns the model's inputs and `note_index` (B,) int64, the rows."""
        reader, first = self._reader, items[0]
        if reader is None or reader.notes is not first.notes:  # kept: it names each bad image once
            reader = self._reader = NoteReader(first.notes, self.processor, first.features, self.bad_images)
        rows = [item.row for item in items]
        return reader.collate([reader.read(row)[0] or reader.stand_in(row) for row in rows]) | {
            "note_index": torch.tensor(rows)
        }


@dataclass
class PlanCollator:
    """A planned batch ─► the tensors that this process encodes, and what the loss must know of the whole batch.

    Attributes:
        reader: reads the notes.
        related: all pairs known to be related.
        share: (w, W): this process encodes every W-th note of a plan from the w-th.
        mini_batch_size: notes that are encoded together, of like length; None: all.
        image_groups: (N,) int64, for each note the number of its cover image: notes with one cover are then no
            negatives of each other. None: only copies of the note itself are none.
        log_q: (N,) float32, see `ContrastiveTargets`.
    """

    reader: NoteReader
    related: RelatedNotes
    share: tuple[int, int] = (0, 1)
    mini_batch_size: int | None = None
    image_groups: np.ndarray | None = None
    log_q: np.ndarray | None = None

    def __call__(self, plans: Sequence[BatchPlan]) -> dict[str, Any]:
        """One plan, as a `DataLoader` gives it. Returns a dictionary:

        - `mini_batches`: the inputs of the model, a dictionary for each mini-batch. Where features are kept,
          `feature_rows` (N,) int64 names those to stack: they are large, and one mini-batch needs them at a time.
        - `places` (B,) int64: where these B notes stand in the plan; −1: not to be learned from.
        - `targets`: the fields of `ContrastiveTargets` for the M notes of the plan, `log_q` as an array.
        - `passes`: the most mini-batches that a process has.
        - `bad_images`: notes of this share whose image could not be read.
        """
        (plan,) = plans
        index, processes = self.share
        notes: list[tuple[EncodedNote, int]] = []
        num_bad = 0
        for place in range(index, len(plan.notes), processes):
            note, is_bad = self.reader.read(
                int(plan.notes[place]), bool(plan.withheld_text[place]), bool(plan.withheld_image[place])
            )
            num_bad += is_bad
            if note is not None:
                notes.append((note, place))
        if not notes:  # every process has to take part in a step
            notes = [(self.reader.stand_in(), -1)]
        notes.sort(key=lambda item: len(item[0].input_ids), reverse=True)
        largest_share = max(1, -(-len(plan.notes) // processes))
        size = self.mini_batch_size or largest_share
        return {
            "mini_batches": [
                self._collate([note for note, _place in notes[start : start + size]])
                for start in range(0, len(notes), size)
            ],
            "places": torch.tensor([place for _note, place in notes]),
            "targets": self._targets(plan)._asdict() | {"log_q": self._log_q_of(plan)},
            "passes": -(-largest_share // size),
            "bad_images": num_bad,
        }

    def _collate(self, notes: Sequence[EncodedNote]) -> dict[str, Tensor]:
        if self.reader.features is None:
            return self.reader.collate(notes)
        batch = dict(self.reader.processor.collate(notes, decode_images=False))
        return batch | {"feature_rows": torch.tensor([note.index for note in notes if note.image is not None])}

    def _targets(self, plan: BatchPlan) -> ContrastiveTargets:
        groups = plan.notes if self.image_groups is None else self.image_groups[plan.notes]
        return ContrastiveTargets.of_plan(plan.positives, self.related.among(plan.notes), groups)

    def _log_q_of(self, plan: BatchPlan) -> np.ndarray | None:
        """Not a tensor: `Trainer` would round it to the 16 bits that it gives DeepSpeed."""
        return None if self.log_q is None else self.log_q[plan.notes]


__all__ = [
    "BadImages",
    "NoteCollator",
    "NoteDataset",
    "NoteItem",
    "NoteReader",
    "PairDataset",
    "PlanCollator",
    "PlanDataset",
]
