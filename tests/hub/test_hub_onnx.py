"""The graphs of an export compute what the model computes, through onnxruntime alone."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModel

import hub.onnx
from evaluation import checkpoints
from evaluation.multimodal_llm import MultimodalLLM
from hub.onnx import OnnxExportError, compare, export_onnx, load_for_export, main, quantize_graphs
from modeling_notellm2 import NoteError, NoteLLM2Model
from modeling_notellm2.onnx_notellm2 import OnnxNoteEncoder
from tests.backbones import random_picture, save

Compose = Callable[..., NoteLLM2Model]
Notes = list[dict[str, Any]]
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of `tiny_checkpoint`: Llama and CLIP, mICL, scalar gate, Q-Former. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("onnx") / "export"
    export_onnx(load_for_export(tiny_checkpoint), folder)
    return folder


@pytest.fixture(scope="session")
def encoder(exported: Path) -> OnnxNoteEncoder:
    """The session's export, opened."""
    return OnnxNoteEncoder(exported)


@pytest.fixture
def copy_of(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `export_onnx` write the session's graphs, whatever model it is given."""

    def write(model: NoteLLM2Model, notes: Any, folder: Path) -> None:
        for path in exported.glob("*.onnx"):
            shutil.copy(path, folder)

    monkeypatch.setattr(hub.onnx, "_write_graphs", write)


def assert_same(encoder: OnnxNoteEncoder, model: NoteLLM2Model, notes: Notes, atol: float = 1e-5) -> None:
    """On notes of every kind, together and one by one, padded on either side; and neither text nor image is ignored: an
    exchange shows ten times as much. (A random CNN says little of an image.)"""
    expected = model.encode(notes)
    for batch_size in (1, 4, 32):
        np.testing.assert_allclose(encoder.encode(notes, batch_size=batch_size), expected, atol=atol)
    encoder.processor.padding_side = "left" if encoder.processor.padding_side == "right" else "right"
    np.testing.assert_allclose(encoder.encode(notes), expected, atol=atol)
    assert (
        np.abs(encoder.encode([{**note, "content": "another text"} for note in notes]) - expected).max(1).min()
        > 10 * atol
    )
    if model.config.has_vision:
        images = [i for i, note in enumerate(notes) if "image" in note]
        others = encoder.encode([{**notes[i], "image": random_picture(99)} for i in images])
        assert np.abs(others - expected[images]).max(1).min() > 10 * atol


def test_equal_to_the_model(exported: Path, tiny_checkpoint: Path, notes: Notes) -> None:
    model = AutoModel.from_pretrained(tiny_checkpoint)
    assert_same(OnnxNoteEncoder(exported), model, notes)
    with torch.no_grad():  # a control: the graphs know the weights that they were made of, and no others
        model.head.weight += 0.01 * torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(0))
    assert np.abs(OnnxNoteEncoder(exported).encode(notes) - model.encode(notes)).max() > 1e-3


def test_every_other_setting(compose: Compose, notes: Notes, tmp_path: Path) -> None:
    """What the session's export has not: Qwen2, a CNN, the basic prompt, the vector gate, the MLP, standardized states
    and adapters."""
    model = compose(
        "qwen2",
        "timm_cnn",
        processor={"prompt": "basic"},
        connector="mlp",
        late_fusion="vector",
        standardize_states=True,
    )
    model.add_lora(r=2, target_modules="all-linear")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
        batch = model.processor(notes)
        model.fit_standardizers(model.get_states(**batch))
    checkpoint = save(model, tmp_path / "checkpoint")
    export_onnx(load_for_export(checkpoint), tmp_path / "export")
    # A random tower sees nearly the same in all pictures: standardization makes more of it, and of its rounding.
    assert_same(OnnxNoteEncoder(tmp_path / "export"), AutoModel.from_pretrained(checkpoint), notes, atol=1e-4)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["lora"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "llm, tower, processor, config",
    [
        ("llama", "siglip", {"padding_side": "left"}, {"late_fusion": None}),
        ("qwen2", "clip_dual", {"language": "zh"}, {"late_fusion": "vector", "embedding_dim": None}),
        ("gemma3", "dinov2_with_registers", {}, {}),
        ("mistral", "timm_vit", {"prompt": "text"}, {"connector": None}),
        ("phi3", "convnext", {"prompt": "basic"}, {"late_fusion_normalize": False}),
        ("gpt2", "timm_channels_last", {}, {"connector": "mlp"}),
        ("qwen3", None, {}, {}),
    ],
)
def test_other_backbones(
    llm: str,
    tower: str | None,
    processor: dict[str, Any],
    config: dict[str, Any],
    compose: Compose,
    notes: Notes,
    tmp_path: Path,
) -> None:
    checkpoint = save(compose(llm, tower, processor, **config), tmp_path / "checkpoint")
    export_onnx(load_for_export(checkpoint), tmp_path / "export")
    if tower is None:
        notes = [note for note in notes if note.keys() & {"title", "content"}]
    assert_same(OnnxNoteEncoder(tmp_path / "export"), AutoModel.from_pretrained(checkpoint), notes)


