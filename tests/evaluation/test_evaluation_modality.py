"""Modalities: what is dropped, and what becomes of a note with nothing left."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from evaluation.baselines import note_text
from evaluation.modality import encode_with_modality, with_modality
from train.features import VisionFeatureTable

NOTES: list[dict[str, Any]] = [
    {"note_id": "a", "title": "Vase", "topics": ["glass"], "content": "Blue.", "image": "a.jpg"},
    {"note_id": "b", "title": " ", "topics": [], "content": None, "image": "b.jpg"},
    {"note_id": "c", "content": "No picture.", "image": None},
]


class LengthModel:
    """Embeds a note as (has an image, length of its text)."""

    config = SimpleNamespace(vision_config="any")

    def __init__(self) -> None:
        self.seen: list[Mapping[str, Any]] = []

    def encode(
        self,
        notes: Sequence[Mapping[str, Any]],
        *,
        batch_size: int,
        show_progress_bar: bool,
        vision_features: VisionFeatureTable | None = None,
    ) -> np.ndarray:
        self.seen = list(notes)
        return np.array([[note.get("image") is not None, len(note_text(note))] for note in notes], dtype=np.float32)


def test_with_modality_drops_the_other() -> None:
    assert with_modality(NOTES, "both") == NOTES
    assert [note.get("image") for note in with_modality(NOTES, "text")] == [None] * 3
    assert [note_text(note) for note in with_modality(NOTES, "text")] == [note_text(note) for note in NOTES]
    assert with_modality(NOTES, "image")[0] == {"note_id": "a", "image": "a.jpg"}
    assert NOTES[0]["title"] == "Vase"  # the notes given are left as they were
    with pytest.raises(ValueError, match="'audio'.*both, text, image"):
        with_modality(NOTES, "audio")  # type: ignore[arg-type]


@pytest.mark.parametrize(("modality", "blank"), [("both", []), ("text", [1]), ("image", [2])])
def test_blank_notes_get_a_zero_embedding_and_are_counted(modality: Any, blank: list[int]) -> None:
    model = LengthModel()
    embeds, num_blank = encode_with_modality(model, NOTES, modality)
    assert num_blank == len(blank)
    assert [position for position in range(3) if not embeds[position].any()] == blank
    assert [note["note_id"] for note in model.seen] == ["abc"[i] for i in range(3) if i not in blank]
    assert embeds.dtype == np.float32


def test_a_modality_that_no_note_has_is_refused() -> None:
    with pytest.raises(ValueError, match="'image'.*columns"):
        encode_with_modality(LengthModel(), NOTES[2:], "image")
