"""Every example runs as it stands, on tiny models."""

import base64
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from transformers import AutoModel

from examples import encode, finetune_published, serve, train_on_your_notes
from hub.export import export
from modeling_notellm2 import NoteLLM2Model
from tests.backbones import random_picture

TABLES = ["--notes", "NOTES", "--views", "VIEWS"]
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.fixture
def tables(world_folder: Path) -> list[str]:
    return ["--notes", str(world_folder / "notes.jsonl"), "--views", str(world_folder / "views.csv")]


def test_every_example_has_a_test_and_a_line_in_the_readme():
    names = {path.stem for path in EXAMPLES}
    assert names == {"encode", "finetune_published", "serve", "train_on_your_notes"}
    readme = (EXAMPLES[0].parent / "README.md").read_text(encoding="utf-8")
    assert all(f"[{name}.py]({name}.py)" in readme for name in names)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_help_is_one_command_away(path: Path):
    """And waits for nothing that only the work needs."""
    script = f"""
import runpy, sys
sys.argv = [{str(path)!r}, "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert not {{"torch", "transformers", "datasets"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and f"usage: {path.name}" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("example", "options", "words"),
    [
        (encode, ["MODEL", "nosuch.jpg"], "there is no picture 'nosuch.jpg' here"),
        (encode, ["./nosuch", "a text"], "'./nosuch' is no folder with a model, and no Hub id that can be read"),
        (encode, ["MODEL", "EMPTY", " "], "neither text nor image"),
        (encode, ["BROKEN", "a text"], "is no folder with a model, and no Hub id that can be read"),
        (serve, ["BROKEN"], "is no folder with a model, and no Hub id that can be read"),
        (serve, ["./nosuch"], "'./nosuch' is no folder with a model, and no Hub id that can be read"),
        (serve, ["MODEL", "--port", "99999"], "--port=99999 must lie between 1 and 65535"),
        (serve, ["MODEL", "--device", "nonsense"], "--device=nonsense cannot be used"),
        (finetune_published, ["MODEL", "--notes", "nosuch.csv", "--views", "VIEWS", "--output", "DIR"], "nosuch.csv"),
        (finetune_published, ["./nosuch", *TABLES, "--output", "DIR"], "error: model='./nosuch': no such folder"),
        (train_on_your_notes, [*TABLES, "--llm", "./nosuch", "--vision", "./nosuch", "--output", "DIR"], "./nosuch"),
        (
            train_on_your_notes,
            ["--notes", "NOTES", "--views", "nosuch.csv", "--llm", "x", "--vision", "x", "--output", "DIR"],
            "nosuch.csv",
        ),
    ],
    ids=[
        "encode-picture",
        "encode-model",
        "encode-empty",
        "encode-damaged",
        "serve-damaged",
        "serve-model",
        "serve-port",
        "serve-device",
        "finetune-notes",
        "finetune-model",
        "train-backbone",
        "train-views",
    ],
)
def test_a_mistake_is_one_line(
    example: Any, options: list[str], words: str, tiny_checkpoint: Path, world_folder: Path, tmp_path: Path
):
    places = {"MODEL": tiny_checkpoint, "DIR": tmp_path / "run", "EMPTY": "", "BROKEN": tmp_path / "broken"}
    shutil.copytree(tiny_checkpoint, places["BROKEN"])
    (places["BROKEN"] / "model.safetensors").write_bytes(b"\xff" * 64)
    places |= {"NOTES": world_folder / "notes.jsonl", "VIEWS": world_folder / "views.csv"}
    with pytest.raises(SystemExit) as stopped:
        example.main([str(places.get(option, option)) for option in options])
    message = str(stopped.value.code)
    assert message.startswith("error: ") and words in message and "\n" not in message


def test_encode(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "shelf.png"
    random_picture(0).save(picture)
    encode.main([str(tiny_checkpoint), str(picture), "red shoes", "blue hat"])
    lines = capsys.readouterr().out.splitlines()
    shown = np.array([[float(value) for value in line.split()[:3]] for line in lines])
    embeds = AutoModel.from_pretrained(tiny_checkpoint).encode([{"image": picture}, "red shoes", "blue hat"])
    np.testing.assert_allclose(shown, embeds @ embeds.T, atol=6e-4)
    assert lines[1].endswith("  red shoes") and shown[0, 1] < 0.999


def test_train_on_your_notes(
    tables: list[str],
    llm_folder: Callable[[str], Path],
    tower_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    backbones = ["--llm", str(llm_folder("llama")), "--vision", str(tower_folder("clip"))]
    output = tmp_path / "run"
    train_on_your_notes.main([*tables, *backbones, "--output", str(output), "--max-steps", "2", "--batch-size", "4"])
    printed = capsys.readouterr().out
    assert "bm25" in printed and "trained" in printed and "recall@10" in printed
    model = AutoModel.from_pretrained(output)
    assert model.config.lora is not None and np.isfinite(model.encode(["red shoes"])).all()


@pytest.fixture(scope="module")
def published(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as it goes to the Hub. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("published") / "folder"
    export(tiny_checkpoint, folder)
    return folder


def test_finetune_published(tables: list[str], published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """And what comes of it can be published in its turn."""
    output = tmp_path / "run"
    finetune_published.main([str(published), *tables, "--output", str(output), "--max-steps", "2", "--batch-size", "4"])
    printed = capsys.readouterr().out
    assert "published" in printed and "fine-tuned" in printed
    export(output, tmp_path / "again")
    before, after = (AutoModel.from_pretrained(folder) for folder in (published, tmp_path / "again"))
    assert after.config.lora is None  # merged
    notes = ["red shoes", "blue hat"]
    assert np.abs(before.encode(notes) - after.encode(notes)).max() > 1e-4


def test_serve(shared_tiny_model: NoteLLM2Model):
    client = TestClient(serve.create_app(shared_tiny_model))
    buffer = io.BytesIO()
    random_picture(0).save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    notes = [{"title": "Oak shelf", "topics": ["home", "wood"], "image": image}, {"content": "blue hat"}]
    answer = client.post("/embed", json={"notes": notes})
    assert answer.status_code == 200
    expected = shared_tiny_model.encode([{**notes[0], "image": buffer.getvalue()}, notes[1]])
    np.testing.assert_allclose(answer.json()["embeddings"], expected, atol=1e-5)
    without = client.post("/embed", json={"notes": [{**notes[0], "image": None}], "truncate_dim": 8})
    assert len(without.json()["embeddings"][0]) == 8
    assert np.abs(np.array(without.json()["embeddings"][0]) - expected[0, :8]).max() > 1e-3
    texts = client.post("/embed", json={"notes": ["blue hat", {"content": "blue hat"}]}).json()["embeddings"]
    np.testing.assert_allclose(texts, expected[[1, 1]], atol=1e-5)
    wrapped = client.post("/embed", json={"notes": [{**notes[0], "image": f"{image[:76]}\n{image[76:]}\n"}]})
    np.testing.assert_allclose(wrapped.json()["embeddings"], expected[:1], atol=1e-5)  # as base64 writes it
    assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("request_body", "words"),
    [
        ({"notes": [{"title": ""}]}, "neither text nor image"),
        ({"notes": [{"image": "bm8gcGljdHVyZQ=="}]}, "cannot be read"),
        ({"notes": [{"image": "/etc/passwd"}]}, "base64"),
        ({"notes": [{"image": "shelf.jpg"}]}, "'shelf.jpg' is not base64: send the content of the picture's file"),
        ({"notes": [{"image": 7}]}, "7 is not base64"),
        ({"notes": [7]}, "notes"),
        ({"notes": [{"titel": "Oak"}]}, "extra_forbidden"),
        ({"notes": []}, "too_short"),
        ({"notes": [{"title": "Oak"}], "truncate_dim": 99}, "truncate_dim=99"),
    ],
    ids=["empty", "broken", "path", "name", "number", "no note", "misspelt", "none", "dim"],
)
def test_serve_says_what_is_wrong(request_body: dict, words: str, shared_tiny_model: NoteLLM2Model):
    answer = TestClient(serve.create_app(shared_tiny_model)).post("/embed", json=request_body)
    assert answer.status_code == 422 and words in answer.text