@pytest.mark.slow
def test_a_tower_of_variable_resolution_is_named(compose: Compose, tmp_path: Path) -> None:
    checkpoint = save(compose("llama", "siglip2"), tmp_path / "checkpoint")
    with pytest.raises(OnnxExportError, match="the vision tower of type 'siglip2_vision_model' cannot be exported"):
        export_onnx(load_for_export(checkpoint), tmp_path / "export")


def test_encodes_as_the_model_does(encoder: OnnxNoteEncoder, shared_tiny_model: NoteLLM2Model, notes: Notes) -> None:
    whole = encoder.encode(notes)
    assert whole.dtype == np.float32 and encoder.encode([]).shape == (0, 16)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(encoder.encode(note for note in notes), whole, atol=1e-6)
    np.testing.assert_allclose(
        encoder.encode(notes, truncate_dim=5), shared_tiny_model.encode(notes, truncate_dim=5), atol=1e-4
    )
    with pytest.raises(NoteError, match=r"notes\[6\]"):
        encoder.encode([*notes, {"title": 3}])
    with pytest.raises(ValueError, match=r"pass \[note\]"):
        encoder.encode(notes[0])


def test_stands_alone(
    exported: Path, encoder: OnnxNoteEncoder, tmp_path: Path, code_blocks: Callable[[str], list[str]]
) -> None:
    """As its README.md says, in a process without this repository, where nothing loads a model, and with no path of
    this machine in it."""
    readme = (exported / "README.md").read_text(encoding="utf-8")
    (code,) = code_blocks(readme)
    assert "in float32" in readme and "(2, 16)" in readme and "`image`" in readme
    script = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fresh", {str(REPOSITORY / "hub" / "fresh_process.py")!r})
fresh = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fresh)
sys.meta_path.insert(0, fresh.HideRepository())
import numpy as np
exec({code!r})
assert embeddings.shape == (2, 16)
assert not hasattr(encoder, "parameters")  # no module, so that nothing can hold weights of torch
notes = [{{"title": "Oak shelf", "image": np.arange(3072, dtype=np.uint8).reshape(32, 32, 3)}}, "red shoes"]
np.save({str(tmp_path / "embeds.npy")!r}, encoder.encode(notes))
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-I", "-c", script], cwd=exported, env=environment, check=True)
    notes = [{"title": "Oak shelf", "image": np.arange(3072, dtype=np.uint8).reshape(32, 32, 3)}, "red shoes"]
    np.testing.assert_allclose(np.load(tmp_path / "embeds.npy"), encoder.encode(notes), atol=1e-6)
    for path in exported.iterdir():
        content = path.read_bytes()
        for secret in (str(REPOSITORY), str(exported.parent), torch.__file__.rpartition("/")[0]):
            assert secret.encode() not in content, path.name


def test_quantized_graphs(
    exported: Path,
    shared_tiny_model: NoteLLM2Model,
    notes: Notes,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = shutil.copytree(exported, tmp_path / "int8")
    quantize_graphs(folder)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]  # its advice is followed
    assert {path.name for path in folder.iterdir()} == {path.name for path in exported.iterdir()}
    for name in ("model.onnx", "vision.onnx"):
        assert any(node.op_type == "MatMulInteger" for node in onnx.load(folder / name).graph.node)
    found = compare(shared_tiny_model, OnnxNoteEncoder(folder), notes)
    assert found.least_cosine > 0.98 and found.difference > 1e-4  # near, and measurably not the same


def test_command(
    compose: Compose, splits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], notes: Notes
) -> None:
    """A text-only model, whose export has one graph, quantized and measured."""
    checkpoint = save(compose("llama", None), tmp_path / "checkpoint")
    output = tmp_path / "export"
    main([str(checkpoint), str(output), "--quantize", "--splits", str(splits_folder)])
    said = capsys.readouterr().out
    assert f"{output / 'model.onnx'}: 0." in said and "vision.onnx" not in said
    assert "sample notes: cosine" in said and "test notes: cosine" in said and "Recall@10 0." in said
    readme = (output / "README.md").read_text(encoding="utf-8")
    assert "rounded to int8" in readme and "`image`" not in readme
    texts = [note for note in notes if note.keys() & {"title", "content"}]
    assert compare(AutoModel.from_pretrained(checkpoint), OnnxNoteEncoder(output), texts).least_cosine > 0.98
    with pytest.raises(SystemExit) as stopped:
        main([str(checkpoint), str(output)])
    assert stopped.value.code == 2 and f"folder='{output}' exists: give another name" in capsys.readouterr().err


