"""What a model finds with the text alone, with the image alone, and with both.

A model that scores the same without its images neglects them. A note needs text or image, so one that is left with
neither cannot be encoded: its embedding is zero, it scores 0 against every note and so finds and is found by chance
of its position only. Such notes stay in the pool and among the queries, so that all modalities answer the same
questions, and the report counts them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np

from evaluation.baselines import note_text
from train.features import VisionFeatureTable

Modality = Literal["both", "text", "image"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)


class NoteEncoder(Protocol):
    """What the evaluation asks of a model: `encode`, and `config.vision_config`, as `NoteLLM2Model` has them."""

    config: Any
    """Its `vision_config` is None if the model reads text alone."""

    def encode(
        self,
        notes: Sequence[Mapping[str, Any]],
        *,
        batch_size: int,
        show_progress_bar: bool,
        vision_features: VisionFeatureTable | None = None,
    ) -> Any:
        """Return a NumPy array, (N, D) float32 embeddings, L2-normalised, in the order of the notes."""


def with_modality(notes: Iterable[Mapping[str, Any]], modality: Modality) -> list[dict[str, Any]]:
    """The notes with only this modality: without `image` for "text"; without the text fields for "image".

    Raises:
        ValueError: if the modality is unknown.

    >>> with_modality([{"note_id": "a", "title": "Vase", "image": "a.jpg"}], "image")
    [{'note_id': 'a', 'image': 'a.jpg'}]
    """
    dropped = {"both": set(), "text": {"image"}, "image": {"title", "topics", "content"}}
    if modality not in dropped:
        raise ValueError(f"modality is {modality!r}: choose one of {', '.join(MODALITIES)}.")
    return [{name: value for name, value in note.items() if name not in dropped[modality]} for note in notes]


def is_blank(note: Mapping[str, Any]) -> bool:
    """Whether a note has neither text nor image, so that no model can encode it."""
    return note.get("image") is None and not note_text(note)


def encode_with_modality(
    model: NoteEncoder,
    notes: Iterable[Mapping[str, Any]],
    modality: Modality,
    batch_size: int = 32,
    vision_features: VisionFeatureTable | None = None,
) -> tuple[np.ndarray, int]:
    """Encode the notes with only this modality; `vision_features` are of these notes, in place of running the tower.

    Returns:
        (N, D) float32 embeddings, zero for the notes that are blank without the other modality, and their number.

    Raises:
        ValueError: if no note has this modality.
    """
    reduced = with_modality(notes, modality)
    present = [position for position, note in enumerate(reduced) if not is_blank(note)]
    if not present:
        raise ValueError(
            f"No note has anything left with modality {modality!r}: evaluate other modalities, or check the table's "
            "columns title, topics, content and image."
        )
    encoded = model.encode(
        [reduced[position] for position in present],
        batch_size=batch_size,
        show_progress_bar=True,
        vision_features=None if vision_features is None else vision_features.select(present),
    )  # (present, D)
    embeds = np.zeros((len(reduced), encoded.shape[1]), dtype=np.float32)
    embeds[present] = encoded
    return embeds, len(reduced) - len(present)
