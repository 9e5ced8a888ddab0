"""What the two backbones say of notes, run once and kept: enough to train all that comes after them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from tqdm.auto import tqdm

from modeling_notellm2 import NoteLLM2PreTrainedModel, NoteStates
from train.data import NoteReader

WINDOW_BATCHES = 16
"""Notes are sorted by length within so many batches, to pad little and hold few pictures."""


class NoteStateTable:
    """The states of some notes, for as long as neither backbone nor the connector trains.

    Kept in the dtype of the model's weights (float32 also under autocast) on its device: 2 · d_llm + d_v numbers a
    note, half of the first without mICL.

    Args:
        model: the model whose tower, connector and LLM are run.
        reader: reads the notes of a table.
        rows: (M,) int64, the rows of the notes to run, each once. Those of which `reader` leaves nothing are left out.
        batch_size: notes a forward pass.
        autocast: the mixed precision of the forward pass.
        show_progress_bar: show one progress bar over the M notes.
    """

    def __init__(
        self,
        model: NoteLLM2PreTrainedModel,
        reader: NoteReader,
        rows: Tensor,
        batch_size: int = 32,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
        show_progress_bar: bool = True,
    ) -> None:
        count, device = len(rows), model.device
        self._dtype, self._count = model.dtype, 0
        self._place = torch.full((len(reader.notes),), -1)  # row of the notes ─► row of the tensors below
        self.has_image = torch.zeros(count, dtype=torch.bool, device=device)
        self.has_visual = torch.zeros(count, dtype=torch.bool, device=device)
        # Made when the first note has one: a text-only model needs but the first.
        self._tensors: dict[str, Tensor] = {}
        was_training = model.training
        model.eval()
        try:
            with tqdm(total=count, desc="states", unit="note", disable=not show_progress_bar) as progress:
                for window in rows.split(WINDOW_BATCHES * batch_size):
                    self._add(model, reader, window.tolist(), batch_size, autocast, progress)
        finally:
            model.train(was_training)

    @torch.no_grad()
    def _add(
        self,
        model: NoteLLM2PreTrainedModel,
        reader: NoteReader,
        rows: list[int],
        batch_size: int,
        autocast: Callable[[], AbstractContextManager[None]],
        progress: tqdm,
    ) -> None:
        encoded = [note for note, _is_bad in map(reader.read, rows) if note is not None]
        encoded.sort(key=lambda note: len(note.input_ids), reverse=True)
        for start in range(0, len(encoded), batch_size):
            picked = encoded[start : start + batch_size]
            batch = reader.collate(picked)
            with autocast():
                states = model.get_states(**{name: value.to(model.device) for name, value in batch.items()})
            places = torch.arange(self._count, self._count + len(picked))
            self._place[[note.index for note in picked]] = places
            self._count += len(picked)
            places = places.to(model.device)
            self.has_image[places], self.has_visual[places] = states.has_image, states.has_visual
            self._store("note_states", places, states.note_states)
            if states.visual_states is not None:
                self._store("visual_states", places[states.has_visual], states.visual_states[states.has_visual])
            if states.pooled_embeds is not None:
                self._store("pooled_embeds", places[states.has_image], states.pooled_embeds)
            progress.update(len(picked))
        progress.update(len(rows) - len(encoded))

    @property
    def kept(self) -> Tensor:
        """(N,) bool, for all notes of the table: whether their states are kept here."""
        return self._place >= 0

    def _store(self, name: str, places: Tensor, values: Tensor) -> None:
        if name not in self._tensors:
            shape = (len(self.has_image), values.shape[1])
            self._tensors[name] = torch.zeros(shape, dtype=self._dtype, device=values.device)
        self._tensors[name][places] = values.to(self._dtype)

    def select(self, note_index: Tensor) -> NoteStates:
        """What `NoteLLM2Model.get_states` would return for one batch of these notes.

        Args:
            note_index: (B,) int64 rows of the table of notes, in any order; a note may stand more than once.

        Raises:
            ValueError: the states of a note are not kept here.
        """
        places = self._place[note_index.cpu()]
        if bool((places < 0).any()):
            raise ValueError(f"note {int(note_index[places < 0][0])} is not among the rows whose states are kept.")
        places = places.to(self.has_image.device)
        has_image, has_visual = self.has_image[places], self.has_visual[places]
        return NoteStates(
            note_states=self._tensors["note_states"][places],
            visual_states=self._tensors["visual_states"][places] if bool(has_visual.any()) else None,
            has_visual=has_visual,
            pooled_embeds=self._pooled_embeds(places[has_image]),
            has_image=has_image,
        )

    def _pooled_embeds(self, places: Tensor) -> Tensor | None:
        # A multimodal LLM gives none.
        return self._tensors["pooled_embeds"][places] if len(places) and "pooled_embeds" in self._tensors else None


__all__ = ["NoteStateTable"]
