"""The command, end to end, with a stub in the model's place: tables in, report out."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from evaluation import baselines, run
from evaluation.lexical import note_text
from modeling_notellm2 import NoteLLM2Model
from pairs.tables import write_table
from tests.backbones import save
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


def test_a_model_of_another_kind_is_refused(llm_folder: Callable[[str], Path]) -> None:
    options = run.build_parser().parse_args(["--model", str(llm_folder("llama")), "--output", "x"])
    with pytest.raises(SystemExit, match="is a LlamaModel, no NoteLLM-2"):
        list(run.opened_models(options))


def test_names_and_paths(tmp_path: Path) -> None:
    """A study's folders have "=" in their names."""
    folder = tmp_path / "variant=basic-seed0"
    folder.mkdir()
    assert run.named_path(str(folder)) == (folder.name, str(folder))
    assert run.named_path(f"basic={folder}") == ("basic", str(folder))
    with pytest.raises(SystemExit, match="--model nowhere/to/be/found"):
        list(run.opened_models(run.build_parser().parse_args(["--model", "nowhere/to/be/found", "--output", "x"])))


def test_a_model_that_reads_text_alone_gets_one_row(folder: Path) -> None:
    split = run.load_notes_and_related(folder)
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
        (["--splits", "splits"], "give --splits, or --notes and --pairs"),
        (["--train-views", "views.csv"], "--train-views needs --splits"),
        (["--compare-to", "nobody"], "'nobody' is none of chance, bm25"),
        (["--model", "a/best", "--model", "b/best"], "two rows would be called 'best'"),
        (["--model", "bm25=a"], "two rows would be called 'bm25'"),
        (["--attention-pairs", "1"], "one pair has no negatives"),
    ],
)
def test_bad_options_are_refused(
    folder: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments(folder, *more))
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_help_names_every_option_and_baseline() -> None:
    text = "".join(run.build_parser().format_help().split())  # it wraps lines at hyphens
    for word in ("--model", "--splits", "--protocol", "--compare-to", "--attention-pairs", *baselines.BASELINES):
        assert word in text


def sections_of(folder: Path) -> dict[str, dict[str, Any]]:
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    return {section["title"]: section for section in report["sections"]}


def test_says_how_sure_it_is_and_whether_the_model_looks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "load_model", lambda path: ColourModel())
    run.main(arguments(folder, "--model", "stub=some/folder", "--baselines", "bm25", "tfidf"))
    assert "stub: Without images recall@4 falls" in capsys.readouterr().out
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    (stub,) = [row for row in report["rows"] if (row["system"], row["modality"]) == ("stub", "text")]
    low, high = stub["intervals"]["recall@4"]
    assert low < stub["metrics"]["recall@4"] < high
    sections = sections_of(folder)
    assert list(sections) == ["How sure", "Slices", "Does stub look at the picture?", "Look for yourself"]
    (table,) = sections["How sure"]["tables"]
    compared = {row[0]: row[1] for row in table["rows"]}
    assert table["caption"].endswith("minus that of stub (both), on the same queries")
    assert set(compared) == {"bm25 (text)", "tfidf (text)", "stub (text)", "stub (image)"}
    assert compared["stub (text)"] < 0 == compared["stub (image)"]
    (slices,) = sections["Slices"]["tables"]
    assert [row[0] for row in slices["rows"]] == ["short query", "short target"]
    html = (folder / "report" / "report.html").read_text(encoding="utf-8")
    assert "Look for yourself" in html and "Without images" in html


def test_the_reference_can_be_chosen_and_parts_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "load_model", lambda path: ColourModel())
    more = ["--compare-to", "stub (text)", "--no-reliance", "--sheet-queries", "0"]
    run.main(arguments(folder, "--model", "stub=x", *more))
    sections = sections_of(folder)
    assert list(sections) == ["How sure", "Slices"]
    assert "minus that of stub (text)" in sections["How sure"]["tables"][0]["caption"]


def test_the_papers_protocol_has_other_queries(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "load_model", lambda path: ColourModel())
    run.main(arguments(folder, "--model", "stub=x", "--protocol", "paper"))
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    assert report["facts"]["protocol"] == "paper" and report["facts"]["queries"] == 10  # of five notes two pairs
    (chance, *_rest) = report["rows"]
    assert chance["metrics"]["recall@4"] == pytest.approx(4 / 15) == chance["metrics"]["hit_rate@4"]


def test_a_folder_of_splits_and_a_trained_model(
    splits_folder: Path, compose: Callable[..., NoteLLM2Model], tmp_path: Path
) -> None:
    """With a real, tiny model: subsets, heads on training notes, attention, the store."""
    checkpoint = save(compose(), tmp_path / "model")
    run.main(
        [
            *("--splits", str(splits_folder), "--model", f"tiny={checkpoint}", "--output", str(tmp_path / "report")),
            *("--attention-pairs", "4", "--vision-features-dir", str(tmp_path / "store"), "--ks", "5"),
        ]
    )
    sections = sections_of(tmp_path)
    assert "Where the LLM looks" in sections and (tmp_path / "store").is_dir()
    (slices,) = sections["Slices"]["tables"]
    assert {"short query", "head query", "tail target"} <= {row[0] for row in slices["rows"]}
    (attention,) = sections["Where the LLM looks"]["tables"]
    assert len(attention["rows"]) == 2 and sum(attention["rows"][0][5:]) == pytest.approx(1, abs=1e-3)


def test_a_multimodal_llm_without_training_has_rows(
    splits_folder: Path, multimodal_llm_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = ["--splits", str(splits_folder), "--output", str(tmp_path / "report"), "--ks", "5", "--baselines"]
    run.main([*arguments, "--zero-shot-multimodal-llm", str(multimodal_llm_folder("qwen2_vl")), "--no-reliance"])
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    rows = {(row["system"], row["modality"]): row["metrics"]["recall@5"] for row in report["rows"]}
    assert list(rows) == [("zero-shot qwen2_vl", modality) for modality in ("both", "text", "image")]
    assert rows["zero-shot qwen2_vl", "text"] != rows["zero-shot qwen2_vl", "image"]
