"""The command, end to end, with a stub in the model's place: tables in, report out."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from evaluation import baselines, run
from evaluation.lexical import note_text
from pairs.tables import write_table
from train.features import VisionFeatureTable

COLOURS = ("red", "green", "blue", "grey", "pink")


class ColourModel:
    """Knows a note's colour by its text (the even notes tell it) or by its image's name; otherwise guesses none."""

    def __init__(self, vision_config: str | None = "any") -> None:
        self.config = SimpleNamespace(vision_config=vision_config)

    def encode(
        self,
        notes: Sequence[Mapping[str, Any]],
        *,
        batch_size: int,
        show_progress_bar: bool,
        vision_features: VisionFeatureTable | None = None,
    ) -> np.ndarray:
        clues = [f"{note_text(note)} {Path(note.get('image') or '').name}" for note in notes]
        return np.array([[colour in clue for colour in COLOURS] for clue in clues], dtype=np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """25 notes of 5 colours; those of a colour are related, and only the even ones say their colour."""
    ids = [f"n{i}" for i in range(25)]
    contents = [f"a {COLOURS[i % 5]} thing" if i % 2 == 0 else "a thing" for i in range(25)]
    images = [f"{COLOURS[i % 5]}.jpg" for i in range(25)]
    write_table(Dataset.from_dict({"note_id": ids, "content": contents, "image": images}), tmp_path / "notes.arrow")
    pairs = [(ids[i], ids[j], 1.0, 1 + j // 5) for i in range(25) for j in range(25) if i != j and (i - j) % 5 == 0]
    columns = zip(("note_id", "related_note_id", "score", "rank"), zip(*pairs, strict=True), strict=True)
    Dataset.from_dict({name: list(values) for name, values in columns}).to_parquet(tmp_path / "pairs.parquet")
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    tables = ["--notes", str(folder / "notes.arrow"), "--pairs", str(folder / "pairs.parquet")]
    return [*tables, "--output", str(folder / "report"), "--ks", "4", *more]


def test_the_command_writes_one_row_a_baseline_and_modality(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded: list[str] = []

    def load_model(path: str) -> ColourModel:
        loaded.append(path)
        return ColourModel()

    monkeypatch.setattr(run, "load_model", load_model)
    run.main(arguments(folder, "--model", "stub=some/folder", "--model", "other/folder"))
    assert loaded == ["some/folder", "other/folder"]
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    rows = {(row["system"], row["modality"]): row["metrics"] for row in report["rows"]}
    modalities = ("both", "text", "image")
    assert list(rows) == [("chance", "-"), ("bm25", "text")] + [(n, m) for n in ("stub", "folder") for m in modalities]
    assert rows["chance", "-"]["recall@4"] == pytest.approx(4 / 24)
    assert rows["stub", "both"]["recall@4"] == rows["stub", "image"]["recall@4"] == 1.0
    assert rows["chance", "-"]["recall@4"] < rows["stub", "text"]["recall@4"] < 1.0
    assert rows["bm25", "text"]["recall@4"] > rows["chance", "-"]["recall@4"]
    assert report["facts"]["queries"] == report["facts"]["notes"] == 25
    assert "stub    both" in capsys.readouterr().out


def test_a_model_that_reads_text_alone_gets_one_row(folder: Path) -> None:
    split = run.load_notes_and_related(folder / "notes.arrow", folder / "pairs.parquet")
    rows = run.evaluate_model(ColourModel(None), split.notes, split.related, name="text only", ks=(4,))
    assert [(row.system, row.modality) for row in rows] == [("text only", "text")]


def test_heads_train_on_the_folders_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen encoders are replaced: what is tested is which features reach which head."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(baselines, "TextEncoder", lambda path, size: lambda notes: rng.normal(size=(len(notes), 6)))
    monkeypatch.setattr(
        baselines,
        "ImageEncoder",
        lambda path, size: lambda notes: ColourModel().encode(notes, batch_size=1, show_progress_bar=False),
    )
    names = ["head-both", "head-text", "head-image", "frozen-image"]
    needed = ["--train", str(folder), "--validation", str(folder), "--text-encoder", "t", "--vision", "v"]
    needed += ["--head-steps", "40"]
    run.main(arguments(folder, "--baselines", *names, *needed))
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    recall = {row["system"]: row["metrics"]["recall@4"] for row in report["rows"]}
    assert list(recall) == names
    assert recall["head-image"] == recall["frozen-image"] == 1.0
    assert recall["head-both"] > recall["head-text"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--baselines"], "nothing to evaluate"),
        (["--baselines", "frozen-text"], "'frozen-text' needs text_encoder"),
        (["--baselines", "head-image", "--vision", "v"], r"needs train \(--train\), validation \(--validation\)"),
        (["--ks", "0"], "ks must be"),
    ],
)
def test_bad_options_are_refused(
    folder: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments(folder, *more))
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_help_names_every_option() -> None:
    text = run.build_parser().format_help()
    for option in ("--model", "--notes", "--pairs", "--output", "--ks", "--modalities", "--baselines", "--train"):
        assert option in text
