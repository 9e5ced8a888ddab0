"""Mined hard negatives against a search in loops."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from torch import distributed

from modeling_notellm2 import NoteLLM2Model
from pairs.split import NotesAndPairs
from tests.train import tiny
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
        # By similarity, not by name: two notes that differ in the last bit may stand either way around.
        assert set(found[note].tolist()) <= set(allowed) and len(set(found[note].tolist())) == 4
        np.testing.assert_allclose(similar[note, found[note]], similar[note, allowed[:4]], atol=1e-6)
    assert some_at_ceiling and some_related  # control: without the rules the lists would be others


def test_few_candidates_leave_gaps(build_model: BuildModel, splits: dict[str, NotesAndPairs]):
    model, dataset = build_model(), PairDataset(*splits["train"])
    reader = NoteReader(dataset.notes, model.processor)
    assert (mine_hard_negatives(model, reader, dataset.related, 3, -1.0, show_progress_bar=False) == -1).all()
    found = mine_hard_negatives(model, reader, dataset.related, 200, 1.0, show_progress_bar=False)
    assert found.shape == (len(dataset.notes), 200) and (found[:, -1] == -1).all() and (found[:, 0] >= 0).all()


def test_notes_with_one_cover_are_left_out(build_model: BuildModel, splits: dict[str, NotesAndPairs]):
    model, dataset = build_model(), PairDataset(*splits["train"])
    reader = NoteReader(dataset.notes, model.processor)
    groups = np.arange(len(dataset.notes)) // 8  # eight notes a cover
    found = mine_hard_negatives(model, reader, dataset.related, 4, 1.0, groups, show_progress_bar=False)
    same = groups[found] == groups[:, None]
    assert not same[found >= 0].any() and (found >= 0).all()
    alone = mine_hard_negatives(model, reader, dataset.related, 4, 1.0, show_progress_bar=False)
    assert (groups[alone] == groups[:, None]).any()  # control


def mine_a_share(splits_folder: Path, backbones: tiny.Backbones, folder: Path) -> None:
    distributed.init_process_group("gloo")
    negatives.ROWS_AT_ONCE = 7
    model, dataset = tiny.build_model(backbones), PairDataset(*tiny.load_splits(splits_folder)["train"])
    counts: list[int] = []
    model.language_model.register_forward_pre_hook(
        lambda _module, _inputs, keywords: counts.append(len(keywords["packed"].rows)), with_kwargs=True
    )
    reader = NoteReader(dataset.notes, model.processor)
    found = mine_hard_negatives(model, reader, dataset.related, 4, 1.0, show_progress_bar=False)
    np.savez(folder / f"{distributed.get_rank()}.npz", found=found, encoded=sum(counts))
    distributed.destroy_process_group()


def test_processes_share_the_work(splits_folder: Path, backbones: tiny.Backbones, tmp_path: Path):
    tiny.run_processes(2, mine_a_share, splits_folder, backbones, tmp_path)
    model, dataset = tiny.build_model(backbones), PairDataset(*tiny.load_splits(splits_folder)["train"])
    reader = NoteReader(dataset.notes, model.processor)
    alone = mine_hard_negatives(model, reader, dataset.related, 4, 1.0, show_progress_bar=False)
    saved = [np.load(tmp_path / f"{rank}.npz") for rank in range(2)]
    assert (saved[0]["found"] == saved[1]["found"]).all() and len(np.unique(alone)) > 20
    embeds = model.encode(list(dataset.notes))
    notes = np.arange(len(embeds))[:, None]
    similar = embeds @ embeds.T
    # Rounding depends on who shares a batch: equally similar notes may change places.
    np.testing.assert_allclose(similar[notes, saved[0]["found"]], similar[notes, alone], atol=1e-6)
    assert np.abs(similar[notes, np.roll(alone, 1, axis=0)] - similar[notes, alone]).max() > 1e-3  # control
    assert [int(part["encoded"]) for part in saved] == [
        len(dataset.notes) - len(dataset.notes) // 2,
        len(dataset.notes) // 2,
    ]
