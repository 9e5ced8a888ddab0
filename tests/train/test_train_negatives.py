"""Mined hard negatives against a search in loops."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from modeling_notellm2 import NoteLLM2Model
from pairs.split import NotesAndPairs
from train import negatives
from train.data import NoteReader, PairDataset
from train.negatives import mine_hard_negatives

BuildModel = Callable[..., NoteLLM2Model]


@pytest.mark.parametrize("at_once", [8192, 7])
def test_finds_the_most_similar_that_are_not_related(
    at_once: int,
    build_model: BuildModel,
    splits: dict[str, NotesAndPairs],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(negatives, "NOTES_AT_ONCE", at_once)
    model, dataset = build_model(), PairDataset(*splits["train"])
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no picture")
    notes = list(dataset.notes)
    unreadable = 3
    notes[unreadable] |= {"image": str(damaged)}
    reader = NoteReader(Dataset.from_list(notes), model.processor, None, "drop-pair")
    embeds = model.encode(list(dataset.notes))
    similar = embeds @ embeds.T
    ceiling = float(np.quantile(similar[np.triu_indices(len(notes), 1)], 0.97))
    found = mine_hard_negatives(model, reader, dataset.related, 4, ceiling, show_progress_bar=False)
    some_at_ceiling = some_related = False
    for note in range(len(notes)):
        if note == unreadable:
            assert (found[note] == -1).all()
            continue
        allowed = []
        for other in np.argsort(-similar[note], kind="stable"):
            if other in (note, unreadable):
                continue
            if other in dataset.related.of(note):
                some_related = True
            elif similar[note, other] > ceiling:
                some_at_ceiling = True
            else:
                allowed.append(int(other))
        assert found[note].tolist() == allowed[:4]
    assert some_at_ceiling and some_related  # control: without the rules the lists would be others


def test_few_candidates_leave_gaps(build_model: BuildModel, splits: dict[str, NotesAndPairs]):
    model, dataset = build_model(), PairDataset(*splits["train"])
    reader = NoteReader(dataset.notes, model.processor)
    assert (mine_hard_negatives(model, reader, dataset.related, 3, -1.0, show_progress_bar=False) == -1).all()
    found = mine_hard_negatives(model, reader, dataset.related, 200, 1.0, show_progress_bar=False)
    assert found.shape == (len(dataset.notes), 200) and (found[:, -1] == -1).all() and (found[:, 0] >= 0).all()
