"""A batch encoded in parts has the loss and the gradients of the whole."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modeling_notellm2 import NoteLLM2Model
from train.gradcache import EncodedRows, cached_loss
from train.trainer import NoteLLM2Trainer

BuildTrainer = Callable[..., NoteLLM2Trainer]
BuildModel = Callable[..., NoteLLM2Model]


class Encoder(nn.Module):
    """With dropout, and a temperature of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 4))
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch: Tensor) -> EncodedRows:
        return EncodedRows(self.layers(batch), self.log_scale.exp())


def loss_of(rows: Tensor, scale: Tensor) -> Tensor:
    return (scale * rows @ rows.T).logsumexp(1).mean()


def gradients(encoder: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in encoder.parameters()]


@pytest.mark.parametrize("factor", [1.0, 1024.0, 0.5])
def test_gradients_are_those_of_the_whole_whatever_scales_the_loss(factor: float):
    encoder, batch = Encoder(), torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
    parts = batch.split(3)
    torch.manual_seed(7)
    loss = cached_loss(encoder, parts, loss_of)
    after = torch.get_rng_state()
    (loss * factor).backward()
    found = gradients(encoder)
    assert torch.equal(torch.get_rng_state(), after), "going backward must not move the random state"

    encoder.zero_grad()
    torch.manual_seed(7)
    encoded = [encoder(part) for part in parts]  # the same dropout, with one graph
    expected = loss_of(torch.cat([rows for rows, _scale in encoded]), encoded[0].logit_scale)
    (expected * factor).backward()
    assert loss.item() == expected.item()
    for one, other in zip(found, gradients(encoder), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * factor)
        assert other.abs().max() > 1e-4 * factor
    # Control: the mean of the parts' own losses is something else, which is why accumulation is no substitute.
    encoder.zero_grad()
    torch.manual_seed(7)
    (torch.stack([loss_of(*encoder(part)) for part in parts]).mean() * factor).backward()
    assert not torch.allclose(found[0], gradients(encoder)[0], rtol=1e-2)


def test_repeated_passes_change_nothing():
    encoder, parts = Encoder().eval(), torch.randn(6, 6).split(3)
    cached_loss(encoder, parts, loss_of).backward()
    expected, calls = gradients(encoder), []
    encoder.zero_grad()

    def counted(batch: Tensor) -> EncodedRows:
        calls.append(len(batch))
        return encoder(batch)

    cached_loss(counted, parts, loss_of, passes=4).backward()
    assert calls == [3] * 8
    for one, other in zip(gradients(encoder), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_are_shared_with_the_last_part_only():
    encoder, log = Encoder().eval(), []

    @contextmanager
    def no_sync() -> Any:
        log.append("in")
        yield
        log.append("out")

    def logged(batch: Tensor) -> EncodedRows:
        log.append("graph" if torch.is_grad_enabled() else "no graph")
        return encoder(batch)

    cached_loss(logged, torch.randn(9, 6).split(3), loss_of, no_sync=no_sync).backward()
    assert log == ["no graph"] * 3 + ["in", "graph", "out"] * 2 + ["graph"]


def test_nothing_is_kept_without_gradients():
    encoder = Encoder().eval()
    with torch.no_grad():
        loss = cached_loss(encoder, torch.randn(6, 6).split(2), loss_of)
    assert not loss.requires_grad


def step(trainer: NoteLLM2Trainer, seed: int = 3) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of the first batch."""
    # As `Trainer.train` does before its first step: this is where autocast and checkpointing come from.
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    model = trainer.accelerator.prepare(trainer.model.train())
    batch = next(iter(trainer.get_train_dataloader()))
    torch.manual_seed(seed)
    loss = trainer.compute_loss(model, batch)
    trainer.accelerator.backward(loss)
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


SETTINGS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "lora": {"llm_tuning": "lora"},
    "full, gradient checkpointing": {"llm_tuning": "full", "gradient_checkpointing": True},
    "graph batches, hard negatives, matryoshka, modality dropout": {
        "batches": "graph",
        "hard_negatives": 1,
        "matryoshka_dims": [4, 16],
        "text_dropout": 0.2,
        "image_dropout": 0.2,
    },
    "logq, same image": {"logq_correction": True, "mask_same_image": True},
    "bf16": {"llm_tuning": "lora", "bf16": True},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("gradcache", [True, False])
def test_the_trainers_step_is_the_same_in_mini_batches(
    name: str, gradcache: bool, build_trainer: BuildTrainer, build_model: BuildModel
):
    """Both losses, images among the inputs, and the temperature."""
    settings = {"per_device_train_batch_size": 8, "visual_loss_weight": 0.5, **SETTINGS[name]}
    expected_loss, expected = step(build_trainer(build_model(dropout=0.0), **settings))
    watched: list[tuple[torch.dtype, bool]] = []

    def watch(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        watched.append((output.dtype, torch.is_grad_enabled()))

    trainer = build_trainer(build_model(dropout=0.0), mini_batch_size=5, gradcache=gradcache, **settings)
    trainer.model.language_model.layers[0].self_attn.q_proj.register_forward_hook(watch)
    loss, found = step(trainer)
    precise = not settings.get("bf16")
    # The settings were in force: half precision in the LLM, layers run once more, mini-batches encoded twice.
    assert {dtype for dtype, _grad in watched} == {torch.float32 if precise else torch.bfloat16}
    if not settings.get("hard_negatives"):  # mining encodes, too
        mini_batches = -(-len(next(iter(trainer.get_train_dataloader()))["places"]) // 5)
        graphs = mini_batches * (2 if settings.get("gradient_checkpointing") else 1)
        assert [grad for _dtype, grad in watched].count(True) == graphs
        assert [grad for _dtype, grad in watched].count(False) == (mini_batches if gradcache else 0)
    assert loss == pytest.approx(expected_loss, abs=1e-5 if precise else 2e-2)
    assert found.keys() == expected.keys() and {"logit_scale", "image_embedding"} <= found.keys()
    for parameter, gradient in expected.items():
        tolerance = (1e-5 if precise else 0.1) * float(gradient.abs().max()) + (1e-7 if precise else 1e-3)
        torch.testing.assert_close(found[parameter], gradient, atol=tolerance, rtol=1e-3 if precise else 0.1)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
    # Control: another batch has other gradients.
    other = step(build_trainer(build_model(dropout=0.0), mini_batch_size=5, **settings | {"data_seed": 9}))[1]
    assert not torch.allclose(other["head.weight"], expected["head.weight"], rtol=1e-2)


def test_lora_dropout_is_the_same_both_times(build_trainer: BuildTrainer, build_model: BuildModel):
    """Were the second encoding to draw another dropout, two identical runs would still agree; this would not: the
    gradient of a directional derivative, compared with a finite difference under the same random state."""
    settings = {"llm_tuning": "lora", "lora_dropout": 0.3, "mini_batch_size": 4, "per_device_train_batch_size": 6}
    trainer = build_trainer(build_model(), **settings)
    _loss, gradients = step(trainer)
    name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if n == "head.weight")
    direction = gradients[name] / gradients[name].norm()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(sign * 2e-3 * direction)
            batch = next(iter(trainer.get_train_dataloader()))
            torch.manual_seed(3)
            losses.append(trainer.compute_loss(trainer.model.train(), batch).item())
            parameter.sub_(sign * 2e-3 * direction)
    assert (losses[0] - losses[1]) / 4e-3 == pytest.approx(gradients[name].norm().item(), rel=0.03)
