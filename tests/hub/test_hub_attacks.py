"""A folder that somebody else published: what is planted in it does not run, is not read, and is named."""

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from evaluation.checkpoints import load_model
from hub.compose import CompositionArguments, compose
from hub.export import export
from hub.fresh_process import blobs
from hub.onnx import ONNXRUNTIME_REFUSALS
from hub.private import PrivateError, refuse_private
from hub.verify import (
    CHECKSUMS,
    RECORD,
    VerificationError,
    check_code,
    check_files,
    encode_in_fresh_process,
    folder_files,
    is_export,
    sample_notes,
    sha256,
    verify,
    write_checksums,
)
from modeling_notellm2 import NoteLLM2Config, NoteLLM2Model, NoteLLM2Processor
from modeling_notellm2.configuration_notellm2 import refuse_outside
from modeling_notellm2.sentence_transformer_notellm2 import NoteLLM2Module
from train.checkpoints import checkpoint_problem

Notes = list[dict[str, Any]]
TOKEN = "hf_" + "Qz7" * 10
REPOSITORY = Path(__file__).resolve().parents[2]


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "the payload ran"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that the test may spoil."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


@pytest.fixture
def exported(tiny_export: Path, tmp_path: Path) -> Path:
    """A copy of the export that the test may spoil."""
    return shutil.copytree(tiny_export, tmp_path / "exported")


def change(file: Path, **entries: Any) -> None:
    """Set entries of a JSON file; `a__b` is b within a."""
    content = json.loads(file.read_text(encoding="utf-8"))
    for name, value in entries.items():
        *path, last = name.split("__")
        part = content
        for key in path:
            part = part[key]
        part[last] = value
    file.write_text(json.dumps(content), encoding="utf-8")


# Pickles


