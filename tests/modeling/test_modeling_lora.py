"""LoRA adapters: part of the model, of its config and of every checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from modeling_notellm2 import NoteLLM2Model
from tests.backbones import save

Notes = list[dict[str, Any]]


def move_adapters(model: NoteLLM2Model) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)


@pytest.mark.parametrize("llm", ["llama", "phi3", "gpt2"])
def test_add_save_load_merge(compose: Callable[..., NoteLLM2Model], notes: Notes, tmp_path: Path, llm: str) -> None:
    model = compose(llm)
    plain = model.encode(notes)
    model.add_lora(r=4, target_modules="all-linear", fan_in_fan_out=llm == "gpt2")
    np.testing.assert_allclose(model.encode(notes), plain, atol=1e-5)  # B starts at zero
    move_adapters(model)
    adapted = model.encode(notes)
    assert np.abs(adapted - plain).max() > 1e-2
    trained = {name for name, p in model.language_model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)

    loaded = AutoModel.from_pretrained(save(model, tmp_path / "adapted"))
    np.testing.assert_allclose(loaded.encode(notes), adapted, atol=1e-5)
    assert {name for name, p in loaded.language_model.named_parameters() if p.requires_grad} == trained

    loaded.merge_lora()
    np.testing.assert_allclose(loaded.encode(notes), adapted, atol=1e-5)
    assert loaded.config.lora is None and not any("lora" in name for name in loaded.state_dict())
    merged = AutoModel.from_pretrained(save(loaded, tmp_path / "merged"))
    np.testing.assert_allclose(merged.encode(notes), adapted, atol=1e-5)
    merged.add_lora(r=2, target_modules="all-linear", fan_in_fan_out=llm == "gpt2")
    np.testing.assert_allclose(merged.encode(notes), adapted, atol=1e-5)


def test_adapters_get_gradients_and_the_llm_none(tiny_model: NoteLLM2Model, notes: Notes) -> None:
    tiny_model.add_lora(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    move_adapters(tiny_model)
    tiny_model.train()(**tiny_model.processor(notes)).note_embeds[:, 0].sum().backward()
    for name, parameter in tiny_model.language_model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
    assert tiny_model.image_embedding.grad is not None


def test_adding_twice_and_merging_nothing_are_refused(tiny_model: NoteLLM2Model) -> None:
    with pytest.raises(ValueError, match="no LoRA adapters to merge"):
        tiny_model.merge_lora()
    tiny_model.add_lora(r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="has LoRA adapters already: call merge_lora"):
        tiny_model.add_lora(r=2, target_modules=["q_proj"])
    tiny_model.merge_lora()
    tiny_model.add_lora(r=2, target_modules=["k_proj"])
