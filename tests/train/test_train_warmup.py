"""The head's warm-up: what it trains, on which pairs, in which precision, and that it helps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modeling_notellm2 import NoteLLM2Model
from train import warmup
from train.states import NoteStateTable
from train.trainer import NoteLLM2Trainer
from train.warmup import warm_up_head

BuildTrainer = Callable[..., NoteLLM2Trainer]
BuildModel = Callable[..., NoteLLM2Model]


def snapshot(model: NoteLLM2Model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def warm_up(trainer: NoteLLM2Trainer, steps: int = 40) -> set[str]:
    """Warm up, and return the names of what changed."""
    before = snapshot(trainer.model)
    groups = [group for group in trainer.parameter_groups(trainer.model) if group["part"] == "head"]
    pairs = trainer.train_dataset.pairs
    warm_up_head(trainer.model, trainer.reader, pairs, groups, steps=steps, visual_loss_weight=0.1, seed=0)
    return {name for name, value in trainer.model.state_dict().items() if not torch.equal(before[name], value)}


def test_trains_the_head_alone_and_on_the_loss_of_training(build_trainer: BuildTrainer):
    trainer = build_trainer(llm_tuning="full", head_learning_rate=3e-3)
    model = trainer.model.train()
    before = snapshot(model)
    changed = warm_up(trainer, steps=100)
    assert model.training
    assert {name.split(".")[0] for name in changed} == {"late_fusion", "head", "logit_scale"}
    assert all(parameter.grad is None for parameter in model.parameters())

    batch = next(iter(build_trainer(model, per_device_train_batch_size=10**6).get_train_dataloader()))
    with torch.no_grad():
        after = trainer.compute_loss(model.eval(), batch)
        model.load_state_dict(before)
        assert after < trainer.compute_loss(model, batch) - 0.05


def test_states_that_are_known_already_teach_the_same(build_trainer: BuildTrainer):
    def head(table: NoteStateTable | None, runs: int) -> torch.Tensor:
        trainer = build_trainer(head_learning_rate=3e-3)
        calls: list[int] = []
        trainer.model.language_model.register_forward_hook(lambda *_: calls.append(1))
        settings = {"steps": 5, "visual_loss_weight": 0.1, "seed": 0, "table": table}
        warm_up_head(trainer.model, trainer.reader, trainer.train_dataset.pairs, trainer.warmup_groups(), **settings)
        assert bool(calls) == bool(runs)
        return trainer.model.head.weight.detach()

    trainer = build_trainer()
    rows = torch.arange(len(trainer.reader.notes))
    table = NoteStateTable(trainer.model, trainer.reader, rows)
    found = head(None, 1)
    torch.testing.assert_close(head(table, 0), found, atol=1e-5, rtol=1e-4)
    table._tensors["note_states"] += torch.randn_like(table._tensors["note_states"])
    assert (head(table, 0) - found).abs().max() > 1e-3


def test_text_only_models_and_fixed_temperatures(build_trainer: BuildTrainer, backbones: tuple[Path, Path]):
    model = NoteLLM2Model.from_backbones(backbones[0], embedding_dim=8, learnable_temperature=False)
    assert warm_up(build_trainer(model, head_learning_rate=1e-2), steps=2) == {"head.weight"}


def test_the_trainer_warms_up_before_it_trains(build_trainer: BuildTrainer):
    settings = {"llm_tuning": "frozen", "learning_rate": 0.0, "head_learning_rate": 1e-3, "max_steps": 1}
    cold, warm = build_trainer(**settings), build_trainer(head_warmup_steps=30, **settings)
    cold.train()
    warm.train()
    moved = (cold.model.head.weight - warm.model.head.weight).abs().max()
    assert moved > 0.003  # one step of AdamW moves a weight by its rate at most
    assert torch.equal(cold.model.connector.query_tokens, warm.model.connector.query_tokens)


def test_the_backbones_run_in_the_precision_of_training(build_trainer: BuildTrainer):
    seen = []
    for bf16 in (False, True):
        trainer = build_trainer(bf16=bf16, head_warmup_steps=1, head_learning_rate=1e-3, max_steps=1)
        found: list[bool] = []
        layer = trainer.model.language_model.layers[0]
        layer.register_forward_hook(lambda *_, found=found: found.append(torch.is_autocast_enabled("cpu")))
        trainer.train()
        assert len(set(found)) == 1 and len(found) > 1  # warm-up and training alike
        seen.append(found[0])
    assert seen == [False, True]


def test_a_sample_is_drawn_from_the_pairs(monkeypatch: pytest.MonkeyPatch):
    """A sparse graph: of so many notes drawn at random, hardly two would be related."""
    monkeypatch.setattr(warmup, "MAX_NOTES", 30)
    pairs = torch.arange(4000).reshape(2000, 2)
    pairs = torch.cat([pairs, pairs + torch.tensor([0, 4000])])  # (0, 1), …, (0, 4001), …
    notes, kept = warmup._choose_pairs(pairs, torch.Generator().manual_seed(0))
    assert 15 < len(notes) <= 30 and set(kept.flatten().tolist()) == set(notes.tolist())
    among = [pair for pair in pairs.tolist() if set(pair) <= set(notes.tolist())]
    assert kept.tolist() == among and len(kept) >= 15
    monkeypatch.setattr(warmup, "MAX_NOTES", 10**6)
    notes, kept = warmup._choose_pairs(pairs, torch.Generator().manual_seed(0))
    assert torch.equal(kept, pairs) and torch.equal(notes, pairs.unique())


def test_models_without_head_are_refused(build_model: BuildModel, build_trainer: BuildTrainer):
    with pytest.raises(ValueError, match="head_warmup_steps=2: the model has neither"):
        build_trainer(build_model(embedding_dim=None, late_fusion=None), head_warmup_steps=2, head_learning_rate=1e-3)


@pytest.mark.parametrize("ruinous", [True, False])
def test_the_warmed_up_model_may_be_the_best(ruinous: bool, build_trainer: BuildTrainer):
    """Steps at a rate of 0 change nothing: checkpoints and warm-up tie then, and the later one stays."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "recall@10", "greater_is_better": True}
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 2, "llm_tuning": "full"}
    rates = {"learning_rate": 1.0 if ruinous else 0.0, "head_learning_rate": 3e-3, "connector_learning_rate": 0.0}
    trainer = build_trainer(head_warmup_steps=100, warmup_steps=0, **best, **often, **rates)
    warmed_up: dict[str, torch.Tensor] = {}
    original = trainer._warm_up_head

    def warm_up_and_look() -> None:
        original()
        warmed_up.update(snapshot(trainer.model))
        if not ruinous:
            trainer.args.head_learning_rate = 0.0

    trainer._warm_up_head = warm_up_and_look  # type: ignore[method-assign]
    trainer.train()
    assert not list(Path(trainer.args.output_dir).glob("warmed_up*"))
    assert trainer.evaluate()["eval_recall@10"] == pytest.approx(trainer.state.best_metric)
    if ruinous:
        assert trainer.state.best_global_step == 0
        assert all(torch.equal(value, warmed_up[name]) for name, value in trainer.model.state_dict().items())
        worse = [entry["eval_recall@10"] for entry in trainer.state.log_history if "eval_recall@10" in entry]
        assert min(worse) < trainer.state.best_metric - 0.02  # training did ruin it
    else:
        assert trainer.state.best_global_step == 1