def plant_pickle(folder: Path, mark: Path) -> None:
    """Pickled weights in place of safetensors."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "planted": Payload(mark)}, folder / "pytorch_model.bin")


WAYS_IN: dict[str, Callable[[Path, Path], Any]] = {
    "NoteLLM2Model": lambda folder, out: NoteLLM2Model.from_pretrained(folder),
    "asked for": lambda folder, out: NoteLLM2Model.from_pretrained(folder, use_safetensors=False, weights_only=False),
    "AutoModel": lambda folder, out: AutoModel.from_pretrained(folder),
    "load_model": lambda folder, out: load_model(folder),
    "SentenceTransformer": lambda folder, out: NoteLLM2Module.load(str(folder)),
    "compose": lambda folder, out: compose(CompositionArguments(model=str(folder))),
    "export": lambda folder, out: export(folder, out),
    "verify": lambda folder, out: verify(folder),
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_pickled_weights_are_refused_on_every_way_in(way: str, checkpoint: Path, mark: Path, tmp_path: Path) -> None:
    plant_pickle(checkpoint, mark)
    with pytest.raises((OSError, RuntimeError), match=r"weights as pickles \(pytorch_model.bin\), which can run code"):
        WAYS_IN[way](checkpoint, tmp_path / "out")
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_the_payload_is_one(checkpoint: Path, mark: Path) -> None:
    """The control of the others."""
    plant_pickle(checkpoint, mark)
    torch.load(checkpoint / "pytorch_model.bin", weights_only=False)
    assert mark.exists()


def test_pickled_backbones_are_refused(
    llm_folder: Callable[[str], Path], tower_folder: Callable[[str], Path], mark: Path, tmp_path: Path
) -> None:
    llm = shutil.copytree(llm_folder("llama"), tmp_path / "llm")
    tower = shutil.copytree(tower_folder("clip"), tmp_path / "tower")
    NoteLLM2Model.from_backbones(llm, tower)  # the control
    for folder in (tower, llm):
        plant_pickle(folder, mark)
        with pytest.raises(OSError, match=rf"{folder.name}' holds its weights as pickles"):
            NoteLLM2Model.from_backbones(llm, tower)
    assert not mark.exists()


def test_pickled_weights_are_not_resumed_from(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "trainer_state.json").write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"):
        torch.save(Payload(mark), tmp_path / name)
    problem = checkpoint_problem(tmp_path)
    assert problem == "its weights are a pickle (pytorch_model.bin), and only safetensors are read"
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    assert checkpoint_problem(tmp_path) is None and not mark.exists()  # nothing of it is unpickled by looking
    with pytest.raises(pickle.UnpicklingError):  # as transformers reads a state, which train/run.py names
        torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert not mark.exists()


def test_an_adapter_beside_the_weights_is_refused(checkpoint: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "evil/model", "r": 2, "target_modules": ["q_proj"]}
    (checkpoint / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match=r"holds an adapter_config.json: .* remove the file"):
        AutoModel.from_pretrained(checkpoint)


# Files and code that are not those of the export


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def add(name: str, content: str = "x = 1\n") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)

    return write


def link(name: str) -> Callable[[Path], None]:
    """A file of the export with the same bytes, but elsewhere, where they can still be changed."""

    def move(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return move


def write_line(line: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        with (folder / CHECKSUMS).open("a") as file:
            file.write(f"{'0' * 64}  {line}\n")

    return write


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (flip_a_byte, "other content .*: model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "lacks tokenizer.json"),
        (add("training/more.txt"), "does not list: training/more.txt"),
        (add(".hidden"), "does not list: .hidden"),
        (add(".cache/evil.py"), "does not list: .cache/evil.py"),
        (add("__pycache__/modeling_notellm2.cpython-311.pyc"), "does not list: __pycache__"),
        (link("config.json"), "holds links: config.json"),
        (lambda folder: (folder / "more").symlink_to(folder.parent), "holds links: more"),
        (lambda folder: (folder / "dangling").symlink_to("/nowhere"), "holds links: dangling"),
        (write_line("../secret"), "line .* of checksums.sha256 is"),
        (write_line("/etc/passwd"), "line .* of checksums.sha256 is"),
        (write_line("config.json"), "line .* of checksums.sha256 is"),
        (lambda folder: (folder / CHECKSUMS).unlink(), "checksums.sha256 cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_verify_refuses_a_folder_that_was_changed(
    exported: Path, attack: Callable[[Path], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hub.verify.AutoModel", None)  # nothing is loaded before the files are known
    check_files(exported)
    attack(exported)
    with pytest.raises(VerificationError, match=message):
        verify(exported)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (add("weights.PT"), "may be a pickle: weights.PT"),
        (add("adapter_config.json", "{}"), "no export has: adapter_config.json"),
        (add("training/evil.py"), "no export has: training/evil.py"),
        (add("_notellm2.so"), "no export has: _notellm2.so"),
        (
            lambda folder: change(folder / "config.json", auto_map__AutoModel="evil/repo--modeling_notellm2.X"),
            "lacks code that evil/repo--modeling_notellm2.X needs",
        ),
        (
            lambda folder: change(folder / "processor_config.json", auto_map__AutoProcessor="../x.Y"),
            r"lacks code|needs the code",
        ),
        (
            lambda folder: (folder / "fusion_notellm2.py").write_text("import os  # and more\n"),
            "fusion_notellm2.py is not that of the installed .* Nothing of it was run",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_verify_refuses_what_is_listed_anew(
    exported: Path, attack: Callable[[Path], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can change a folder can write its list: what must not be there is known without it."""
    monkeypatch.setattr("hub.verify.AutoModel", None)
    attack(exported)
    write_checksums(exported)
    with pytest.raises(VerificationError, match=message):
        verify(exported)


