"""A model's fingerprint is of all that decides on an embedding, and of nothing else."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, LlamaConfig

from hub.card import CardOptions
from hub.export import export
from hub.fingerprint import _LATER_SETTINGS, model_fingerprint
from modeling_notellm2 import NoteLLM2Config, NoteLLM2Model
from tests.backbones import save


def test_a_fingerprint_is_of_what_is_stored(tiny_checkpoint: Path, tmp_path: Path, tiny_model: NoteLLM2Model):
    """It does not depend on the dtype that the weights are loaded in, on how they are divided into files or on where a
    model was."""
    model = AutoModel.from_pretrained(tiny_checkpoint)
    expected = model_fingerprint(model)
    assert model_fingerprint(AutoModel.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)) == expected
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    model.processor.save_pretrained(tmp_path)
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    save_file({"of_before": torch.ones(1)}, tmp_path / "model-of-before.safetensors")  # the index does not name it
    assert model_fingerprint(AutoModel.from_pretrained(tmp_path)) == expected
    # Control: weights that are stored in another dtype are others.
    model.to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    model.processor.save_pretrained(tmp_path / "rounded")
    assert model_fingerprint(AutoModel.from_pretrained(tmp_path / "rounded", dtype=torch.float32)) != expected
    with pytest.raises(ValueError, match="not loaded from a checkpoint"):
        model_fingerprint(tiny_model)
    shards[0].unlink()
    model.name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match=f"lacks weights .*{shards[0].name}"):
        model_fingerprint(model)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no processor_config\.json: save the model and its processor"):
        model_fingerprint(model)


def change_file(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))


def test_a_fingerprint_is_of_no_place_and_no_release(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What says where parts were and what saved them may differ, and so may what the classes of another release have
    besides, in transformers and here."""
    expected = model_fingerprint(AutoModel.from_pretrained(tiny_checkpoint))
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "moved")

    def move_config(stored: dict[str, Any]) -> None:
        assert stored["standardize_states"] is False  # which a checkpoint of the first release has not
        del stored["standardize_states"]
        stored |= {"transformers_version": "5.6.0", "auto_map": {"AutoModel": "org/other--modeling.NoteLLM2Model"}}
        stored["text_config"]["_name_or_path"] = "org/llm"
        stored["vision_config"]["transformers_version"] = "4.0"

    def move_processor(stored: dict[str, Any]) -> None:
        stored["auto_map"] = {"AutoProcessor": "org/other--processing.NoteLLM2Processor"}

    def save_otherwise(stored: dict[str, Any]) -> None:
        stored |= {"is_local": False, "eos_token": {"__type": "AddedToken", "content": stored["eos_token"]}}

    change_file(folder / "config.json", move_config)
    change_file(folder / "processor_config.json", move_processor)
    change_file(folder / "tokenizer_config.json", save_otherwise)
    assert model_fingerprint(AutoModel.from_pretrained(folder)) == expected

    initialise = LlamaConfig.__init__

    def with_a_new_default(config: LlamaConfig, **settings: Any) -> None:
        initialise(config, **{"setting_of_tomorrow": 1, **settings})

    monkeypatch.setattr(LlamaConfig, "__init__", with_a_new_default)
    model = AutoModel.from_pretrained(folder)
    assert model.config.text_config.setting_of_tomorrow == 1 and model_fingerprint(model) == expected


FIRST_SETTINGS = frozenset(
    """text_config vision_config connector qformer_config num_visual_tokens image_token_id image_embedding_token_id
    late_fusion late_fusion_initial_weight late_fusion_normalize late_fusion_hidden_size embedding_dim
    initial_temperature learnable_temperature freeze_vision_tower lora initializer_range""".split()
)
"""Of the first release. A new setting does not belong here: a checkpoint of that release has none of its name."""


def unlisted_settings(config_class: type[NoteLLM2Config]) -> set[str]:
    """Settings of which a fingerprint does not know what they were before they had a name."""
    return set(inspect.signature(config_class.__init__).parameters) - {"self", "kwargs", *FIRST_SETTINGS}


def test_every_setting_of_a_later_release_has_its_former_value():
    """Otherwise a checkpoint that is saved anew gets another fingerprint, and its folders of embeddings are refused."""
    assert unlisted_settings(NoteLLM2Config) == set(_LATER_SETTINGS), "say in hub.fingerprint._LATER_SETTINGS"
    assert not FIRST_SETTINGS & set(_LATER_SETTINGS)

    class Tomorrow(NoteLLM2Config):
        def __init__(self, late_fusion: Any = "scalar", standardize_states: bool = False, tomorrow: int = 1) -> None:
            super().__init__(late_fusion=late_fusion, standardize_states=standardize_states)

    assert unlisted_settings(Tomorrow) == {"tomorrow", "standardize_states"}  # control: a new one is seen


@pytest.mark.parametrize("has_lora", [False, True])
def test_an_export_is_the_same_model(has_lora: bool, tiny_model: NoteLLM2Model, tmp_path: Path):
    """Adapters that are merged make other weights."""
    if has_lora:
        tiny_model.add_lora(r=2, target_modules=["q_proj"])
    checkpoint = save(tiny_model, tmp_path / "checkpoint")
    for keep_lora in (True, False):
        export(checkpoint, tmp_path / str(keep_lora), CardOptions(name="Notes"), keep_lora=keep_lora)
    first, kept, merged = (
        model_fingerprint(AutoModel.from_pretrained(tmp_path / name)) for name in ("checkpoint", "True", "False")
    )
    assert first == kept and (first == merged) is not has_lora


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"late_fusion_normalize": False}),
        ("processor_config.json", {"max_title_tokens": 31}),
        ("processor_config.json", {"text_template": "{title}, {topics}, {content} in a word:"}),
        ("processor_config.json", {"image_processor": {"image_mean": [0.5, 0.5, 0.5]}}),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}),
        ("tokenizer_config.json", {"bos_token": "<|im_start|>"}),
    ],
)
def test_a_fingerprint_is_of_all_that_decides(file: str, change: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "changed")
    stored = json.loads((folder / file).read_text())
    for name, value in change.items():
        assert stored.get(name) != value
        stored[name] = stored[name] | value if name == "image_processor" else value
    (folder / file).write_text(json.dumps(stored))
    before, after = (model_fingerprint(AutoModel.from_pretrained(path)) for path in (tiny_checkpoint, folder))
    assert before != after
