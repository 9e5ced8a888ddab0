"""Composition: one command from two backbones to a checkpoint."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModel, AutoProcessor

from hub.compose import CompositionArguments, compose, main, save_checkpoint
from modeling_notellm2.processing_notellm2 import prompt_template

SMALL = {"num_visual_tokens": 2, "qformer_layers": 1, "qformer_hidden_size": 64, "embedding_dim": 8}
NOTE = {"title": "Oak shelf", "image": np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)}


@pytest.fixture
def arguments(
    llm_folder: Callable[[str], Path], tower_folder: Callable[[str], Path]
) -> Callable[..., CompositionArguments]:
    def build(**settings: object) -> CompositionArguments:
        backbones = {"llm": str(llm_folder("llama")), "vision": str(tower_folder("clip"))}
        return CompositionArguments(**{**backbones, **SMALL, **settings})  # type: ignore[arg-type]

    return build


def test_command_writes_a_checkpoint_with_its_code(
    llm_folder: Callable[[str], Path],
    tower_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    options = ["--llm", str(llm_folder("llama")), "--vision", str(tower_folder("clip")), "--output", str(tmp_path)]
    main([*options, "--embedding_dim", "8", "--qformer_hidden_size", "64", "--qformer_layers", "1"])
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= names
    assert {"modeling_notellm2.py", "processing_notellm2.py", "configuration_notellm2.py"} <= names
    assert "hub.verify" in capsys.readouterr().out
    assert AutoModel.from_pretrained(tmp_path).encode([NOTE]).shape == (1, 8)
    assert AutoProcessor.from_pretrained(tmp_path).prompt == "micl"


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt": "basic", "late_fusion": "none"},
        {"prompt": "text"},
        {"vision": ""},
        {"connector": "mlp", "late_fusion": "vector", "language": "zh"},
        {"num_text_layers": 1, "embedding_dim": 0},
        {"standardize_states": True},
        {"template": "compact"},
    ],
    ids=str,
)
def test_variants_are_settings_and_survive_saving(
    settings: dict, arguments: Callable[..., CompositionArguments], tmp_path: Path
):
    model = compose(arguments(**settings))
    save_checkpoint(model, tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    notes = [{"title": "Oak shelf"}, {**NOTE, "content": "blue"}]
    np.testing.assert_allclose(loaded.encode(notes), model.encode(notes), atol=1e-5)
    assert loaded.processor.prompt == ("text" if settings.get("vision") == "" else settings.get("prompt", "micl"))
    assert loaded.processor.to_dict() == model.processor.to_dict()
    is_compact = loaded.processor.text_template == "In one word\n{title}\n{topics}\n{content}:"
    assert is_compact == ("template" in settings)
    if settings.get("prompt") == "text":
        assert loaded.connector is None and loaded.late_fusion is not None
    if "num_text_layers" in settings:
        assert len(loaded.language_model.layers) == 1 and loaded.encode(notes).shape[1] == model.config.hidden_size


def test_same_seed_same_model(arguments: Callable[..., CompositionArguments]):
    first, again, other = (compose(arguments(composition_seed=seed)).encode([NOTE]) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"llm": None}, "llm is missing"),
        ({"num_text_layers": 9}, "num_text_layers=9"),
        ({"qformer_hidden_size": 100}, "qformer_hidden_size=100"),
        ({"late_fusion_initial_weight": 1.0}, "late_fusion_initial_weight=1.0"),
        ({"multimodal_llm": "one"}, "multimodal_llm='one' with llm="),
        ({"multimodal_llm": "one", "llm": None, "vision": "", "num_text_layers": 3}, "num_text_layers=3"),
        ({"max_image_pixels": 900}, "max_image_pixels=900 without multimodal_llm"),
    ],
)
def test_bad_settings_are_named(settings: dict, message: str, arguments: Callable[..., CompositionArguments]):
    with pytest.raises(ValueError, match=message):
        compose(arguments(**settings))


def test_backbones_of_another_kind_are_named(
    arguments: Callable[..., CompositionArguments],
    llm_folder: Callable[[str], Path],
    tower_folder: Callable[[str], Path],
):
    with pytest.raises(ValueError, match="llm='.*' is a 'clip_vision_model', no decoder LLM: give one such as"):
        compose(arguments(llm=str(tower_folder("clip"))))
    with pytest.raises(ValueError, match="vision='.*' is a 'llama', no vision tower: give a tower such as"):
        compose(arguments(vision=str(llm_folder("llama"))))


def test_a_checkpoint_of_another_model_is_refused(llm_folder: Callable[[str], Path]):
    with pytest.raises(ValueError, match="is a LlamaModel: give a NoteLLM-2 checkpoint"):
        compose(CompositionArguments(model=str(llm_folder("llama"))))


@pytest.mark.parametrize("name", ["blip-2", "qwen3_vl"])
def test_a_multimodal_llm_takes_the_place_of_both_backbones(
    name: str, multimodal_llm_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = str(multimodal_llm_folder(name))
    main(["--multimodal_llm", folder, "--output", str(tmp_path), "--embedding_dim", "8", "--max_content_tokens", "5"])
    assert "hub.verify" not in capsys.readouterr().out  # its code cannot go with it
    arguments = CompositionArguments(multimodal_llm=folder, embedding_dim=8, max_content_tokens=5)
    compact = compose(replace(arguments, template="compact")).processor
    assert compact.text_template == prompt_template("text", "en", "compact")
    in_front, inside = "<IMG>" + compact.text_template, prompt_template("basic", "en", "compact")
    assert compact.template == (in_front if name == "blip-2" else inside)
    notes = [NOTE, {"content": "a blue hat and red shoes " * 5}]
    expected = compose(arguments).encode(notes)
    loaded = compose(CompositionArguments(model=str(tmp_path)))
    np.testing.assert_allclose(loaded.encode(notes), expected, atol=1e-5)
    assert loaded.processor.max_content_tokens == 5
    other = compose(CompositionArguments(multimodal_llm=folder, embedding_dim=8, composition_seed=1)).encode(notes)
    assert np.abs(other - expected).max() > 1e-3


def test_command_ends_with_a_message_not_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["--output", str(tmp_path)])
    assert stopped.value.code == 2 and "llm is missing" in capsys.readouterr().err
