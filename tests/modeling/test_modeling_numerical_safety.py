"""Numbers at their limits: embeddings and gradients stay finite, or an error says what is not."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from modeling_notellm2 import NoteLLM2Model, NoteLLM2Output
from modeling_notellm2.fusion_notellm2 import unit_length
from modeling_notellm2.modeling_notellm2 import MAX_LOGIT_SCALE, StateStandardizer
from tests.backbones import random_picture

Compose = Callable[..., NoteLLM2Model]
Notes = list[dict[str, Any]]

HALVES = [torch.bfloat16, torch.float16]


def objective(output: NoteLLM2Output) -> Tensor:
    """Depends on every embedding, and on each dimension differently."""
    assert output.note_embeds is not None and output.visual_embeds is not None and output.logit_scale is not None
    weights = torch.randn(output.note_embeds.shape[1], generator=torch.Generator().manual_seed(0))
    return ((output.note_embeds + output.visual_embeds) @ weights).sum() * output.logit_scale


def finite_gradients(model: NoteLLM2Model, batch: Any) -> dict[str, Tensor]:
    """The gradients of `objective`, all of which must be finite, and the embeddings, too."""
    output = model.train()(**batch)
    assert output.note_embeds.isfinite().all() and output.visual_embeds.isfinite().all()
    assert output.note_embeds.dtype == output.visual_embeds.dtype == output.logit_scale.dtype == torch.float32
    objective(output).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    broken = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    assert not broken
    return gradients


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_half_precision_gives_float32_near_the_whole(
    compose: Compose, notes: Notes, dtype: torch.dtype, gate: str
) -> None:
    """Weights in half precision, and autocast over whole ones."""
    model = compose(late_fusion=gate)
    expected = torch.from_numpy(np.asarray(model.encode(notes)))
    with torch.autocast("cpu", dtype):
        mixed = model.encode(notes, convert_to_tensor=True)
    half = copy.deepcopy(model).to(dtype)
    for found in (mixed, half.encode(notes, convert_to_tensor=True)):
        assert isinstance(found, Tensor) and found.dtype == torch.float32
        torch.testing.assert_close(found.norm(dim=1), torch.ones(len(notes)), atol=1e-5, rtol=0)
        assert 1e-5 < (found - expected).abs().max() < 0.3  # half precision was at work
    gradients = finite_gradients(half, half.processor(notes))
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("what", ["pictures", "states", "head", "everything"])
def test_zero_vectors_have_no_direction_and_do_no_harm(
    tiny_model: NoteLLM2Model, notes: Notes, what: str, dtype: torch.dtype
) -> None:
    """Of pictures, of the LLM's states, of embeddings: in float16 an epsilon of 1e-12 would be zero, too."""
    batch = tiny_model.processor(notes)
    zeros = {
        "pictures": ["late_fusion.projection.weight"],
        "states": ["language_model.norm.weight"],
        "head": ["head.weight"],
        "everything": ["late_fusion.projection.weight", "language_model.norm.weight"],
    }[what]
    model = tiny_model.to(dtype)
    with torch.no_grad():
        for name in zeros:
            model.get_parameter(name).zero_()
    gradients = finite_gradients(model, batch)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) < 1e4
    norms = model.encode(notes, convert_to_tensor=True).norm(dim=1)  # type: ignore[union-attr]
    is_zero = torch.ones(len(notes), dtype=torch.bool)
    if what == "pictures":  # texts have a direction
        is_zero[:] = False
    elif what == "states":  # and so have pictures
        is_zero = torch.tensor([note.get("image") is None for note in notes])
    torch.testing.assert_close(norms, (~is_zero).float(), atol=1e-5, rtol=0)


def test_the_gradient_of_a_unit_length_is_that_of_finite_differences() -> None:
    """In double precision; and of a zero vector, which has none, it is zero: not 10^12, which would be all that is left
    of the others after clipping."""
    vectors = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for dtype, computed in (
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.float16, torch.float32),
    ):
        embeds = unit_length(vectors.to(dtype))
        assert embeds.dtype == computed
        assert torch.equal(embeds, functional.normalize(vectors.to(dtype).to(computed), dim=-1))
    assert torch.autograd.gradcheck(unit_length, (vectors.clone().requires_grad_(),))
    vectors[1] = 0.0
    vectors[2] *= 1e-20
    gradients = []
    for normalize in (unit_length, lambda some: functional.normalize(some, dim=-1)):
        leaf = vectors.clone().requires_grad_()
        (normalize(leaf) * torch.arange(6)).sum().backward()
        gradients.append(leaf.grad)
    assert not gradients[0][1:3].any() and torch.equal(gradients[0][[0, 3]], gradients[1][[0, 3]])
    assert gradients[1][1:3].abs().max() > 1e11  # control
    assert not unit_length(vectors)[1:3].any()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize(("bias", "weight"), [(200.0, 1.0), (-200.0, 0.0)])
def test_a_gate_may_be_shut_or_wide_open(
    compose: Compose, notes: Notes, gate: str, bias: float, weight: float, dtype: torch.dtype
) -> None:
    model = compose(late_fusion=gate)
    output = model.late_fusion.gate[-1] if gate == "scalar" else model.late_fusion.gate
    with torch.no_grad():
        output.weight.zero_()
        output.bias.fill_(bias)
    model.to(dtype)
    batch = model.processor(notes)
    with torch.no_grad():
        weights = model(**batch).fusion_weight[batch["has_image"]]
    assert (weights == weight).all()
    gradients = finite_gradients(model, batch)
    assert gradients["head.weight"].abs().max() > 1e-3  # what does not go through the gate still learns


