"""An export of the tiny model, and a stand-in of the Hub's HTTP interface."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from evaluation.report import ReportRow, collect_facts, write_report
from hub.card import CardOptions
from hub.export import export

SECRET = "hf_abcdefghijklmnopqrstuvwxyz"
HUB_LICENSES = ["apache-2.0", "mit", "other"]  # some of them
METRICS = {"recall@10": 0.4321, "ndcg@10": 0.25, "hit_rate@10": 0.75, "recall@100": 0.875, "mrr": 0.125}


def write_run(folder: Path) -> Path:
    """What a training leaves in its output folder, with paths and a credential in it."""
    rows = [
        ReportRow("bm25", "text", {name: value / 2 for name, value in METRICS.items()}),
        ReportRow("trained", "both", METRICS, intervals={"mrr": (0.1, 0.15)}),
        ReportRow("trained", "image", {name: value / 4 for name, value in METRICS.items()}),
    ]
    facts = collect_facts(train_notes=30, train_pairs=50, steps=7, test_notes=12, test_queries=5, seed=3)
    facts["command"] = f"python train/run.py --notes '/home/some one/notes.csv' --hub_token {SECRET} --passwd hunter2"
    write_report(folder / "report", rows, facts)
    settings = {
        "composition": {"llm": "/models/secret place/SmolLM2", "vision": "../towers/clip", "prompt": "micl"},
        "data": {
            "notes": "data/notes.csv",
            "splits": None,
            "pair_score": "cosine",
            "pair_window_days": 7.0,
            "split_by": "note",
        },
        "training": {"hub_token": SECRET, "output_dir": str(folder), "logging_dir": "runs/host", "max_steps": 7},
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder


CARD = CardOptions(
    name="Shelf notes",
    repo_id="some-org/shelf-notes",
    license="apache-2.0",
    base_models=["some-org/llm", "some-org/tower"],
    datasets=["some-org/notes"],
    languages=["en", "zh"],
)


@pytest.fixture(scope="session")
def tiny_export(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of `tiny_checkpoint` with a run. Not to be changed by a test."""
    root = tmp_path_factory.mktemp("export")
    export(tiny_checkpoint, root / "shelf-notes", CARD, run=write_run(root / "run"))
    return root / "shelf-notes"


class StandInHub(ThreadingHTTPServer):
    """The calls of the Hub's interface that an upload makes, and what they left behind.

    Attributes:
        requests: method and path of every request, in order.
        created: the payloads of created repositories.
        commits: of each commit its revision, query and lines.
        blobs: SHA-256 ─► bytes of large files.
        cut_off: how many uploads of large files end in an error.
        private: whether the repository is private; None: there is none.
        others: files that the repository holds already.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.requests: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.commits: list[dict[str, Any]] = []
        self.blobs: dict[str, bytes] = {}
        self.cut_off = 0
        self.private: bool | None = None
        self.others = [".gitattributes"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self) -> dict[str, bytes]:
        """Path ─► content of the files of the only commit."""
        (commit,) = self.commits
        found = {}
        for line in commit["lines"]:
            value = line["value"]
            if line["key"] == "file":
                found[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                found[value["path"]] = self.blobs[value["oid"]]
        return found


class _Answers(BaseHTTPRequestHandler):
    server: StandInHub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:  # noqa: N802
        self.server.requests.append(f"GET {self.path}")
        if self.path == "/api/models/some-org/shelf-notes":
            if self.server.private is None:
                self._answer({"error": "not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            else:
                self._answer({"id": "some-org/shelf-notes", "private": self.server.private})
        elif self.path.startswith("/api/models/some-org/shelf-notes/revision/"):
            self._answer({"error": "no such branch"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif self.path.startswith("/api/models/some-org/shelf-notes/tree/"):
            self._answer([{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in self.server.others])
        else:
            self._answer({"error": f"unknown call {self.path}"}, 404)

    def do_POST(self) -> None:  # noqa: N802
        body = self._body()
        path, _, query = self.path.partition("?")
        if path == "/api/repos/create":
            asked, url = json.loads(body), f"{self.server.url}/some-org/shelf-notes"
            self.server.created.append(asked)
            if self.server.private is not None:  # and it stays as it is
                self._answer({"error": "exists", "url": url}, 409)
            else:
                self.server.private = asked.get("visibility") == "private" or bool(asked.get("private"))
                self._answer({"url": url})
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body))
        elif "/preupload/" in path:
            modes = [
                {"path": file["path"], "uploadMode": _mode(file["path"]), "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": [self._action(it) for it in json.loads(body)["objects"]]})
        elif "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.server.commits.append({"revision": path.rpartition("/")[2], "query": query, "lines": lines})
            url = f"{self.server.url}/some-org/shelf-notes"
            self._answer(
                {
                    "commitUrl": f"{url}/commit/{'0' * 40}",
                    "commitOid": "0" * 40,
                    "pullRequestUrl": f"{url}/discussions/1",
                }
            )
        elif "/branch/" in path:
            self._answer({})
        else:
            self._answer({"error": f"unknown call {self.path}"}, 404)

    def do_PUT(self) -> None:  # noqa: N802
        body = self._body()
        if self.server.cut_off > 0:
            self.server.cut_off -= 1
            self._answer({"error": "cut off"}, 400)
            return
        assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
        self.server.blobs[self.path.rpartition("/")[2]] = body
        self._answer({})

    def _validate(self, content: dict[str, Any]) -> None:
        """A part of what the Hub checks: the front matter is YAML, and holds no type, license or language that the Hub
        refuses."""
        _, front, _ = content["content"].split("---\n", 2)
        data = yaml.safe_load(front)
        errors = [
            f'"{name}" must be a string'
            for name in ("license", "library_name", "pipeline_tag")
            if name in data and not isinstance(data[name], str)
        ]
        if data.get("license", "other") not in HUB_LICENSES:
            errors.append(f'"license" must be one of {HUB_LICENSES}')
        errors += [
            f'"language" with value "{code}" is not valid'
            for code in data.get("language", [])
            if re.fullmatch("[a-z]{2,3}|code|multilingual", code) is None
        ]
        for result in (data["model-index"][0]["results"]) if "model-index" in data else ():
            if not {"task", "dataset", "metrics"} <= result.keys() or not {"name", "type"} <= result["dataset"].keys():
                errors.append('"model-index" is incomplete')
        messages = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._answer(messages, 400 if errors else 200)

    def _action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        known = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in self.server.blobs:
            return known
        return {**known, "actions": {"upload": {"href": f"{self.server.url}/blobs/{wanted['oid']}"}}}

    def _body(self) -> bytes:
        self.server.requests.append(f"{self.command} {self.path}")
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A running stand-in, which the client of this process talks to."""
    server = StandInHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # The stand-in speaks LFS; the other way to store large files needs a server of its own kind.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The output folder of a training."""
    return write_run(tmp_path / "run")


@pytest.fixture
def code_blocks() -> Callable[[str], list[str]]:
    """Markdown ─► its blocks of Python."""
    return lambda text: [block.partition("```")[0] for block in text.split("```python\n")[1:]]