def test_the_lists_own_checksum_says_who_wrote_it(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hub.verify.AutoModel", None)
    announced = sha256(exported / CHECKSUMS)
    change(exported / RECORD, more=1)
    write_checksums(exported)
    check_files(exported)
    check_code(exported)
    with pytest.raises(VerificationError, match=f"and not {announced}"):
        verify(exported, checksum=announced)


def cached_snapshot(export: Path, cache: Path) -> Path:
    """An export as the Hub's client keeps a download in its cache."""
    snapshot, kept = cache / "models--a--b" / "snapshots" / "0", cache / "models--a--b" / "blobs"
    kept.mkdir(parents=True)
    for name in folder_files(export):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        blob = Path(shutil.copyfile(export / name, kept / name.replace("/", "-")))
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


def test_a_download_is_an_export(tiny_export: Path, tmp_path: Path) -> None:
    """With what the Hub's client keeps beside it, and in its cache, whose files are links into it."""
    downloaded = shutil.copytree(tiny_export, tmp_path / "downloaded")
    add(".cache/huggingface/download/config.json.metadata")(downloaded)
    add(".cache/huggingface/.gitignore")(downloaded)
    check_files(downloaded)
    snapshot = cached_snapshot(tiny_export, tmp_path)
    check_files(snapshot)
    assert is_export(snapshot)


def test_a_snapshot_of_the_hubs_cache_loads_in_a_fresh_process(tiny_export: Path, tmp_path: Path) -> None:
    """Its own blobs are read, and no others."""
    snapshot = cached_snapshot(tiny_export, tmp_path)
    assert verify(snapshot) <= 1e-5
    other = snapshot.parents[1] / "blobs" / "other"
    other.write_text("x")
    assert sha256(other) and str(other.resolve()) not in blobs(str(snapshot))
    assert len(blobs(str(snapshot))) == len(folder_files(snapshot))
    assert blobs(str(tiny_export)) == []


# What a model opens while it loads and encodes


def confined(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    """Run a line of Python under the audit hook that `hub.verify` runs a folder's code under."""
    script = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fresh", {str(REPOSITORY / "hub" / "fresh_process.py")!r})
fresh = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fresh)
import os, socket, subprocess
sys.addaudithook(fresh.Confinement([{str(folder)!r}, sys.prefix, sys.base_prefix], [{str(folder / "own")!r}]))
{line}
print("went on")
"""
    (folder / "own").mkdir(exist_ok=True)
    return subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("line", "ended"),
    [
        ("open('OUTSIDE').read()", "open .* files elsewhere are closed"),
        ("os.open('OUTSIDE', os.O_RDONLY)", "open .* files elsewhere are closed"),
        ("open('FOLDER/link').read()", "open .* files elsewhere are closed"),
        ("open('FOLDER/new', 'w')", "open .* to write: files elsewhere are closed"),
        ("open('/proc/self/environ').read()", "open .* files elsewhere are closed"),
        ("socket.create_connection(('127.0.0.1', 9))", "socket.*the network is off"),
        ("socket.getaddrinfo('example.org', 443)", "socket.getaddrinfo 'example.org': the network is off"),
        ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))", "sendto.*network is off"),
        ("os.system('true')", "os.system .* no program is started"),
        ("subprocess.run(['true'])", "no program is started"),
        # Not to be caught, nor to end a thread alone.
        ("try:\n    open('OUTSIDE')\nexcept BaseException:\n    pass", "files elsewhere are closed"),
        (
            "import threading; t = threading.Thread(target=open, args=['OUTSIDE']); t.start(); t.join()",
            "secret.*closed",
        ),
        ("import io; sys.stderr = io.StringIO(); open('OUTSIDE')", "secret.*closed"),
        ("socket.socket(socket.AF_UNIX).connect('OUTSIDE')", "socket.connect .*secret.*: the network is off"),
        ("os.link('OUTSIDE', 'FOLDER/own/x')", "os.link .*secret.* files elsewhere are closed"),
        ("os.link('FOLDER/inside', 'FOLDER/own/x')", "os.link .*inside.* files elsewhere are closed"),
        ("os.rename('OUTSIDE', 'FOLDER/own/x')", "os.rename .*secret.* files elsewhere are closed"),
        ("os.replace('FOLDER/own/kept', 'OUTSIDE')", "os.rename .*secret.* files elsewhere are closed"),
        ("os.remove('OUTSIDE')", "os.remove .*secret.* files elsewhere are closed"),
        ("os.remove('FOLDER/link')", "os.remove .*link.* files elsewhere are closed"),
        ("os.symlink('/etc', 'OUTSIDE-link')", "os.symlink .*secret-link.* files elsewhere are closed"),
        ("os.mkdir('OUTSIDE-folder')", "os.mkdir .*secret-folder.* files elsewhere are closed"),
        ("os.rmdir('OUTSIDE-empty')", "os.rmdir .*secret-empty.* files elsewhere are closed"),
        (
            "os.remove('inside', dir_fd=os.open('FOLDER', os.O_RDONLY))",
            "os.remove .*inside.* files elsewhere are closed",
        ),
        ("os.truncate('OUTSIDE', 0)", "os.truncate .*secret.* files elsewhere are closed"),
        ("os.symlink('OUTSIDE', 'FOLDER/own/x'); os.truncate('FOLDER/own/x', 0)", "os.truncate .*secret.* closed"),
        ("os.chmod('OUTSIDE', 0)", "os.chmod .*secret.* files elsewhere are closed"),
        ("os.utime('FOLDER/inside')", "os.utime .*inside.* files elsewhere are closed"),
        ("import sqlite3; sqlite3.connect('OUTSIDE')", "no database is opened"),
        ("import ctypes; ctypes.CDLL('OUTSIDE')", "compiled code elsewhere is closed"),
        ("import ctypes; ctypes.CDLL('FOLDER/own/kept')", "compiled code elsewhere is closed"),
        (
            "import ctypes; ctypes.CDLL(None); os.makedirs('FOLDER/own/a/b'); "
            "os.rename('FOLDER/own/kept', 'FOLDER/own/a/c'); os.link('FOLDER/own/a/c', 'FOLDER/own/d'); "
            "os.remove('FOLDER/own/d'); os.symlink('OUTSIDE', 'FOLDER/own/e'); os.remove('FOLDER/own/e'); "
            "os.rmdir('b', dir_fd=os.open('FOLDER/own/a', os.O_RDONLY))",
            None,
        ),
        ("open('FOLDER/inside').read(), open('FOLDER/own/x', 'w').write('x'), open(os.__file__).read()", None),
    ],
)
def test_a_folders_code_opens_nothing_else(tmp_path: Path, line: str, ended: str | None) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "inside").write_text("x")
    (folder / "own").mkdir()
    (folder / "own" / "kept").write_text("x")
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secret-empty").mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    before = sorted(tmp_path.iterdir())
    run = confined(folder, line.replace("OUTSIDE", str(tmp_path / "secret")).replace("FOLDER", str(folder)))
    if ended is None:
        assert "went on" in run.stdout, run.stderr
    else:
        assert "went on" not in run.stdout and run.returncode != 0
        assert re.search(ended, run.stderr), run.stderr
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "secret").read_text() == "x"
    assert os.access(tmp_path / "secret", os.R_OK)


def test_verify_ends_code_that_opens_a_file_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    """That what is published does without is what every verification shows; this is its control."""
    (tmp_path / "secret").write_text("x")
    code = checkpoint / "modeling_notellm2.py"
    planted = f"\ntry:\n    open({str(tmp_path / 'secret')!r}).read()\nexcept BaseException:\n    pass\n"
    code.write_text(code.read_text() + planted)
    with pytest.raises(VerificationError, match=r"secret': files elsewhere are closed"):
        encode_in_fresh_process(checkpoint, sample_notes(with_images=False)[:1])


# Configurations


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_visual_tokens": 10**9}, "num_visual_tokens=1000000000 must lie between 1 and"),
        ({"num_visual_tokens": "many"}, "num_visual_tokens='many' must lie"),
        ({"embedding_dim": 10**10}, "embedding_dim=10000000000 must lie between"),
        ({"late_fusion_hidden_size": 10**10}, "late_fusion_hidden_size=10000000000 is beyond all models"),
        ({"text_config__num_hidden_layers": 10**9}, "text_config.num_hidden_layers=1000000000 is beyond"),
        ({"text_config__hidden_size": 2**40}, "text_config.hidden_size=.* is beyond"),
        ({"text_config__vocab_size": 10**10}, "text_config.vocab_size=.* is beyond"),
        ({"vision_config__image_size": 10**9}, "vision_config.image_size=.* is beyond"),
        ({"qformer_config__num_hidden_layers": 10**6}, "qformer_config.num_hidden_layers=1000000 is beyond"),
        ({"text_config__hidden_size": 1e30}, r"text_config.hidden_size=1e\+30 is beyond"),
        ({"text_config__num_hidden_layers": "1e9"}, "text_config.num_hidden_layers='1e9' is beyond"),
        ({"text_config__num_experts": 10**9}, "text_config.num_experts=1000000000 is beyond"),
        ({"text_config__head_dim": float("nan")}, "text_config.head_dim=nan is beyond"),
        ({"vision_config__hidden_sizes": [8, 10**9]}, "vision_config.hidden_sizes=1000000000 is beyond"),
        ({"qformer_config__num_query_tokens": 10**9}, "qformer_config.num_query_tokens=1000000000 is beyond"),
        ({"lora": {"r": 10**9}}, "lora.r=1000000000 is beyond"),
        ({"text_config__auto_map": {"AutoModel": "evil/repo--m.M"}}, "text_config.auto_map=.* reaches beyond"),
        ({"vision_config__auto_map": {"AutoModel": "m.M"}}, "vision_config.auto_map=.* reaches beyond"),
        ({"text_config__attn_implementation": "evil/kernel"}, "attn_implementation='evil/kernel' reaches beyond"),
        ({"lora": {"r": 2, "megatron_core": "antigravity"}}, "lora.megatron_core='antigravity' reaches beyond"),
        ({"vision_config__architecture": "hf-hub:evil/model"}, "architecture='hf-hub:evil/model' reaches beyond"),
        ({"vision_config__model_args": {"checkpoint_path": "/x.pth"}}, "checkpoint_path='/x.pth' reaches beyond"),
        ({"vision_config__use_pretrained_backbone": True}, "use_pretrained_backbone=True reaches beyond"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_hostile_configs_are_named_before_anything_is_built(
    checkpoint: Path, entries: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    NoteLLM2Config.from_pretrained(checkpoint)
    monkeypatch.setattr(NoteLLM2Model, "__init__", None)  # not reached
    change(checkpoint / "config.json", **entries)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_theta", 2_804_339_835),
        ("model_max_length", int(1e30)),
        ("seed", 4_294_967_295),
        ("num_tokens_seen", 10**13),
        ("hidden_act", "silu"),
        ("max_position_embeddings", 10_485_760),
        ("layer_norm_eps", 1e-5),
        ("image_token_id", 10**9),
    ],
)
def test_numbers_that_size_nothing_are_taken(name: str, value: object) -> None:
    refuse_outside("text_config", {name: value}, is_part=True)


def test_an_attention_kernel_of_the_whole_model_is_refused(checkpoint: Path) -> None:
    change(checkpoint / "config.json", attn_implementation="evil/kernel")
    with pytest.raises(ValueError, match="attn_implementation='evil/kernel' reaches beyond"):
        AutoModel.from_pretrained(checkpoint)


def test_code_that_a_backbone_names_is_not_taken_over(
    llm_folder: Callable[[str], Path], mark: Path, tmp_path: Path
) -> None:
    """Phi-3 and others are published with code that transformers has by now: it stays behind."""
    llm = shutil.copytree(llm_folder("llama"), tmp_path / "llm")
    change(llm / "config.json", auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Config"})
    (llm / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    model = NoteLLM2Model.from_backbones(llm)
    assert not mark.exists() and "auto_map" not in model.config.to_dict()["text_config"]


def test_a_processor_reads_its_folder_alone(checkpoint: Path, tmp_path: Path, notes: Notes, mark: Path) -> None:
    expected = NoteLLM2Processor.from_pretrained(checkpoint)(notes)
    other = json.loads((checkpoint / "tokenizer.json").read_text())
    other["model"]["merges"] = []
    (tmp_path / "other.json").write_text(json.dumps(other))
    elsewhere = {"tokenizer_file": str(tmp_path / "other.json"), "vocab_file": "/etc/passwd"}
    change(checkpoint / "tokenizer_config.json", **elsewhere, auto_map={"AutoTokenizer": ["evil/repo--t.T", None]})
    change(checkpoint / "config.json", _name_or_path=str(tmp_path))
    found = NoteLLM2Processor.from_pretrained(checkpoint)(notes)
    assert torch.equal(found["input_ids"], expected["input_ids"])
    (checkpoint / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    planted = {"auto_map": {"AutoImageProcessor": "evil.Processor"}, "image_processor_type": "NobodysProcessor"}
    change(checkpoint / "processor_config.json", image_processor=planted)
    with pytest.raises(ValueError, match="NobodysProcessor|trust_remote_code|custom code"):
        NoteLLM2Processor.from_pretrained(checkpoint)
    change(checkpoint / "processor_config.json", num_visual_tokens=10**9)
    assert not mark.exists()


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**62),
        struct.pack("<Q", 99_000_000) + b"{",
        (lambda text: struct.pack("<Q", len(text)) + text)(
            b'{"logit_scale":{"dtype":"F32","shape":[1000000000000,1000000],"data_offsets":[0,4000000000000000000]}}'
        ),
    ],
    ids=["length", "short", "shape"],
)
def test_absurd_safetensors_are_named(checkpoint: Path, header: bytes) -> None:
    (checkpoint / "model.safetensors").write_bytes(header)
    with pytest.raises(OSError, match="its weights are damaged"):
        load_model(checkpoint)


@pytest.mark.parametrize("is_absolute", [True, False])
def test_a_graph_reads_no_weights_elsewhere(tmp_path: Path, is_absolute: bool) -> None:
    """onnxruntime's own promise, which `OnnxNoteEncoder` relies on."""
    (tmp_path / "folder").mkdir()
    np.arange(4, dtype=np.float32).tofile(tmp_path / "secret.bin")
    shutil.copy(tmp_path / "secret.bin", tmp_path / "folder" / "own.bin")
    given = {"x": np.ones(4, dtype=np.float32)}
    for place in ("own.bin", str(tmp_path / "secret.bin") if is_absolute else "../secret.bin"):
        weights = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", place), ("offset", "0"), ("length", "16")):
            entry = weights.external_data.add()
            entry.key, entry.value = key, value
        x, y = (onnx.helper.make_tensor_value_info(name, 1, [4]) for name in "xy")
        graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weights])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
        file = tmp_path / "folder" / "model.onnx"
        file.write_bytes(model.SerializeToString())
        if place == "own.bin":  # the control
            (found,) = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, given)
            assert found.tolist() == [1, 2, 3, 4]
        else:
            with pytest.raises(ONNXRUNTIME_REFUSALS, match="(?i)external data"):
                onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


