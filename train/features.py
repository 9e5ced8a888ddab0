"""The frozen tower is run once: its output for every note of a table, kept in memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from modeling_notellm2 import NoteLLM2Model


class VisionFeatureTable:
    """What the frozen tower sees in each note's image.

    Exact: the same tensors that the tower would give in every step, as it is frozen and its image processor draws
    nothing at random. Size: about P · d_v · 4 bytes a note, 250 kB for EfficientNet-Lite0.

    Args:
        model: the model whose tower and processor are run.
        notes: notes; those without image have no features.
        batch_size: images a forward pass.

    Raises:
        ValueError: the tower trains, so that its output would change.
    """

    def __init__(self, model: NoteLLM2Model, notes: Sequence[Mapping[str, Any]], batch_size: int = 32) -> None:
        if not model.config.freeze_vision_tower:
            raise ValueError("freeze_vision_tower=False: the features of a tower that trains cannot be kept.")
        self._rows: dict[int, dict[str, Tensor]] = {}
        with tqdm(total=len(notes), desc="vision features", unit="note") as progress:
            for start in range(0, len(notes), batch_size):
                chunk = [notes[i] for i in range(start, min(start + batch_size, len(notes)))]
                self._add(model, chunk, start)
                progress.update(len(chunk))

    @torch.no_grad()
    def _add(self, model: NoteLLM2Model, notes: Sequence[Mapping[str, Any]], start: int) -> None:
        batch = model.processor.collate([model.processor.encode_note(note, start + i) for i, note in enumerate(notes)])
        rows = batch["has_image"].nonzero().flatten().tolist()
        if not rows:
            return
        images = {
            name: value for name, value in batch.items() if name in model.processor.image_processor.model_input_names
        }
        features = model.get_image_features(**{name: value.to(model.device) for name, value in images.items()})
        tensors = {name: value.cpu() for name, value in features._asdict().items() if value is not None}
        for position, row in enumerate(rows):
            self._rows[start + row] = {name: value[position] for name, value in tensors.items()}

    def __contains__(self, index: int) -> bool:
        return index in self._rows

    def stack(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Inputs of the model for the notes at these positions, in order, those without image left out.

        Returns:
            `patch_embeds` (N, P, d_v), `pooled_embeds` (N, d_v) and any `patch_attention_mask` (N, P); nothing if no
            note has an image.
        """
        rows = [self._rows[index] for index in indices if index in self._rows]
        return {name: torch.stack([row[name] for row in rows]) for name in (rows[0] if rows else {})}


__all__ = ["VisionFeatureTable"]
