"""Standardized states: what is measured, what is kept, and what reads them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from modeling_notellm2 import NoteLLM2Model
from modeling_notellm2.modeling_notellm2 import StateStandardizer
from tests.backbones import save

Compose = Callable[..., NoteLLM2Model]
Notes = list[dict[str, Any]]


def fitted(compose: Compose, notes: Notes, **config: Any) -> NoteLLM2Model:
    model = compose(standardize_states=True, **config)
    with torch.no_grad():
        model.fit_standardizers(model.get_states(**model.processor(notes)))
    return model


def test_mean_zero_and_one_scale_for_all_dimensions() -> None:
    torch.manual_seed(0)
    states = 7 + torch.randn(500, 3) * torch.tensor([0.1, 1.0, 5.0])
    standardizer = StateStandardizer(3)
    assert torch.equal(standardizer(states), states) and not standardizer.is_fitted
    standardizer.fit(states)
    found = standardizer(states)
    torch.testing.assert_close(found.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert found.square().mean().sqrt().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(found.std(0) / found.std(0)[0], states.std(0) / states.std(0)[0])  # not each its own
    assert standardizer.is_fitted and standardizer(states.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="the states of 4 notes do not differ"):
        standardizer.fit(torch.ones(4, 3))


def test_head_and_gate_read_the_standardized_states_of_each_position(compose: Compose, notes: Notes) -> None:
    """Two models of the same weights: one standardizes; the other is given standardized states."""
    plain, model = compose(), fitted(compose, notes)
    assert torch.equal(plain.head.weight, model.head.weight)
    with torch.no_grad():
        states = plain.get_states(**plain.processor(notes))
        assert states.visual_states is not None
        images = states.has_visual
        n_m, n_v, pooled = states.note_states, states.visual_states, states.pooled_embeds
        assert pooled is not None
        moved_n_m, moved_n_v, moved = n_m - n_m.mean(0), n_v - n_v[images].mean(0), pooled - pooled.mean(0)
        expected = plain.embed_states(
            states._replace(
                note_states=moved_n_m / moved_n_m.square().mean().sqrt(),
                visual_states=moved_n_v / moved_n_v[images].square().mean().sqrt(),
                pooled_embeds=moved / moved.square().mean().sqrt(),
            )
        )
        model.pooled_standardizer.reset_parameters()  # control: it takes part
        without = model(**model.processor(notes))
        model.fit_standardizers(states)
        found, untouched = model(**model.processor(notes)), plain(**plain.processor(notes))
    torch.testing.assert_close(found.note_embeds, expected.note_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.visual_embeds, expected.visual_embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.fusion_weight, expected.fusion_weight, atol=1e-5, rtol=1e-5)
    assert (found.note_embeds - untouched.note_embeds).abs().max() > 0.05
    assert (found.note_embeds - without.note_embeds).abs().max() > 1e-3
    assert (found.fusion_weight - untouched.fusion_weight).abs().max() > 1e-4


def test_a_checkpoint_keeps_what_was_measured(compose: Compose, notes: Notes, tmp_path: Path) -> None:
    model = fitted(compose, notes)
    loaded = AutoModel.from_pretrained(save(model, tmp_path / "model"))
    for name in ("note", "visual", "pooled"):
        assert getattr(loaded, f"{name}_standardizer").is_fitted
    torch.testing.assert_close(loaded.encode(notes), model.encode(notes), atol=1e-6, rtol=0)
    with torch.no_grad():
        loaded.note_standardizer.mean.zero_()
    assert abs(loaded.encode(notes) - model.encode(notes)).max() > 0.01


def test_without_it_nothing_is_kept_or_measured(compose: Compose, notes: Notes) -> None:
    model = compose()
    before = model.encode(notes)
    model.fit_standardizers(model.get_states(**model.processor(notes)))
    assert not [name for name in model.state_dict() if "standardizer" in name]
    assert (model.encode(notes) == before).all()


def test_a_model_without_visual_tokens_has_no_second_mean(compose: Compose, notes: Notes) -> None:
    model = fitted(compose, notes, connector=None, processor={"prompt": "text"})
    assert model.visual_standardizer is None and model.note_standardizer.is_fitted


def test_a_model_without_late_fusion_has_no_mean_of_pictures(compose: Compose, notes: Notes) -> None:
    model = fitted(compose, notes, late_fusion=None)
    assert model.pooled_standardizer is None and model.visual_standardizer.is_fitted


def test_states_that_differ_by_rounding_alone_are_refused() -> None:
    same = torch.full((50, 8), 3.0)
    for states in (same, same + 1e-7 * torch.randn(50, 8), torch.zeros(0, 8)):
        standardizer = StateStandardizer(8)
        with pytest.raises(ValueError, match=f"the states of {len(states)} notes do not differ"):
            standardizer.fit(states)
        assert not standardizer.is_fitted
    StateStandardizer(8).fit(same + 1e-3 * torch.randn(50, 8))


def test_one_image_is_no_reason_to_refuse_the_texts(
    compose: Compose, notes: Notes, caplog: pytest.LogCaptureFixture
) -> None:
    model = fitted(compose, [notes[0], notes[1]])
    assert model.note_standardizer.is_fitted and not model.visual_standardizer.is_fitted
    for name in ("n_v", "pooled_embeds"):
        assert f"{name} are left as they are: the states of 1 notes" in caplog.text


def test_bfloat16_does_not_round_the_mean(compose: Compose, notes: Notes, tmp_path: Path) -> None:
    model = fitted(compose, notes)
    loaded = AutoModel.from_pretrained(save(model, tmp_path / "model"), dtype=torch.bfloat16)
    assert torch.equal(loaded.note_standardizer.mean, model.note_standardizer.mean)
    assert loaded.head.weight.dtype == torch.bfloat16
    assert not torch.equal(model.note_standardizer.mean.bfloat16().float(), model.note_standardizer.mean)
