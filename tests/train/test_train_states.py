"""The states that are kept are those of a forward pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from modeling_notellm2 import NoteLLM2Model
from pairs.split import NotesAndPairs
from train.data import NoteReader
from train.features import VisionFeatureStore
from train.states import NoteStateTable

BuildModel = Callable[..., NoteLLM2Model]


def without_some_images(splits: dict[str, NotesAndPairs]) -> Dataset:
    """The training notes, every third one without its image."""

    def drop(note: dict[str, Any], row: int) -> dict[str, Any]:
        return {"image": None if row % 3 == 0 else note["image"]}

    return splits["train"].notes.map(drop, with_indices=True)


@pytest.mark.parametrize("kept_features", [False, True])
def test_equal_to_a_forward_pass(
    kept_features: bool, build_model: BuildModel, splits: dict[str, NotesAndPairs], tmp_path: Path
):
    """In another order than they were run in, some twice, mixed and all without image."""
    model, notes = build_model().eval(), without_some_images(splits)
    features = VisionFeatureStore(tmp_path, model).table(notes) if kept_features else None
    table = NoteStateTable(model, NoteReader(notes, model.processor, features), torch.arange(1, 22), batch_size=5)
    for rows in ([7, 3, 19, 6, 3], [9, 6]):
        batch = model.processor([notes[row] for row in rows])
        with torch.no_grad():
            expected = model(**batch)
            found = model.embed_states(table.select(torch.tensor(rows)))
            wrong = model.embed_states(table.select(torch.tensor(rows) + 1))
        torch.testing.assert_close(found.note_embeds, expected.note_embeds, atol=1e-6, rtol=0)
        assert (found.visual_embeds is None) == (expected.visual_embeds is None) == (rows == [9, 6])
        if expected.visual_embeds is not None:
            torch.testing.assert_close(found.visual_embeds, expected.visual_embeds, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.fusion_weight, expected.fusion_weight, atol=1e-6, rtol=0)
        assert (wrong.note_embeds - expected.note_embeds).abs().max() > 1e-3  # the rows matter


def test_states_that_are_not_kept_are_refused(build_model: BuildModel, splits: dict[str, NotesAndPairs]):
    model = build_model()
    table = NoteStateTable(model, NoteReader(splits["train"].notes, model.processor), torch.tensor([2, 5]))
    with pytest.raises(ValueError, match="note 3 is not among"):
        table.select(torch.tensor([5, 3]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_states_keep_the_dtype_of_the_weights(
    dtype: torch.dtype, build_model: BuildModel, splits: dict[str, NotesAndPairs]
):
    model = build_model().to(dtype).eval()
    table = NoteStateTable(model, NoteReader(splits["train"].notes, model.processor), torch.tensor([2, 5, 6]))
    states = table.select(torch.tensor([6, 2]))
    assert states.note_states.dtype == states.pooled_embeds.dtype == dtype
    found, wrong = model.embed_states(states), model.embed_states(table.select(torch.tensor([2, 6])))
    expected = model.encode([splits["train"].notes[row] for row in (6, 2)], convert_to_tensor=True)
    difference = (found.note_embeds - expected).abs().max()
    assert difference < (0.01 if dtype == torch.bfloat16 else 1e-6)
    assert 2 * difference < (wrong.note_embeds - expected).abs().max()
