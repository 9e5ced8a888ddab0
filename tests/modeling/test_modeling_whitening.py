"""Whitening: what it does to states, that it is off until fitted, and that it stays a matter of each note alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from modeling_notellm2 import NoteLLM2Model
from modeling_notellm2.whitening_notellm2 import SHRINKAGE, Whitener
from tests.backbones import save

Notes = list[dict[str, Any]]
Compose = Callable[..., NoteLLM2Model]


def narrow_states(rows: int = 400, width: int = 6) -> torch.Tensor:
    """Random states like an LLM's: one large common direction, correlated dimensions of unlike scale."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(-2, 1, width)
    return torch.randn(rows, width, generator=generator) @ mixing + 30.0


def test_fitted_states_are_centred_and_uncorrelated():
    states = narrow_states()
    assert torch.nn.functional.cosine_similarity(states[:200], states[200:]).mean() > 0.8  # the trouble it is for
    whitener = Whitener(6)
    whitener.fit(states)
    white = whitener(states)
    torch.testing.assert_close(white.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    # ZCA-cor with shrinkage: in the eigenvectors of the correlations R, variance λ becomes λ / ((1 − s)·λ + s).
    values, vectors = torch.linalg.eigh(torch.corrcoef(states.T.double()))
    expected = vectors * (values / ((1 - SHRINKAGE) * values + SHRINKAGE)) @ vectors.T
    torch.testing.assert_close(torch.cov(white.T.double(), correction=0), expected, atol=1e-3, rtol=0)
    assert (torch.cov(states.T.double(), correction=0) - expected).abs().max() > 0.1


def test_unfitted_changes_nothing_and_constant_dimensions_stay_finite():
    states = narrow_states()
    whitener = Whitener(6)
    torch.testing.assert_close(whitener(states), states)
    states[:, 2] = 5.0
    whitener.fit(states)
    white = whitener(states)
    assert torch.isfinite(white).all() and white[:, 2].abs().max() < 1e-4


def test_model_measures_each_of_its_three_inputs(compose: Compose, notes: Notes):
    model = compose()
    before = model.encode(notes)
    model.train()
    model.fit_whitening([model.processor(notes[:4]), model.processor(notes[2:])])
    assert model.training
    whiteners = [model.note_whitener, model.visual_whitener, model.late_fusion.whitener]
    for whitener in whiteners:
        assert not torch.equal(whitener.matrix, torch.eye(len(whitener.mean)))
    assert np.abs(model.encode(notes) - before).max() > 1e-3
    # n_m of the very notes it was fitted on, whitened, is centred.
    batch = model.processor(notes[:4] + notes[2:])
    features = model.eval().get_image_features(batch["pixel_values"])
    with torch.no_grad():
        states = model.get_states(batch["input_ids"], batch["attention_mask"], features, batch["has_image"])
        white = model.note_whitener(states.note_states)
    torch.testing.assert_close(white.mean(0), torch.zeros_like(white[0]), atol=1e-3, rtol=0)


def test_fitted_model_saves_loads_and_ignores_neighbours(compose: Compose, notes: Notes, tmp_path: Path):
    model = compose()
    model.fit_whitening([model.processor(notes)])
    embeds = model.encode(notes)
    np.testing.assert_allclose(model.encode(notes, batch_size=1), embeds, atol=1e-5)
    np.testing.assert_allclose(model.encode(notes[::-1])[::-1], embeds, atol=1e-5)
    loaded = AutoModel.from_pretrained(save(model, tmp_path))
    np.testing.assert_allclose(loaded.encode(notes), embeds, atol=1e-5)


def test_can_be_left_out(compose: Compose, notes: Notes):
    model = compose(whiten=False)
    assert not [name for name, _ in model.named_buffers() if "whitener" in name]
    with pytest.raises(ValueError, match="whiten=False"):
        model.fit_whitening([model.processor(notes)])
    for batches in ([], [model.processor(notes[:1])]):
        with pytest.raises(ValueError, match="at least two"):
            compose().fit_whitening(batches)