def test_what_cannot_be_loaded_is_named_and_what_can_only_be_a_folder_is_not_asked_for(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = shutil.copytree(tiny_checkpoint, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"\xff" * 64)
    ask = checkpoints.AutoConfig.from_pretrained

    def of_this_machine(name: Any, **settings: Any) -> Any:
        assert Path(name).exists(), "the Hub is asked"
        return ask(name, **settings)

    monkeypatch.setattr(checkpoints.AutoConfig, "from_pretrained", of_this_machine)
    for name, complaint in (
        ("nosuch", "model='nosuch': no such folder here, and no such Hub id could be read."),
        ("./nosuch", "model='./nosuch': no such folder here, and no such Hub id could be read."),
        (str(damaged), f"model='{damaged}': its weights are damaged"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([name, str(tmp_path / "new")])
        assert stopped.value.code == 2 and complaint in capsys.readouterr().err


def test_recall_of_both_is_measured(encoder: OnnxNoteEncoder, shared_tiny_model: NoteLLM2Model) -> None:
    notes = [{"title": f"note {i}", "image": random_picture(i)} for i in range(14)]
    embeds = shared_tiny_model.encode(notes)
    scores = embeds @ embeds.T - 2 * np.eye(14)
    nearest, farthest = scores.argmax(1), (scores + 4 * np.eye(14)).argmin(1)
    for related, recall in ((nearest, 1.0), (farthest, 0.0)):
        found = compare(shared_tiny_model, encoder, notes, [np.array([i]) for i in related])
        assert found.model_recall == found.onnx_recall == recall
    assert compare(shared_tiny_model, encoder, notes).model_recall is None


@pytest.mark.usefixtures("copy_of")
def test_graphs_that_compute_something_else_are_refused(tiny_model: NoteLLM2Model, tmp_path: Path) -> None:
    export_onnx(tiny_model, tmp_path / "right")  # the control
    with torch.no_grad():
        tiny_model.head.weight.mul_(torch.linspace(0.5, 1.5, 16).unsqueeze(1))
    with pytest.raises(OnnxExportError, match="of type 'llama' and the vision tower .* differ from the model by"):
        export_onnx(tiny_model, tmp_path / "wrong")
    assert [path.name for path in tmp_path.iterdir()] == ["right"]


@pytest.mark.usefixtures("copy_of")
def test_graphs_that_onnxruntime_refuses_are_named(
    tiny_model: NoteLLM2Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write = hub.onnx._write_graphs

    def spoil(model: NoteLLM2Model, notes: Any, folder: Path) -> None:
        write(model, notes, folder)
        graph = onnx.load(folder / "model.onnx")
        graph.graph.node[0].op_type = "Unheard"
        onnx.save(graph, folder / "model.onnx")

    monkeypatch.setattr(hub.onnx, "_write_graphs", spoil)
    with pytest.raises(OnnxExportError, match="onnxruntime cannot run the graphs of the LLM of type 'llama' .*Unheard"):
        export_onnx(tiny_model, tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_a_backbone_that_cannot_be_exported_is_named(tiny_model: NoteLLM2Model, tmp_path: Path) -> None:
    assert tiny_model.vision_tower is not None
    tower = tiny_model.vision_tower.model
    forward = tower.forward

    def branching(pixel_values: torch.Tensor) -> Any:
        return forward(pixel_values if pixel_values.mean() > 0 else -pixel_values)

    tower.forward = branching
    with pytest.raises(
        OnnxExportError, match=r"^the vision tower of type 'clip_vision_model' cannot be exported .*\.$"
    ):
        export_onnx(tiny_model, tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_only_a_whole_note_model_and_a_new_folder(
    llm_folder: Callable[[str], Path], multimodal_llm_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is a 'llama', no NoteLLM-2"):
        load_for_export(llm_folder("llama"))
    released = MultimodalLLM.from_backbone(multimodal_llm_folder("qwen2_vl"))
    with pytest.raises(OnnxExportError, match="is a MultimodalLLM: give a NoteLLM-2 model"):
        load_for_export(save(released, tmp_path / "multimodal"))
    with pytest.raises(FileNotFoundError, match="holds no model.onnx: make one with"):
        OnnxNoteEncoder(tmp_path)
