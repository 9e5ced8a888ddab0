"""Late fusion, recomputed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from modeling_notellm2 import NoteLLM2Model
from modeling_notellm2.fusion_notellm2 import LateFusion
from tests.backbones import random_picture

Compose = Callable[..., NoteLLM2Model]
Notes = list[dict[str, Any]]


@pytest.mark.parametrize("weight", [0.02, 0.1, 0.7])
def test_the_scalar_gate_starts_exactly_at_its_initial_weight(compose: Compose, notes: Notes, weight: float) -> None:
    model = compose(moved=False, late_fusion_initial_weight=weight)
    with torch.no_grad():
        got = model(**model.processor(notes)).fusion_weight.squeeze(1)
    expected = torch.tensor([0.0 if note.get("image") is None else weight for note in notes])
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-6)


def test_the_vector_gate_starts_there_on_average(compose: Compose) -> None:
    model = compose(moved=False, late_fusion="vector", late_fusion_initial_weight=0.3)
    visual, states = torch.randn(2, 4000, model.config.hidden_size)
    with torch.no_grad():
        logits = torch.logit(model.late_fusion.weight(visual, states))
    assert logits.mean().item() == pytest.approx(torch.logit(torch.tensor(0.3)).item(), abs=0.02)
    assert logits.std() > 0.3  # the paper's matrix, not a constant


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("prompt", ["micl", "basic"])
def test_the_formula(compose: Compose, notes: Notes, gate: str, normalize: bool, prompt: str) -> None:
    """w = σ(gate([v; n_v])) and w·v + (1−w)·n for n_m and n_v; without mICL n_m stands in for n_v."""
    model = compose(late_fusion=gate, late_fusion_normalize=normalize, processor={"prompt": prompt})
    model.language_model.set_attn_implementation("sdpa")  # the places of a packed batch are others
    batch = model.processor(notes)
    states: list[Tensor] = []
    handle = model.language_model.register_forward_hook(lambda _, __, output: states.append(output.last_hidden_state))
    with torch.no_grad():
        output = model(**batch)
        pooled = iter(model.get_image_features(batch["pixel_values"]).pooled_embeds)
    handle.remove()

    def scaled(x: Tensor) -> Tensor:
        return x / x.norm() * x.numel() ** 0.5 if normalize else x

    fusion = model.late_fusion
    for row, note in enumerate(notes):
        n_m = states[0][row, int(batch["attention_mask"][row].sum()) - 1]
        if note.get("image") is None:
            assert not output.fusion_weight[row].any()
            torch.testing.assert_close(output.note_embeds[row], functional.normalize(model.head(n_m), dim=0))
            continue
        tokens = batch["input_ids"][row].tolist()
        n_v = n_m
        if prompt == "micl":
            n_v = states[0][row, tokens.index(model.config.image_embedding_token_id) - 1]
        v = scaled(fusion.projection.weight @ next(pooled))
        both = torch.cat([v, scaled(n_v)])
        if gate == "scalar":
            first, _, second = fusion.gate
            w = torch.sigmoid(second(functional.gelu(first(both))))
        else:
            w = torch.sigmoid(fusion.gate.weight @ both + fusion.gate.bias)
        torch.testing.assert_close(output.fusion_weight[row], w)
        embed = functional.normalize(model.head(w * v + (1 - w) * scaled(n_m)), dim=0)
        torch.testing.assert_close(output.note_embeds[row], embed)
        if prompt == "micl":
            embed = functional.normalize(model.head(w * v + (1 - w) * scaled(n_v)), dim=0)
            torch.testing.assert_close(output.visual_embeds[row], embed)
    assert (output.visual_embeds is None) == (prompt == "basic")


def test_the_gate_is_not_constant_once_it_has_learned(shared_tiny_model: NoteLLM2Model) -> None:
    batch = shared_tiny_model.processor([{"title": "oak", "image": random_picture(i)} for i in range(4)])
    with torch.no_grad():
        weights = shared_tiny_model(**batch).fusion_weight
    assert weights.std() > 1e-4 and ((weights > 0) & (weights < 1)).all()


def test_a_note_without_image_is_the_same_through_the_text_only_path(
    shared_tiny_model: NoteLLM2Model, compose: Compose, notes: Notes
) -> None:
    """Weight 0 means the LLM's own state: the fusion's parameters and the neighbours' images leave no trace."""
    text_only = compose(tower=None)
    text_only.language_model.load_state_dict(shared_tiny_model.language_model.state_dict())
    text_only.head.load_state_dict(shared_tiny_model.head.state_dict())
    texts = [{**note, "image": None} for note in notes if note["note_id"] != "image"]
    expected = torch.from_numpy(text_only.encode(texts))
    torch.testing.assert_close(torch.from_numpy(shared_tiny_model.encode(texts)), expected, atol=1e-5, rtol=0)
    mixed = shared_tiny_model.encode([texts[0], {"image": random_picture(0)}, texts[1]])
    torch.testing.assert_close(torch.from_numpy(mixed[[0, 2]]), expected[:2], atol=1e-5, rtol=0)


def test_the_gate_trains(tiny_model: NoteLLM2Model, notes: Notes) -> None:
    tiny_model.train()(**tiny_model.processor(notes)).note_embeds[:, 0].sum().backward()
    fusion = tiny_model.late_fusion
    assert isinstance(fusion, LateFusion)
    for name, parameter in fusion.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