def test_it_measures_the_states_that_are_to_be_standardized(build_trainer: BuildTrainer, build_model: BuildModel):
    trainer = build_trainer(build_model(standardize_states=True), head_warmup_steps=1, head_learning_rate=1e-3)
    changed = warm_up(trainer, steps=1)
    assert {"note_standardizer.mean", "note_standardizer.scale", "visual_standardizer.mean"} <= changed
    rows = torch.from_numpy(trainer.train_dataset.pairs).unique()
    states = NoteStateTable(trainer.model, trainer.reader, rows).select(rows)
    torch.testing.assert_close(trainer.model.note_standardizer.mean, states.note_states.mean(0), atol=1e-5, rtol=1e-5)


def test_states_that_nothing_measures_are_refused(build_trainer: BuildTrainer, build_model: BuildModel):
    model = build_model(standardize_states=True)
    with pytest.raises(ValueError, match="standardize_states=True with head_warmup_steps=0"):
        build_trainer(model)
    warm_up(build_trainer(model, head_warmup_steps=1, head_learning_rate=1e-3), steps=1)
    build_trainer(model).train()  # measured before


def test_what_was_measured_stays_for_the_head_that_reads_it(build_trainer: BuildTrainer, build_model: BuildModel):
    trainer = build_trainer(build_model(standardize_states=True), head_warmup_steps=1, head_learning_rate=1e-3)
    warm_up(trainer, steps=1)
    with torch.no_grad():
        trainer.model.language_model.norm.weight.mul_(2)
    assert "note_standardizer.mean" not in warm_up(trainer, steps=1)


def test_the_warm_up_has_a_rate_of_its_own(build_trainer: BuildTrainer, build_model: BuildModel):
    """At rates of zero, the one or the other part of the run changes nothing."""
    moved = {}
    for first, after in ((0.0, 0.0), (1e-3, 0.0), (0.0, 1e-3), (None, 1e-3)):
        rates = {"head_warmup_learning_rate": first, "head_learning_rate": after}
        trainer = build_trainer(head_warmup_steps=20, llm_tuning="frozen", learning_rate=0.0, max_steps=1, **rates)
        before = trainer.model.head.weight.clone()
        trainer.train()
        moved[first, after] = (trainer.model.head.weight - before).abs().max().item()
    assert moved[0.0, 0.0] == 0
    assert 0 < moved[0.0, 1e-3] <= 1.1e-3 < 3e-3 < moved[1e-3, 0.0]  # one step of AdamW moves a weight by its rate
    assert moved[None, 1e-3] > 3e-3