@pytest.mark.parametrize("scale", [MAX_LOGIT_SCALE, -MAX_LOGIT_SCALE])
def test_a_temperature_at_a_bound_can_come_back(shared_tiny_model: NoteLLM2Model, scale: float) -> None:
    """Beyond its bounds the parameter changes nothing, and still has the gradient that takes it back."""
    model = copy.deepcopy(shared_tiny_model)
    for beyond in (scale, scale * 1.5, scale * 20, scale * 1e6):
        model.logit_scale.grad = None
        with torch.no_grad():
            model.logit_scale.fill_(beyond)
        found = model._scale()
        found.backward()
        assert float(found) == pytest.approx(100.0 ** (1 if scale > 0 else -1), rel=1e-5)
        assert float(model.logit_scale.grad) == pytest.approx(float(found)) and model.temperature > 0
    within = torch.linspace(-4.5, 4.5, 7, dtype=torch.float64)
    for value in within.tolist():  # in between the scale is the exponential, and so is its gradient
        model.logit_scale.grad = None
        with torch.no_grad():
            model.logit_scale.fill_(value)
        found = model._scale()
        found.backward()
        expected = torch.tensor(value, dtype=torch.float64).exp().item()
        assert float(found) == pytest.approx(expected) and float(model.logit_scale.grad) == pytest.approx(expected)


def test_standardizers_of_degenerate_states() -> None:
    torch.manual_seed(0)
    constant = torch.randn(40, 6)
    constant[:, 2] = 3.0  # of one dimension alone: there is one scale for all
    standardizer = StateStandardizer(6)
    standardizer.fit(constant)
    found = standardizer(constant)
    assert found.isfinite().all() and found[:, 2].abs().max() < 1e-5 and found.square().mean() > 0.5
    with pytest.raises(ValueError, match="the states of 1 notes do not differ"):
        StateStandardizer(6).fit(constant[:1])
    for value in (torch.nan, torch.inf):
        broken = constant.clone()
        broken[3, 1] = broken[7, 0] = value
        with pytest.raises(ValueError, match="the states of 2 of 40 notes hold NaN or infinity"):
            StateStandardizer(6).fit(broken)
    tiny = 1e-40 * constant  # 1 / deviation would be infinite in float32
    with pytest.raises(ValueError, match="do not differ"):
        StateStandardizer(6).fit(tiny)
    opposite = torch.cat([constant[:1], -constant[:1]])  # the mean is zero, and they are measured all the same
    standardizer = StateStandardizer(6)
    assert not standardizer.is_fitted
    standardizer.fit(opposite)
    assert not standardizer.mean.any() and standardizer.is_fitted


def test_one_note_of_one_token_and_empty_fields_are_packed(tiny_model: NoteLLM2Model) -> None:
    """The shortest that there is, beside a longer one; and a picture without a word."""
    ids, mask = torch.tensor([[5, 0, 0], [5, 6, 7]]), torch.tensor([[1, 0, 0], [1, 1, 1]])
    with torch.no_grad():
        both = tiny_model(input_ids=ids, attention_mask=mask).note_embeds
        one = tiny_model(input_ids=ids[:1, :1], attention_mask=mask[:1, :1]).note_embeds
    torch.testing.assert_close(both[:1], one, atol=1e-5, rtol=0)
    assert (both[0] - both[1]).abs().max() > 1e-3
    empty = {"title": "", "topics": [], "content": "", "image": random_picture(3)}
    alone = tiny_model.encode([empty])
    np.testing.assert_allclose(tiny_model.encode([empty, {"title": "oak"}])[:1], alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-5)


def test_more_tokens_than_an_llm_has_positions_are_refused(compose: Compose) -> None:
    """GPT-2 looks positions up in a table: on an accelerator, a place beyond it would end the process."""
    note = {"content": "oak shelf " * 600}
    model = compose("gpt2", processor={"max_content_tokens": 3000})
    with pytest.raises(
        ValueError, match=r"prompt has \d+ tokens, and the LLM knows 512 positions: lower the processor"
    ):
        model.encode([note])
    assert np.isfinite(compose("gpt2").encode([note])).all()  # control: cut to what it has
    assert compose("llama")._max_tokens is None  # rotary positions have no end


@pytest.mark.parametrize("limit", [24, 3000])
def test_a_hundred_thousand_tokens_are_cut_field_by_field(compose: Compose, limit: int) -> None:
    """By the processor's limits, small or large; what comes after them changes nothing."""
    model = compose("llama", processor={"max_content_tokens": limit, "max_title_tokens": 8})
    text = " ".join(f"oak{number % 97}" for number in range(50_000))
    note = {"title": text, "content": text, "image": random_picture(0)}
    encoded = model.processor.encode_note(note)
    assert sum(encoded.text_mask) == limit + 8 and len(model.processor._text_ids(text, None)) > 100_000
    embeds = np.asarray(model.encode([note, {**note, "content": text[:-100] + "another end"}]))
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(embeds[0], embeds[1], atol=1e-6)
    assert np.abs(embeds[0] - model.encode([{**note, "content": "short"}])).max() > 1e-3  # control: content matters
