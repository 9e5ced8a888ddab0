"""The head's warm-up: what it trains, on what, and that it helps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_notellm2 import NoteLLM2Model
from pairs.split import NotesAndPairs
from train import warmup
from train.data import NoteCollator, NoteDataset, PairDataset
from train.trainer import NoteLLM2Trainer
from train.warmup import warm_up_head

BuildTrainer = Callable[..., NoteLLM2Trainer]
BuildModel = Callable[..., NoteLLM2Model]


def without_some_images(splits: dict[str, NotesAndPairs]) -> PairDataset:
    """The training pairs, every third note without its image."""
    notes, pairs = splits["train"]

    def drop(note: dict[str, Any], row: int) -> dict[str, Any]:
        return {"image": None if row % 3 == 0 else note["image"]}

    return PairDataset(notes.map(drop, with_indices=True), pairs)


def test_trains_the_head_alone_and_on_the_loss_of_training(build_trainer: BuildTrainer):
    trainer = build_trainer(llm_tuning="full", head_warmup_steps=40, head_learning_rate=1e-2)
    model = trainer.model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    warm_up_head(trainer)
    assert model.training
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert {name.split(".")[0] for name in changed} == {"late_fusion", "head", "logit_scale"}

    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    with torch.no_grad():
        after = trainer.compute_loss(model.eval(), batch)
        model.load_state_dict(before)
        assert after < trainer.compute_loss(model, batch) - 0.05


def test_the_states_it_keeps_are_those_of_a_forward_pass(build_trainer: BuildTrainer, splits: dict[str, NotesAndPairs]):
    """Notes with and without image, in another order than they were run in; and a batch in which none has one."""
    dataset = without_some_images(splits)
    trainer = build_trainer(per_device_eval_batch_size=5)
    model, singles = trainer.model.eval(), NoteDataset(dataset.notes)
    table = warmup._run_backbones(trainer, dataset, range(21))
    for rows in ([7, 3, 19, 6, 3], [0, 9, 6]):
        batch = NoteCollator(model.processor)([singles[row] for row in rows])
        assert batch.pop("note_index").tolist() == rows
        with torch.no_grad():
            expected = model(**batch)
            found = model.embed_states(warmup._select(table, torch.tensor(rows)))
            wrong = model.embed_states(warmup._select(table, torch.tensor(rows) + 1))
        torch.testing.assert_close(found.note_embeds, expected.note_embeds, atol=1e-6, rtol=0)
        assert (found.visual_embeds is None) == (expected.visual_embeds is None) == (rows == [0, 9, 6])
        if expected.visual_embeds is not None:
            torch.testing.assert_close(found.visual_embeds, expected.visual_embeds, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.fusion_weight, expected.fusion_weight, atol=1e-6, rtol=0)
        assert (wrong.note_embeds - expected.note_embeds).abs().max() > 1e-3  # the rows matter


def test_a_sample_keeps_the_pairs_among_its_notes(build_trainer: BuildTrainer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warmup, "MAX_NOTES", 30)
    dataset = build_trainer().train_dataset
    notes, pairs = warmup._choose_pairs(dataset, torch.Generator().manual_seed(0))
    kept = set(notes.tolist())
    assert len(kept) == 30 and notes.tolist() == sorted(kept)
    assert {tuple(pair) for pair in pairs.tolist()} == {(a, b) for a, b in dataset.pairs if a in kept and b in kept}
    assert 0 < len(pairs) < len(dataset)


def test_text_only_and_models_without_head(build_model: BuildModel, build_trainer: BuildTrainer, backbones: Any):
    text_only = NoteLLM2Model.from_backbones(backbones[0], embedding_dim=8)
    warm_up_head(build_trainer(text_only, head_warmup_steps=2))
    no_head = build_model(embedding_dim=None, late_fusion=None)
    with pytest.raises(ValueError, match="head_warmup_steps=2"):
        warm_up_head(build_trainer(no_head, head_warmup_steps=2))
