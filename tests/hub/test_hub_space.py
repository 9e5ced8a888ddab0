"""The folder of a Space: it stands alone, and its page finds what the page here finds."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from PIL import Image

from evaluation.checkpoints import load_model
from hub.app import NotePage, NoteSpace, encode_notes
from hub.space import SpaceSettings, main, page_code, read_space, requirements, write_space
from modeling_notellm2 import NoteLLM2Model
from pairs.tables import load_notes
from tests.backbones import random_picture

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL_ID = "some-org/shelf-notes"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# Starts app.py as the Hub does, with nothing of the repository on the path.
START = f"""
import runpy, sys
sys.path[:] = ["."] + [place for place in sys.path if place and place != {str(REPOSITORY)!r}]
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def written(tiny_export: Path, world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Space of twelve notes and `tiny_export`. Not to be changed by a test."""
    root = tmp_path_factory.mktemp("space")
    table = load_notes(world_folder / "notes.jsonl").select(range(12))
    table = table.add_column("price", ["a secret"] * 12)
    table.to_parquet(root / "notes.parquet")
    notes = [
        "--notes",
        str(root / "notes.parquet"),
        "--image-root",
        str(world_folder),
        "--top-k",
        "3",
        "--title",
        "Shelves: a look",
    ]
    main([str(tiny_export), str(root / "shelves"), "--model-id", MODEL_ID, *notes])
    return root / "shelves"


@pytest.fixture
def local(written: Path, tiny_export: Path, tmp_path: Path) -> Path:
    """A copy of `written` whose model is in a folder, to be changed."""
    folder = shutil.copytree(written, tmp_path / "copy")
    change_settings(folder, model=str(tiny_export))
    return folder


def change_settings(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / "space.json").read_text())
    (folder / "space.json").write_text(json.dumps(settings | changes))


def page_here(model_folder: Path, notes: list[dict[str, Any]]) -> NotePage:
    model = load_model(str(model_folder))
    return NotePage(NoteSpace(model, notes, encode_notes(model, notes)), top_k=3)


def test_what_the_hub_reads(written: Path) -> None:
    card = SpaceCard.load(written / "README.md")
    data = card.data.to_dict()
    assert data["sdk"] == "gradio" and data["sdk_version"] == version("gradio") and data["app_file"] == "app.py"
    assert data["models"] == data["preload_from_hub"] == [MODEL_ID] and data["title"] == "Shelves: a look"
    assert data["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"  # a text, not 3.1 for 3.10
    assert len(data["short_description"]) <= 60  # what the Hub allows
    assert f"{MODEL_ID}: all 12 notes of notes.parquet" in card.text
    assert (written / "app.py").is_file()


def test_requirements_are_of_the_page_and_of_this_place(written: Path) -> None:
    lines = (written / "requirements.txt").read_text().splitlines()
    pinned = {Requirement(line).name: str(Requirement(line).specifier) for line in lines}
    assert lines == requirements() and pinned["gradio"] == f"=={version('gradio')}"
    assert pinned["torch"] == f"=={version('torch').partition('+')[0]}" and pinned["timm"] == f"=={version('timm')}"
    assert {"transformers", "datasets", "jinja2", "pillow", "peft"} <= pinned.keys()
    # Nor what only other commands need.
    assert not {"pytest", "duckdb", "ibis-framework", "pycountry", "PyYAML", "pyyaml", "tensorboard"} & pinned.keys()


def test_notes_and_pictures_and_nothing_else(written: Path, world_folder: Path) -> None:
    here = load_notes(world_folder / "notes.jsonl").select(range(12))
    there = load_notes(written / "notes.jsonl")
    for one, other in zip(here, there, strict=True):
        assert {name: one[name] for name in ("note_id", "title", "content")} == {
            name: other[name] for name in ("note_id", "title", "content")
        }
        assert Path(other["image"]).parent == written / "images"
        assert Path(other["image"]).read_bytes() == Path(one["image"]).read_bytes()
    machine = [str(world_folder), str(written.parent), str(REPOSITORY), "a secret"]
    for path in written.rglob("*"):
        if path.is_file() and path.suffix in {".json", ".jsonl", ".md", ".py", ".txt", ".jinja"}:
            assert not [place for place in machine if place in path.read_text(encoding="utf-8")], path


def test_code_is_what_the_page_imports(written: Path) -> None:
    names = {str(path.relative_to(REPOSITORY)) for path in page_code()}
    assert {"hub/app.py", "hub/app.css", "hub/app.html.jinja", "evaluation/modality.py"} <= names
    assert not {"train/run.py", "hub/push.py", "hub/card.py", "evaluation/study.py"} & names
    assert all((written / name).read_bytes() == (REPOSITORY / name).read_bytes() for name in names)


def test_the_same_page_as_here(local: Path, tiny_export: Path) -> None:
    space, settings = read_space(local)
    assert settings.top_k == 3 and list(space.embeds) == ["both", "text", "image"]
    page, here = NotePage(space, settings.top_k), page_here(tiny_export, list(load_notes(local / "notes.jsonl")))
    assert page.related(2) == here.related(2) != page.related(3)
    assert page.place(None, "red shoes", "", "") == here.place(None, "red shoes", "", "")


def test_another_model_is_refused(local: Path) -> None:
    change_settings(local, model_fingerprint="0" * 32)
    with pytest.raises(ValueError, match=r"the embeddings of this Space are of 0{32}: the model has changed"):
        read_space(local)


def test_pictures_of_every_kind(shared_tiny_model: NoteLLM2Model, tmp_path: Path) -> None:
    """A file keeps its bytes, an array or a PIL image becomes a PNG, and the embeddings stay those of the notes."""
    random_picture(1).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    array = np.asarray(random_picture(2))
    images = [str(tmp_path / "a.jpg"), content, {"bytes": content, "path": None}, random_picture(3), array, None]
    notes = [
        {"note_id": f"n{i}", "title": f"red {i}", "topics": ["a", "b"], "image": it} for i, it in enumerate(images)
    ]
    space = NoteSpace(shared_tiny_model, notes, encode_notes(shared_tiny_model, notes))
    write_space(space, tmp_path / "space", SpaceSettings("org/name", "0", "Notes", "six notes", 3))
    names = sorted(path.name for path in (tmp_path / "space" / "images").iterdir())
    assert names == ["000000.jpeg", "000001.jpeg", "000002.jpeg", "000003.png", "000004.png"]
    read = list(load_notes(tmp_path / "space" / "notes.jsonl"))
    assert read[5]["image"] is None and read[0]["topics"] == ["a", "b"]
    np.testing.assert_allclose(shared_tiny_model.encode(read), space.embeds["both"], atol=1e-6)
    with Image.open(read[4]["image"]) as picture:
        np.testing.assert_array_equal(np.asarray(picture), array)
    with pytest.raises(FileExistsError, match="exists: give another name"):
        write_space(space, tmp_path / "space", SpaceSettings("org/name", "0", "Notes", "six notes", 3))
    with pytest.raises(ValueError, match="model='name' is no id on the Hub"):
        write_space(space, tmp_path / "other", SpaceSettings("name", "0", "Notes", "six notes", 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL", "FOLDER", "--notes", "NOTES"], "say with --model-id ORG/NAME where the Hub has it"),
        (["MODEL", "FOLDER", "--notes", "NOTES", "--model-id", "a/b/c"], "--model-id='a/b/c' is no id on the Hub"),
        (["MODEL", "FOLDER", "--notes", "NOTES", "--model-id", "noslash"], "--model-id='noslash' is no id on the Hub"),
        (["MODEL", "TAKEN", "--notes", "NOTES", "--model-id", MODEL_ID], "exists: give another name"),
        (["MODEL", "FOLDER", "--notes", "absent.csv", "--model-id", MODEL_ID], "absent.csv"),
        (["MODEL", "FOLDER", "--notes", "NOTES", "--model-id", MODEL_ID, "--top-k", "0"], "--top-k=0 must be"),
    ],
    ids=["no id", "bad id", "no organisation", "taken", "no notes", "number"],
)
def test_command_ends_with_a_message_not_a_traceback(
    options: list[str],
    message: str,
    tiny_checkpoint: Path,
    world_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"MODEL": tiny_checkpoint, "NOTES": world_folder / "notes.jsonl", "FOLDER": tmp_path / "new"}
    places["TAKEN"] = world_folder
    with pytest.raises(SystemExit) as stopped:
        main([str(places.get(option, option)) for option in options])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.fixture
def hub_cache(tiny_export: Path, tmp_path: Path) -> Path:
    """HF_HOME that has downloaded the model already: as near to the Hub as a test without network comes."""
    repository = tmp_path / "home" / "hub" / f"models--{MODEL_ID.replace('/', '--')}"
    shutil.copytree(tiny_export, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path / "home"


@pytest.fixture
def address(written: Path, hub_cache: Path, tmp_path: Path) -> Iterator[str]:
    """The Space's app.py, served by a process of its own."""
    folder = shutil.copytree(written, tmp_path / "app")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_HOME": str(hub_cache), "HF_HUB_OFFLINE": "1", "GRADIO_SERVER_PORT": str(port)}
    with (tmp_path / "log.txt").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-P", "-c", START], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            for _ in range(1200):
                assert server.poll() is None, (tmp_path / "log.txt").read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/config")
                    break
                except urllib.error.URLError:
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()
    assert str(REPOSITORY) not in (tmp_path / "log.txt").read_text()


def call(address: str, path: str, content: Any = None) -> bytes:
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


def test_it_runs_as_the_hub_runs_it(address: str, written: Path, tiny_export: Path) -> None:
    config = json.loads(call(address, "/config"))
    parts = {part["props"].get("elem_id"): part for part in config["components"]}
    grid = parts["notes"]["props"]["value"]
    notes = list(load_notes(written / "notes.jsonl"))
    assert config["title"] == "Shelves: a look" and re.findall(r'data-note="(\d+)"', grid) == [
        str(i) for i in range(12)
    ]
    assert all(note["title"] in grid for note in notes) and grid.count("data:image/jpeg;base64,") == 12
    # A click on the third note, as the browser sends it.
    (choose,) = [it for it in config["dependencies"] if it["targets"] == [[parts["notes"]["id"], "click"]]]
    click = {"data": [], "event_data": {"note": 2}, "fn_index": choose["id"], "session_hash": "s", "trigger_id": 1}
    call(address, "/gradio_api/queue/join", click)
    events = call(address, "/gradio_api/queue/data?session_hash=s").decode().split("\n")
    answers = [json.loads(line.removeprefix("data: ")) for line in events if line.startswith("data: ")]
    html, _tab = next(it for it in answers if it["msg"] == "process_completed")["output"]["data"]
    expected = page_here(tiny_export, notes).related(2)
    numbers = re.compile(r"similarity </span>(-?\d\.\d{3})|<strong>(\d\.\d{3})</strong>")
    assert re.findall(r'data-note="(\d+)"', html) == re.findall(r'data-note="(\d+)"', expected)
    assert numbers.findall(html) == numbers.findall(expected) and len(numbers.findall(html)) == 10