# Credentials and places of a machine


def test_nothing_that_was_planted_is_published(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: Notes
) -> None:
    """In what a training leaves beside a checkpoint, and in what is read of it and written anew."""
    place = "/home/alice/project"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    save_file(load_file(checkpoint / "model.safetensors"), checkpoint / "model.safetensors", {"at": place, "by": TOKEN})
    torch.save({"hub_token": TOKEN, "output_dir": place}, checkpoint / "training_args.bin")
    for name in ("trainer_state.json", "generation_config.json", "adapter.log", ".env"):
        (checkpoint / name).write_text(json.dumps({"token": TOKEN, "_name_or_path": place}))
    (checkpoint / "README.md").write_text(f"---\nbase_model: {place}\n---\n{TOKEN}\n")
    export(checkpoint, tmp_path / "out")
    for name in folder_files(tmp_path / "out"):
        content = (tmp_path / "out" / name).read_bytes()
        assert TOKEN.encode() not in content and b"alice" not in content, name
    np.testing.assert_allclose(
        AutoModel.from_pretrained(tmp_path / "out").encode(notes),
        AutoModel.from_pretrained(checkpoint).encode(notes),
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("file", "entries"),
    [
        ("config.json", {"text_config___name_or_path": "/home/alice/llm"}),
        ("config.json", {"came_from": r"C:\Users\alice\llm"}),
        ("config.json", {"came_from": "file:///data/alice/llm"}),
        ("tokenizer_config.json", {"came_from": "/mnt/alice/llm"}),
        ("tokenizer_config.json", {"came_from": "~/llm of alice"}),
        ("tokenizer_config.json", {"came_from": TOKEN}),
    ],
)
def test_what_would_be_published_is_named(checkpoint: Path, tmp_path: Path, file: str, entries: dict[str, str]) -> None:
    if "text_config___name_or_path" in entries:
        content = json.loads((checkpoint / file).read_text())
        content["text_config"]["_name_or_path"] = entries["text_config___name_or_path"]
        (checkpoint / file).write_text(json.dumps(content))
    else:
        change(checkpoint / file, **entries)
    with pytest.raises(PrivateError, match=f"{file} would (name|hold)") as refused:
        export(checkpoint, tmp_path / "out")
    assert TOKEN not in str(refused.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("space.json", json.dumps({"title": "of /home/alice/notes"}), "space.json would name '/home/alice/notes'"),
        ("README.md", "see /Users/alice/x", "README.md would name"),
        ("README.md", "https://example.org/home/alice and a/home/b and ~5/6 and /etc", None),
        ("README.md", "see `~/.cache/huggingface`", None),
        ("README.md", "see ~/models", "README.md would name '~/models', .*what the card is written from"),
        ("README.md", "`/data/notes` and (/content/drive) and either /media/print or /var/run.", None),
        ("README.md", "see /home/alice/x.", "would name '/home/alice/x"),
        ("README.md", "at /mnt/data/alice/run", "would name '/mnt/data/alice/run'"),
        ("README.md", "at `/data/alice/run`", "would name '/data/alice/run'"),
        ("README.md", "(/content/drive/MyDrive/x)", "would name '/content/drive/MyDrive/x'"),
        ("README.md", r"at C:\Users\alice\x", r"would name 'C:.*alice.*x'"),
        ("README.md", r"at C:\Users", "would name 'C:"),
        ("README.md", r"at D:\runs\alice", "would name 'D:"),
        ("README.md", r"a prompt 'Q:\n' and D:\x", None),
        ("chat_template.jinja", r"{{ 'Q:\n' + x }}{{ 'Q:\n\n\nA:\n\n' }}", None),
        ("chat_template.jinja", "{{ '/home/alice/x' }}", "would name '/home/alice/x', .*tokenizer's chat template"),
        ("tokenizer_config.json", json.dumps({"chat_template": r"{{ 'Q:\n\nA:\n' }}"}), None),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": [{"name": "tool", "template": r"{{ 'Q:\n\nA:\n' }}"}]}),
            None,
        ),
        ("config.json", json.dumps({"at": r"D:\runs\alice"}), "would name 'D:.*the file of this name"),
        ("notes.jsonl", '{"content": "look in /home/alice"}', None),
        ("notes.jsonl", f'{{"content": "{TOKEN}"}}', "notes.jsonl would hold"),
        ("tokenizer.json", json.dumps({"vocab": {"/home/alice": 1}}), None),
        ("tokenizer.json", json.dumps({"vocab": {TOKEN: 1}}), "tokenizer.json would hold"),
        ("key.txt", "-----BEGIN RSA PRIVATE KEY-----", "key.txt would hold"),
    ],
)
def test_the_last_look(tmp_path: Path, name: str, content: str, message: str | None) -> None:
    (tmp_path / name).write_text(content)
    if message is None:
        refuse_private(tmp_path, notes=["notes.jsonl"])
    else:
        with pytest.raises(PrivateError, match=message):
            refuse_private(tmp_path, notes=["notes.jsonl"])


def test_the_header_of_weights_is_looked_at(tmp_path: Path) -> None:
    save_file({"weight": torch.rand(3)}, tmp_path / "model.safetensors", {"made_by": TOKEN})
    with pytest.raises(PrivateError, match=r"model.safetensors would hold .* \(hf_Qz7…\)"):
        refuse_private(tmp_path)
