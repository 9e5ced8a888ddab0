"""Numbers at their limits: losses and gradients stay finite, or the run ends before a weight or a checkpoint takes up
what is not."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerCallback

from evaluation.metrics import retrieval_metrics
from modeling_notellm2 import NonFiniteError, NoteLLM2Model
from modeling_notellm2.fusion_notellm2 import unit_length
from pairs.split import NotesAndPairs
from tests.train import tiny
from train.batches import drawn_log_probability
from train.finite import refuse_non_finite_gradients, refuse_non_finite_weights
from train.gradcache import EncodedRows, cached_loss
from train.losses import ContrastiveTargets, contrastive_loss, joint_loss
from train.trainer import NoteLLM2Trainer

BuildTrainer = Callable[..., NoteLLM2Trainer]
BuildModel = Callable[..., NoteLLM2Model]

WIDTH = 8


def directions(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(states: Tensor, log_scale: float, targets: ContrastiveTargets, **joint: Any) -> list[Tensor]:
    """Of what the head gives, normalised as the model does it, and of the temperature's parameter: both readouts, two
    widths."""
    leaf, scale = states.clone().requires_grad_(), torch.tensor(log_scale, requires_grad=True)
    embeds = unit_length(leaf)
    everywhere = torch.ones(len(states), dtype=torch.bool)
    settings = {"has_image": everywhere, "visual_loss_weight": 0.5, "dims": (2, WIDTH), **joint}
    loss, _parts = joint_loss(embeds, embeds.flip(1), scale.exp(), targets=targets, **settings)
    loss.backward()
    assert leaf.grad is not None
    return [loss.detach(), leaf.grad, torch.zeros(()) if scale.grad is None else scale.grad]


HOT, COLD = math.log(100.0), -math.log(100.0)


@pytest.mark.parametrize("log_scale", [HOT, 0.0, COLD])
@pytest.mark.parametrize(
    "states",
    [
        directions(1).expand(8, -1).contiguous(),
        torch.cat([directions(1), -directions(1)]).repeat(4, 1),
        torch.cat([torch.zeros(3, WIDTH), directions(5)]),
        torch.zeros(8, WIDTH),
        1e15 * directions(8),
        1e-30 * directions(8),
        torch.cat([torch.zeros(8, 2), directions(8)[:, 2:]], dim=1),
    ],
    ids=["identical", "opposite", "some zero", "all zero", "large", "small", "first dimensions zero"],
)
def test_degenerate_embeddings_have_finite_losses_and_gradients(states: Tensor, log_scale: float) -> None:
    found = loss_and_gradients(states, log_scale, ContrastiveTargets.of_pairs(4))
    assert all(value.isfinite().all() for value in found)
    assert found[0] <= 2 * 100 + math.log(8)
    if (states == states[0]).all():  # nothing can be told from anything
        assert found[0].item() == pytest.approx(math.log(7), abs=1e-4)


@pytest.mark.parametrize("log_scale", [HOT, COLD])
@pytest.mark.parametrize("name", ["one pair", "one group", "all related", "no image", "one image", "no positive"])
def test_batches_without_what_a_loss_is_made_of(name: str, log_scale: float) -> None:
    """Rows without any negative, readouts without a pair: their loss is 0, and so are their gradients."""
    rows = 2 if name == "one pair" else 8
    targets, joint = ContrastiveTargets.of_pairs(rows // 2), {}
    everyone = torch.cartesian_prod(torch.arange(rows), torch.arange(rows))
    if name == "one group":
        targets = targets._replace(groups=torch.zeros(rows, dtype=torch.int64))
    elif name == "all related":
        targets = targets._replace(related=everyone[everyone[:, 0] != everyone[:, 1]])
    elif name == "no positive":
        targets = targets._replace(positives=targets.positives[:0])
    elif name in ("no image", "one image"):
        joint["has_image"] = torch.arange(rows) < (name == "one image")
    found = loss_and_gradients(directions(rows), log_scale, targets, **joint)
    assert all(value.isfinite().all() for value in found)
    if name in ("no image", "one image"):  # the text is trained on all the same
        expected = loss_and_gradients(directions(rows), log_scale, targets, visual_loss_weight=0.0)
        for value, other in zip(found, expected, strict=True):
            torch.testing.assert_close(value, other)
        assert expected[1].abs().max() > 1e-5
    else:
        assert all(not value.any() for value in found)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_gradients_are_those_of_finite_differences(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss computes in float32; here its own formulas run in double precision."""
    monkeypatch.setattr(Tensor, "float", lambda self: self)
    monkeypatch.setattr(torch, "as_tensor", _as_double(torch.as_tensor))
    targets = ContrastiveTargets(
        torch.tensor([[0, 1], [1, 0], [0, 2], [3, 4], [4, 3]]),
        torch.tensor([[3, 2], [4, 0], [4, 1], [4, 2]]),  # 4 has no negative but 5, which is of its group
        torch.tensor([0, 1, 2, 3, 4, 4]),
        torch.tensor([-1.0, -30.0, -0.1, -2.0, -4.0, -9.0], dtype=torch.float64),
    )
    embeds = functional.normalize(directions(6).double(), dim=-1)
    embeds[5] = embeds[0]
    inputs = (embeds.requires_grad_(), torch.tensor(scale, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(lambda e, s: contrastive_loss(e, s, targets, tile_size=4), inputs)


def _as_double(as_tensor: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def convert(value: Any, **settings: Any) -> Tensor:
        return as_tensor(value, **{**settings, "dtype": torch.float64})

    return convert


def test_log_q_of_extreme_probabilities() -> None:
    """A note that is in nearly no batch, or in nearly every one."""
    degrees = np.array([0, 1, 10**12])
    for batch, total in ((1, 10**15), (10**15 - 1, 10**15), (1, 2), (2, 2)):
        found = drawn_log_probability(degrees, batch, total)
        assert np.isfinite(found).all() and (found <= 0).all() and found[0] == found[1]
    log_q = np.array([0.0, -80.0, -1e-30, -700.0, -3.0, -3.0, -3.0, -3.0], dtype=np.float32)
    pairs = ContrastiveTargets.of_pairs(4)
    targets = ContrastiveTargets.of_plan(
        pairs.positives.numpy(), pairs.related.numpy(), pairs.groups.numpy(), log_q=log_q
    )
    for log_scale in (HOT, COLD):
        found = loss_and_gradients(directions(8), log_scale, targets)
        assert all(value.isfinite().all() for value in found) and found[0] > 1
    for value in (-np.inf, np.nan):
        log_q[2] = value
        with pytest.raises(ValueError, match=r"log_q\[2\] is (-inf|nan): give the logarithm of a probability above 0"):
            ContrastiveTargets.of_plan(pairs.positives.numpy(), pairs.related.numpy(), pairs.groups.numpy(), log_q)


def test_gradcache_of_identical_notes() -> None:
    """Embeddings that are all alike, or zero, in mini-batches: the gradients of the whole batch, and finite."""
    for factor in (1.0, 0.0):
        found = []
        for size in (8, 3):
            head = nn.Linear(WIDTH, WIDTH, bias=False)
            with torch.no_grad():
                head.weight.copy_(factor * directions(WIDTH, seed=2))
            notes = directions(1).expand(8, -1)

            def encode(part: Tensor, head: nn.Linear = head) -> EncodedRows:
                return EncodedRows(unit_length(head(part)), torch.tensor(100.0))

            def loss_of(rows: Tensor, scale: Tensor) -> Tensor:
                return contrastive_loss(rows, scale, ContrastiveTargets.of_pairs(4))

            loss = cached_loss(encode, notes.split(size), loss_of)
            loss.backward()
            assert loss.item() == pytest.approx(math.log(7), abs=1e-3) and head.weight.grad is not None
            found.append(head.weight.grad)
        assert found[0].isfinite().all()
        torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


def with_notes(splits: dict[str, NotesAndPairs], **fields: Any) -> dict[str, NotesAndPairs]:
    """The training notes, each with these fields."""
    train = splits["train"]
    notes = Dataset.from_list([{**note, **fields} for note in train.notes])
    return {**splits, "train": NotesAndPairs(notes, train.pairs)}


@pytest.mark.parametrize("settings", [{}, {"mini_batch_size": 4, "matryoshka_dims": [4, 16]}, {"bf16": True}], ids=str)
def test_a_run_on_identical_notes_is_finite(
    settings: dict[str, Any], splits: dict[str, NotesAndPairs], build_model: BuildModel, tmp_path: Path
) -> None:
    """Also without a picture in any batch, and with a temperature that begins at its bound."""
    first = splits["train"].notes[0]
    same = with_notes(splits, title=first["title"], content=first["content"], topics=first["topics"], image=None)
    model = build_model(initial_temperature=0.01)
    trainer = tiny.build_trainer(same, model, tmp_path, max_steps=2, llm_tuning="full", **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # All embeddings are one: the partner is one of some 10 notes.
    assert losses and all(1 < loss < math.log(12) + 0.5 for loss in losses)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_states_of_identical_notes_are_not_standardized(
    splits: dict[str, NotesAndPairs], build_model: BuildModel, tmp_path: Path
) -> None:
    same = with_notes(splits, title="oak", content="", topics="", image=None)
    model = build_model(standardize_states=True)
    trainer = tiny.build_trainer(same, model, tmp_path, head_warmup_steps=2, head_learning_rate=1e-3)
    with pytest.raises(ValueError, match="notes do not differ, and cannot be standardized"):
        trainer.train()
    assert not model.note_standardizer.is_fitted


def poison(model: NoteLLM2Model, name: str = "head.weight") -> None:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = torch.nan


class Poison(TrainerCallback):
    """Something goes wrong: in the second step's update, or after the first checkpoint."""

    def __init__(self, event: str) -> None:
        self.event = event

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.event == "update" and state.global_step == 1:
            poison(model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.event == "save":
            poison(model, "language_model.norm.weight")


def all_finite(folder: Path) -> bool:
    loaded = NoteLLM2Model.from_pretrained(folder)
    return all(bool(parameter.isfinite().all()) for parameter in loaded.parameters())


@pytest.mark.parametrize("settings", [{}, {"mini_batch_size": 4}, {"max_grad_norm": 0.0}], ids=str)
def test_a_loss_that_is_nan_ends_the_run(settings: dict[str, Any], build_trainer: BuildTrainer, tmp_path: Path) -> None:
    """What transformers would leave out of its logs; the checkpoints that are there are whole."""
    trainer = build_trainer(max_steps=4, save_steps=1, **settings)
    trainer.add_callback(Poison("save"))
    with pytest.raises(NonFiniteError, match="^step 2: the loss is nan, loss_m nan.*temperature 0.0.*last checkpoint"):
        trainer.train()
    assert trainer.state.global_step == 1
    for name, parameter in trainer.model.named_parameters():
        assert name == "language_model.norm.weight" or parameter.isfinite().all(), name
    assert all_finite(tmp_path / "run" / "checkpoint-1")
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_gradients_that_are_not_finite_never_reach_a_weight(value: float, build_trainer: BuildTrainer) -> None:
    """While the loss is fine; 1e38: each is finite, and their norm, by which they are clipped, overflows."""
    trainer = build_trainer(max_steps=3, gradient_accumulation_steps=2)
    calls = []

    def hook(gradient: Tensor) -> Tensor:
        calls.append(value)
        return torch.full_like(gradient, value) if len(calls) >= 4 else gradient

    trainer.model.head.weight.register_hook(hook)
    found = "their norm overflows" if value == 1e38 else r"1 are not finite, that of head\.weight first"
    with pytest.raises(NonFiniteError, match=rf"^step 2: of \d+ gradients {found}\. No weight"):
        trainer.train()
    assert trainer.state.global_step == 1 and len(calls) == 4
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_weights_that_are_not_finite_are_not_saved(build_trainer: BuildTrainer, tmp_path: Path) -> None:
    """An update may overflow whose loss and gradients were fine."""
    trainer = build_trainer(max_steps=4, save_steps=1)
    trainer.add_callback(Poison("update"))
    with pytest.raises(NonFiniteError, match=r"^step 2: 1 weights are not finite, head\.weight first\. They are not"):
        trainer.train()
    run = tmp_path / "run"
    assert all_finite(run / "checkpoint-1") and not list((run / "checkpoint-2").glob("*.safetensors"))
    # Control: without the look at the weights the checkpoint is there, and holds NaN.
    trainer.model.save_pretrained(tmp_path / "control")
    assert not all_finite(tmp_path / "control")


@pytest.mark.parametrize("name", ["late_fusion.projection.weight", "head.weight"])
def test_a_warm_up_that_is_nan_ends(name: str, build_trainer: BuildTrainer) -> None:
    trainer = build_trainer(head_warmup_steps=3, head_learning_rate=1e-3)
    poison(trainer.model, name)
    with pytest.raises(NonFiniteError, match="^step 1 of the head's warm-up: the loss is nan, loss_m nan"):
        trainer.train()
    broken = [key for key, parameter in trainer.model.named_parameters() if not parameter.isfinite().all()]
    assert broken == [name] and not trainer.optimizer  # no step of anything


def test_an_embedding_that_is_nan_is_no_note_that_cannot_be_read(build_trainer: BuildTrainer) -> None:
    """Mining for hard negatives leaves such notes out; a model that gives NaN is another matter."""
    trainer = build_trainer(hard_negatives=1)
    poison(trainer.model)
    with pytest.raises(NonFiniteError, match=r"the embedding of note \d+ is not finite: check the model's weights"):
        trainer.train()


def test_metrics_refuse_embeddings_that_are_nan(build_trainer: BuildTrainer) -> None:
    trainer = build_trainer()
    poison(trainer.model)
    with pytest.raises(ValueError, match="The embedding of note 0 contains NaN or infinity"):
        trainer.evaluate()
    zeros = retrieval_metrics(np.zeros((4, 3), np.float32), [np.array([1])] * 1 + [np.array([0])] + [np.array([0])] * 2)
    assert all(math.isfinite(value) for value in zeros.values())


def test_what_is_finite_passes() -> None:
    """The controls of the refusals: large numbers, zeros, parameters without a gradient, none at all."""
    layer = nn.Linear(3, 3)
    layer.weight.grad = torch.full((3, 3), 1e18)
    refuse_non_finite_gradients(layer.named_parameters(), "step 1")
    refuse_non_finite_weights(layer.named_parameters(), "step 1")
    refuse_non_finite_gradients([], "step 1")
    layer.weight.grad[1, 1] = -torch.inf
    with pytest.raises(NonFiniteError, match="step 1: of 1 gradients 1 are not finite, that of weight first"):
        refuse_non_finite_gradients(layer.named_parameters(), "step 1")
