"""The config refuses what cannot be, survives saving, and neither it nor the model touches the network."""

import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import modeling_notellm2
from modeling_notellm2 import NoteLLM2Config, NoteLLM2Model, NoteLLM2Processor
from tests.backbones import QFORMER, TOWERS, random_picture


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"connector": "perceiver"}, "connector='perceiver' is unknown: choose one of ('qformer', 'mlp') or None"),
        ({"late_fusion": "sum"}, "late_fusion='sum' is unknown: choose one of ('scalar', 'vector') or None"),
        ({"late_fusion_initial_weight": 0.0}, "late_fusion_initial_weight=0.0 must lie strictly between 0 and 1"),
        ({"late_fusion_initial_weight": 1.0}, "late_fusion_initial_weight=1.0 must lie strictly between 0 and 1"),
        ({"initial_temperature": 0.0}, "initial_temperature=0.0 must lie between 0.01 and 100"),
        ({"initial_temperature": -1.0}, "initial_temperature=-1.0 must lie between 0.01 and 100"),
        ({"initial_temperature": float("nan")}, "initial_temperature=nan must lie between 0.01 and 100"),
        ({"initial_temperature": float("inf")}, "initial_temperature=inf must lie between 0.01 and 100"),
        ({"num_visual_tokens": 0}, "num_visual_tokens=0 must lie between 1"),
        ({"embedding_dim": 0}, "embedding_dim=0 must lie between 1"),
        ({"text_config": {"hidden_size": 8}}, "configuration needs `model_type`"),
    ],
)
def test_bad_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        NoteLLM2Config(**settings)


@pytest.mark.parametrize("tower", [None, "clip", "siglip2", "convnext", "timm_cnn"])
def test_save_and_load(tower: str | None, tmp_path: Path) -> None:
    config = NoteLLM2Config(
        text_config={"model_type": "gemma3_text", "hidden_size": 32, "num_attention_heads": 4},
        vision_config=None if tower is None else TOWERS[tower]()[0],
        qformer_config=QFORMER,
        connector="mlp",
        late_fusion="vector",
        embedding_dim=None,
        image_token_id=7,
        image_embedding_token_id=8,
        lora={"r": 4, "target_modules": ["q_proj"]},
        initial_temperature=0.1,
        learnable_temperature=False,
        freeze_vision_tower=False,
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is NoteLLM2Config
    of_a_folder = {"auto_map": None, "_name_or_path": None}
    assert {**loaded.to_dict(), **of_a_folder} == {**config.to_dict(), **of_a_folder}
    assert loaded.qformer_config.encoder_hidden_size == config.qformer_config.encoder_hidden_size
    for name in ("vision_config", "text_config"):
        ours, theirs = getattr(config, name), getattr(loaded, name)
        assert type(ours) is type(theirs) and (ours is None or ours.to_dict() == theirs.to_dict())


def test_the_qformer_reads_the_towers_width() -> None:
    config = NoteLLM2Config(vision_config=TOWERS["clip"]()[0], qformer_config={"encoder_hidden_size": 999})
    assert config.qformer_config.encoder_hidden_size == config.vision_hidden_size == 24


def test_widths_without_a_tower_or_without_a_name() -> None:
    with pytest.raises(ValueError, match="vision_config=None"):
        _ = NoteLLM2Config().vision_hidden_size
    assert not NoteLLM2Config().has_vision
    nameless = TOWERS["timm_cnn"]()[0]
    del nameless.num_features
    with pytest.raises(ValueError, match="'timm_wrapper' names none of hidden_sizes, hidden_size, num_features"):
        NoteLLM2Config(vision_config=nameless)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("the network was touched")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("tower", ["clip", "timm_cnn"])
def test_construction_never_touches_the_network(compose: Callable, tower: str) -> None:
    config = compose("llama", tower).config
    assert NoteLLM2Model(config).encode(
        [{"title": "oak", "image": random_picture(0)}], processor=compose("llama", tower).processor
    ).shape == (1, 16)


@pytest.mark.usefixtures("no_network")
def test_loading_a_folder_never_touches_the_network(tiny_checkpoint: Path) -> None:
    assert AutoModel.from_pretrained(tiny_checkpoint).encode(["oak"]).shape == (1, 16)
    assert isinstance(AutoProcessor.from_pretrained(tiny_checkpoint), NoteLLM2Processor)
    with pytest.raises(AssertionError, match="the network was touched"):
        socket.create_connection(("127.0.0.1", 9), timeout=1)


def test_a_model_built_from_a_config_says_what_it_lacks(compose: Callable) -> None:
    with pytest.raises(ValueError, match="knows no processor: pass encode"):
        NoteLLM2Model(compose().config).encode(["oak"])


def test_the_checkpoint_carries_all_its_code(tiny_checkpoint: Path) -> None:
    """What transformers' loader finds by scanning: every file, and no package beyond the declared ones."""
    package = Path(modeling_notellm2.__file__).parent
    for name in ("modeling_notellm2", "processing_notellm2", "configuration_notellm2"):
        needed = {Path(file).name for file in get_relative_import_files(package / f"{name}.py")}
        assert all((tiny_checkpoint / file).is_file() for file in {*needed, f"{name}.py"})
    packages = {module for file in tiny_checkpoint.glob("*.py") for module in get_imports(file)}
    assert packages - sys.stdlib_module_names == {"PIL", "numpy", "tokenizers", "torch", "tqdm", "transformers"}
