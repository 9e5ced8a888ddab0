"""Models that are not to be found are named, and nothing is asked of the Hub for what can only be a folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation import checkpoints
from evaluation.checkpoints import check_model, load_model
from modeling_notellm2 import NoteLLM2Model
from tests.backbones import save


def test_weights_have_the_dtype_that_was_asked_for(tiny_checkpoint: Path) -> None:
    assert load_model(str(tiny_checkpoint), torch.bfloat16).dtype == torch.bfloat16
    assert load_model(tiny_checkpoint).dtype == torch.float32


def test_weights_as_they_were_saved_on_a_device_that_was_named(
    tiny_model: NoteLLM2Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tiny_model.to(torch.bfloat16), tmp_path / "model")
    monkeypatch.setattr(checkpoints, "default_device", lambda: torch.device("meta"))  # stands for a GPU
    model = load_model(folder, "auto", "cpu", attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    assert model.config.text_config._attn_implementation == "eager"
    model = load_model(folder)  # the control
    assert model.dtype == torch.float32 and model.device.type == "meta"
    assert model.config.text_config._attn_implementation != "eager"


@pytest.mark.parametrize("name", ["mistyped", "./mistyped", "/no/such/model", "evaluation/mistyped"])
def test_a_mistyped_folder_is_not_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints.AutoConfig, "from_pretrained", lambda *_: pytest.fail("the Hub is asked"))
    with pytest.raises(FileNotFoundError, match=f"^model='{name}': no such folder here, and no such Hub id .* read.$"):
        check_model(name)


def test_an_id_that_the_hub_does_not_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_arguments: Any) -> None:
        raise OSError("gated repo")

    monkeypatch.setattr(checkpoints.AutoConfig, "from_pretrained", unknown)
    with pytest.raises(OSError, match=r"^model='organisation/name': no such folder here, and no .* \(gated repo\)\.$"):
        check_model("organisation/name")


def test_a_folder_without_a_model_and_one_of_another_kind(
    tmp_path: Path, tiny_model: NoteLLM2Model, llm_folder: Callable[[str], Path]
) -> None:
    with pytest.raises(OSError, match=rf"model='{tmp_path}': no model is saved there \(no config.json\)"):
        check_model(tmp_path)
    folder = save(tiny_model, tmp_path / "model")
    check_model(folder)  # control
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=rf"^model='{folder}': .*safetensors"):
        load_model(folder)
    for content in (b"\xff" * 64, weights[: len(weights) // 2]):  # something else, and the half of it
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(OSError, match=rf"^model='{folder}': its weights are damaged \(.+\): copy or download"):
            load_model(folder)
    for is_released, message in ((False, "is a 'llama', no NoteLLM-2: train it first"), (True, ": .*'llama'")):
        with pytest.raises(ValueError, match=f"model='{llm_folder('llama')}'.*{message}"):
            check_model(llm_folder("llama"), is_released)
