"""The command, end to end, with a stub in the model's place: tables in, report out."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from evaluation import baselines, run
from evaluation.lexical import note_text
from evaluation.systems import System
from modeling_notellm2 import NoteLLM2Model
from pairs.query import PairOptions
from pairs.split import SplitOptions, make_splits
from pairs.tables import load_notes, write_table
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
    images = [str(tmp_path / f"{COLOURS[i % 5]}.jpg") for i in range(25)]
    for colour in COLOURS:
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{colour}.jpg")
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

    def load_model(path: str, _dtype: torch.dtype) -> ColourModel:
        loaded.append(path)
        return ColourModel()

    monkeypatch.setattr(run, "check_model", lambda *_: None)
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


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is a `ColourModel`."""
    monkeypatch.setattr(run, "check_model", lambda *_: None)
    monkeypatch.setattr(run, "load_model", lambda *_: ColourModel())


@pytest.mark.parametrize("option", ["--model", "--zero-shot-multimodal-llm"])
def test_models_of_another_kind_are_refused_before_anything_runs(
    folder: Path,
    llm_folder: Callable[[str], Path],
    option: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "baseline_systems", lambda *_: pytest.fail("a baseline ran"))
    kinds = {
        str(llm_folder("llama")): "'llama'",
        "nowhere/to/be/found": "no such folder",
        str(folder): "no config.json",
    }
    for path, message in kinds.items():
        with pytest.raises(SystemExit, match="2"):
            run.main(arguments(folder, option, path))
        assert re.search(f"model='{re.escape(path)}'.*{message}", " ".join(capsys.readouterr().err.split()))


def test_what_cannot_be_measured_does_not_lose_the_rest(
    folder: Path, stub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no such measure")

    monkeypatch.setattr(run, "reliance", fail)
    with pytest.raises(SystemExit, match="Not measured:\\nWhat stub relies on: ValueError: no such measure"):
        run.main(arguments(folder, "--model", "stub=x"))
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    assert ("stub", "image") in {(row["system"], row["modality"]) for row in report["rows"]}
    (failed,) = [section for section in report["sections"] if section["title"] == "What could not be measured"]
    assert failed["text"] == ["What stub relies on: ValueError: no such measure"]
    monkeypatch.setattr(run, "load_model", fail)
    with pytest.raises(SystemExit, match="Not measured:\\nstub: ValueError: no such measure"):
        run.main(arguments(folder, "--model", "stub=x"))
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    assert [row["system"] for row in report["rows"]] == ["chance", "bm25"]


def test_a_row_that_cannot_be_measured_does_not_lose_the_others(
    folder: Path, stub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the models' rows, not the baselines', and the reference that is missing is replaced."""

    class Overflowing(ColourModel):
        def encode(self, *arguments: Any, **settings: Any) -> np.ndarray:
            return super().encode(*arguments, **settings) * np.inf

    def load_model(path: str, _dtype: torch.dtype) -> ColourModel:
        if path == "gone":
            raise KeyError("a weight")
        return Overflowing() if path == "bad" else ColourModel()

    monkeypatch.setattr(run, "load_model", load_model)
    monkeypatch.setattr(run, "is_missing_folder", lambda _: False)
    monkeypatch.setattr(baselines, "TextEncoder", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("too large")))
    models = ["--model", "bad=bad", "--model", "gone=gone", "--model", "good=x", "--compare-to", "bad"]
    with pytest.raises(SystemExit, match="Not measured"):
        run.main(
            arguments(folder, *models, "--baselines", "frozen-text", "bm25", "--text-encoder", "t/e/x", "--no-reliance")
        )
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    assert [row["system"] for row in report["rows"]] == ["bm25", "good", "good", "good"]
    failed = " ".join(sections_of(folder)["What could not be measured"]["text"])
    for message in (
        "frozen-text: OutOfMemoryError: too large",
        "bad (both): ValueError",
        "gone: KeyError",
        "bad has no row",
    ):
        assert message in failed
    assert "minus that of bm25 (text)" in sections_of(folder)["How sure are we?"]["tables"][0]["caption"]


def test_images_of_training_notes_are_tried_first_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    table = {"note_id": ["a", "b"], "content": ["one", "two"], "image": [str(tmp_path / "broken.jpg"), None]}
    (tmp_path / "train").mkdir()
    write_table(Dataset.from_dict(table), tmp_path / "train" / "notes.arrow")
    columns = {"note_id": ["a"], "related_note_id": ["b"], "score": [1.0], "rank": [1]}
    Dataset.from_dict(columns).to_parquet(tmp_path / "train" / "pairs.parquet")
    monkeypatch.setattr(run, "baseline_systems", lambda *_: pytest.fail("a baseline ran"))
    needed = ["--train", str(tmp_path / "train"), "--validation", str(folder), "--vision", "v/i/t"]
    monkeypatch.setattr(run, "is_missing_folder", lambda _: False)
    monkeypatch.setattr(run, "check_tower", lambda _: None)
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments(folder, "--baselines", "head-image", *needed))
    assert "note_id 'a'" in capsys.readouterr().err


def test_folders_that_cannot_be_written_or_hold_no_pairs_are_refused_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "baseline_systems", lambda *_: pytest.fail("a baseline ran"))
    (folder / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        run.main([*arguments(folder), "--output", str(folder / "file")])
    assert "file" in capsys.readouterr().err
    columns = {"note_id": [], "related_note_id": [], "score": [], "rank": []}
    Dataset.from_dict(columns).to_parquet(folder / "none.parquet")
    with pytest.raises(SystemExit, match="2"):
        run.main([*arguments(folder), "--pairs", str(folder / "none.parquet")])
    assert "none.parquet" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run.main(["--splits", str(folder), "--output", str(folder / "report")])
    assert "no folder that pairs.split wrote" in capsys.readouterr().err


def test_the_sheet_shows_the_reference_then_models_then_the_best_baselines(folder: Path, stub: None) -> None:
    test = run.load_notes_to_find(folder / "notes.arrow", folder / "pairs.parquet")
    findings = run.Findings((4,))
    model = run.model_systems(ColourModel(), test.notes, name="stub")
    findings.add([*run.baseline_systems(["bm25", "tfidf"], run.BaselineInputs(test.notes)), *model], test.task)
    by_name = {one.system.label: one for one in findings.measured}
    shown = run.sheet_systems(findings.measured, by_name["tfidf (text)"], "recall@4")
    assert [one.system.label for one in shown] == ["tfidf (text)", "stub (both)", "bm25 (text)"]
    (text,) = run.sheet_section(test, findings.measured, None, (4,), 2, 0).text
    assert "Not shown" not in text
    others = [System(f"other {n}", "text", model[1].scores, {}, {}) for n in range(3)]
    findings.add(others, test.task)
    (text,) = run.sheet_section(test, findings.measured, None, (4,), 2, 0).text
    assert "Not shown, as the sheet has room for 4, the reference, then models, then baselines" in text
    assert text.endswith("before the worse: bm25, tfidf.")


def test_images_are_tried_first(folder: Path, stub: None, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "red.jpg").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments(folder, "--model", "stub=x"))
    assert "note_id 'n0'" in capsys.readouterr().err
    run.main(arguments(folder))  # words alone: nothing is the matter
    run.main(arguments(folder, "--model", "stub=x", "--bad-images", "text-only"))
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    blank = {row["modality"]: row["details"]["blank_notes"] for row in report["rows"] if row["system"] == "stub"}
    assert blank == {"both": 0, "text": 0, "image": 5}
    # What a tower's store reads, too.
    found = run.load_notes_to_find(folder / "notes.arrow", folder / "pairs.parquet", bad_images="text-only")
    assert found.table["image"][:] == [note["image"] for note in found.notes] and found.table["image"][0] is None


def test_weights_have_the_dtype_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    monkeypatch.setattr(run, "load_model", lambda _, dtype: seen.append(dtype) or pytest.fail())
    options = run.build_parser().parse_args(["--dtype", "float16", "--output", "x", "--splits", "x"])
    with pytest.raises(pytest.fail.Exception):
        run.evaluate_named_model("n", "p", False, None, options, run.Findings((1,)))  # type: ignore[arg-type]
    assert seen == [torch.float16]


def test_names_and_paths(tmp_path: Path) -> None:
    """A study's folders have "=" in their names."""
    folder = tmp_path / "variant=basic-seed0"
    folder.mkdir()
    assert run.named_path(str(folder)) == (folder.name, str(folder))
    assert run.named_path(f"basic={folder}") == ("basic", str(folder))


def test_a_model_that_reads_text_alone_gets_one_row(folder: Path) -> None:
    split = run.load_notes_and_related(folder)
    rows = run.evaluate_model(ColourModel(None), split.notes, split.related, name="text only", ks=(4,))
    assert [(row.system, row.modality) for row in rows] == [("text only", "text")]


def test_heads_train_on_the_folders_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen encoders are replaced: what is tested is which features reach which head."""

    class Noise:
        num_parameters = 7

        def __init__(self, *_: Any) -> None:
            self.rng = np.random.default_rng(0)

        def __call__(self, notes: Sequence[Mapping[str, Any]]) -> np.ndarray:
            return self.rng.normal(size=(len(notes), 6))

    class Colours(Noise):
        def __call__(self, notes: Sequence[Mapping[str, Any]]) -> np.ndarray:
            return ColourModel().encode(notes, batch_size=1, show_progress_bar=False)

    monkeypatch.setattr(run, "check_tower", lambda _: None)
    monkeypatch.setattr(baselines, "TextEncoder", Noise)
    monkeypatch.setattr(baselines, "ImageEncoder", Colours)
    names = ["head-both", "head-text", "head-image", "frozen-image"]
    needed = ["--train", str(folder), "--validation", str(folder), "--text-encoder", "t", "--vision", "v"]
    needed += ["--head-steps", "40"]
    run.main(arguments(folder, "--baselines", *names, *needed))
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    recall = {row["system"]: row["metrics"]["recall@4"] for row in report["rows"]}
    assert list(recall) == names
    assert recall["head-image"] == recall["frozen-image"] == 1.0
    assert recall["head-both"] > recall["head-text"]
    costs = {row["system"]: row["cost"] for row in report["rows"]}
    assert costs["head-both"]["made_of"] == "head on text encoder t, tower v"
    assert costs["frozen-image"].pop(baselines.clock_name()) >= 0
    assert costs["frozen-image"].pop("shared_with") == ["head-both"]  # which was asked for first
    assert costs["frozen-image"] == {"made_of": "tower v", "parameters": 7, "dimensions": 5, "notes": 25}


@pytest.mark.parametrize("option", ["llm", "vision"])
def test_encoders_of_another_kind_are_refused_before_anything_runs(
    folder: Path,
    option: str,
    llm_folder: Callable[[str], Path],
    tower_folder: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "baseline_systems", lambda *_: pytest.fail("a baseline ran"))
    path = tower_folder("clip") if option == "llm" else llm_folder("qwen2")
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments(folder, f"--{option}", str(path)))
    said = " ".join(capsys.readouterr().err.split())
    assert f"error: {option}='{path}' is a " in said and "give" in said


def test_what_a_checkpoint_was_made_of_is_said_by_its_run(tmp_path: Path) -> None:
    assert run.composition_of(str(tmp_path)) == run.composition_of("org/model") == {}
    (tmp_path / "settings.yaml").write_text("composition: {llm: a/b, vision: null}\ntraining: {seed: 1}\n")
    (tmp_path / "checkpoint-20").mkdir()
    for name in (".", "checkpoint-20"):
        assert run.composition_of(str(tmp_path / name)) == {"llm": "a/b", "vision": None}
    assert run.composition_of(str(tmp_path / "other")) == {}
    for text in ("", "composition: null", "composition: [a]", "- a", "composition: {", "other: {}"):
        (tmp_path / "settings.yaml").write_text(text)
        assert run.composition_of(str(tmp_path)) == {}


def test_log_lines_of_libraries_are_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, as the loggers are the process's."""
    code = (
        "import logging; from evaluation.run import start_logging\n"
        "{start}\n"
        "for name in ('huggingface_hub.file_download', 'datasets.load', 'transformers.utils', 'evaluation.x'):\n"
        "    logging.getLogger(name).error('line of ' + name)\n"
        "logging.getLogger('httpx').info('line of httpx')\n"
    )
    starts = {"start_logging()": 1, "logging.basicConfig(level=logging.INFO)": 2}
    for start, times in starts.items():  # the second is the control
        process = subprocess.run(
            [sys.executable, "-c", code.format(start=start)],
            env=os.environ | {"CI": "true"},  # where transformers hands its lines on, too
            capture_output=True,
            text=True,
            check=True,
        )
        for name in ("huggingface_hub.file_download", "datasets.load", "transformers.utils"):
            assert process.stderr.count(f"line of {name}") == times
        assert process.stderr.count("line of evaluation.x") == 1
        assert process.stderr.count("line of httpx") == times - 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--baselines"], "nothing to evaluate"),
        (["--baselines", "frozen-text"], "'frozen-text' needs text_encoder"),
        (["--baselines", "head-image", "--vision", "v"], r"needs train \(--train\), validation \(--validation\)"),
        (["--ks", "0"], "ks must be"),
        (["--splits", "splits"], "give --splits, or --notes and --pairs"),
        (["--train-views", "views.csv"], "--train-views needs --splits"),
        (["--compare-to", "nobody"], r"'nobody' is none of bm25, bm25 \(text\)"),
        (["--compare-to", "bm25 (image)"], r"'bm25 \(image\)' is none of bm25, bm25 \(text\)"),
        (["--compare-to", "chance"], r"'chance' is none of bm25, bm25 \(text\); chance is a computed expectation, and"),
        (["--baselines", "bm25", "bm25"], "--baselines names bm25 twice"),
        (["--attention-pairs", "4"], "needs a --model"),
        (["--vision", "/no/such/tower"], "--vision /no/such/tower: no such folder"),
        (["--model", "a/best", "--model", "b/best"], "two rows would be called 'best'"),
        (["--model", "bm25=a"], "two rows would be called 'bm25'"),
        (["--attention-pairs", "1", "--model", "a"], "one pair has no negatives"),
    ],
)
def test_bad_options_are_refused(
    folder: Path,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "check_tower", lambda _: None)
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
    folder: Path, stub: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run.main(arguments(folder, "--model", "stub=some/folder", "--baselines", "bm25", "tfidf"))
    assert "stub: Without images recall@4 falls" in capsys.readouterr().out
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    (stub,) = [row for row in report["rows"] if (row["system"], row["modality"]) == ("stub", "text")]
    low, high = stub["intervals"]["recall@4"]
    assert low < stub["metrics"]["recall@4"] < high
    sections = sections_of(folder)
    assert list(sections) == ["How sure are we?", "Slices", "Does stub look at the picture?", "Look for yourself"]
    (table,) = sections["How sure are we?"]["tables"]
    compared = {row[0]: row[1] for row in table["rows"]}
    assert table["caption"].endswith("minus that of stub (both), on the same queries")
    assert set(compared) == {"bm25 (text)", "tfidf (text)", "stub (text)", "stub (image)"}
    assert compared["stub (text)"] < 0 == compared["stub (image)"]
    worse, same, rule = sections["How sure are we?"]["text"]
    assert worse.startswith("By recall@4, worse than stub (both), and by more than luck: bm25 (text) (by 0.")
    assert same == "The same as stub (both) on every query: stub (image)." and "raised for 4 comparisons" in rule
    (slices,) = sections["Slices"]["tables"]
    assert [row[0] for row in slices["rows"]] == ["short query", "short target"]
    html = (folder / "report" / "report.html").read_text(encoding="utf-8")
    assert "Look for yourself" in html and "Without images" in html


def test_the_reference_can_be_chosen_and_parts_left_out(folder: Path, stub: None) -> None:
    more = ["--compare-to", "stub (text)", "--no-reliance", "--sheet-queries", "0"]
    run.main(arguments(folder, "--model", "stub=x", *more))
    sections = sections_of(folder)
    assert list(sections) == ["How sure are we?", "Slices"]
    assert "minus that of stub (text)" in sections["How sure are we?"]["tables"][0]["caption"]


def splits_with_views(folder: Path, by: str) -> list[str]:
    """Splits of the folder's notes by a log of random views, with the log: the options of the command."""
    rng = np.random.default_rng(0)
    rows = sorted({(f"u{rng.integers(12)}", f"n{rng.integers(25)}", int(rng.integers(10**6))) for _ in range(500)})
    columns = dict(zip(("user_id", "note_id", "timestamp"), map(list, zip(*rows, strict=True)), strict=True))
    Dataset.from_dict(columns).to_parquet(folder / "views.parquet")
    notes, views = load_notes(folder / "notes.arrow"), Dataset.from_dict(columns)
    split = SplitOptions(by="note", validation=0.2, test=0.4)
    if by == "time":
        split = SplitOptions(by="time", validation_days=2, test_days=3)
    make_splits(notes, views, PairOptions(score="cosine", top_k=5), split, folder / "splits")
    where = ["--splits", str(folder / "splits"), "--output", str(folder / "report"), "--ks", "2"]
    return [*where, "--train-views", str(folder / "views.parquet"), "--sheet-queries", "2"]


def test_a_baseline_that_knows_nothing_has_no_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured by the one order of ties, it would be luck: best of a column, and another number in every comparison."""
    options = splits_with_views(folder, "note")
    run.main([*options, "--baselines", "popularity", "item-cf", "bm25", "--compare-to", "popularity"])
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    assert [row["system"] for row in report["rows"]] == ["bm25"]
    said = sections_of(folder)["What to know of the rows"]["text"]
    for name in ("popularity", "item-cf"):
        assert (
            f"{name} knows nothing here and has no row: nobody viewed any of the 10 notes in training, so it is "
            "chance; split by time to measure it."
        ) in said
    assert "popularity has no row: others are compared with bm25 (text)." in said
    assert "popularity" not in capsys.readouterr().out
    run.main([*options, "--baselines", "popularity"])  # nothing is left: what it is, chance, is shown
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    assert [row["system"] for row in report["rows"]] == ["chance"]
    assert list(sections_of(folder)) == ["What to know of the rows"]


def test_a_baseline_that_knows_some_notes_has_a_row(folder: Path) -> None:
    run.main([*splits_with_views(folder, "time"), "--baselines", "popularity", "item-cf"])
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    assert [row["system"] for row in report["rows"]] == ["popularity", "item-cf"]


def test_baselines_that_score_all_notes_alike_have_no_row() -> None:
    notes = [{"note_id": str(number), "content": f"word{number}"} for number in range(6)]  # no two share a word
    related = [np.array([(number + 1) % 6]) for number in range(6)]
    rows = run.evaluate_baselines(notes, related, ["bm25", "chance"], ks=(2,))
    assert [row.system for row in rows] == ["chance"] and rows[0].is_bound
    notes[0]["content"] = notes[1]["content"]
    rows = run.evaluate_baselines(notes, related, ["bm25", "chance"], ks=(2,))  # control
    assert [row.system for row in rows] == ["bm25", "chance"]


def test_a_model_that_scores_all_notes_alike_has_no_row(folder: Path, stub: None) -> None:
    class Blind(ColourModel):
        def encode(self, *arguments: Any, **settings: Any) -> np.ndarray:
            return np.ones_like(super().encode(*arguments, **settings))

    test = run.load_notes_to_find(folder / "notes.arrow", folder / "pairs.parquet")
    findings = run.Findings((4,))
    findings.add(run.model_systems(Blind(), test.notes, name="blind", modalities=["both"]), test.task)
    assert findings.measured == [] == findings.failures
    assert findings.remarks == [
        "blind (both) knows nothing here and has no row: it scores all notes of a pool alike, so it is chance."
    ]


def test_a_model_without_images_to_read_is_measured_on_its_text_and_it_is_said(folder: Path, stub: None) -> None:
    table = load_notes(folder / "notes.arrow")
    write_table(table.remove_columns("image"), folder / "words.arrow")
    run.main([*arguments(folder, "--model", "stub=x"), "--notes", str(folder / "words.arrow")])
    said = sections_of(folder)["What to know of the rows"]["text"]
    assert said == ["No note has an image (column image): stub is measured on its text alone."]
    run.main(arguments(folder, "--model", "stub=x"))  # control
    assert "What to know of the rows" not in sections_of(folder)


def test_what_was_asked_for_and_not_measured_is_said(folder: Path, stub: None) -> None:
    run.main(arguments(folder, "--model", "stub=x", "--modalities", "both", "text", "--attention-pairs", "4"))
    relies, looks = sections_of(folder)["What to know of the rows"]["text"]
    assert relies.startswith("What stub relies on was not measured: it needs --modalities both text image")
    assert looks == "Where stub looks was not measured: it is no NoteLLM-2."
    run.main(arguments(folder, "--model", "stub=x", "--modalities", "both", "text", "--no-reliance"))  # control
    assert "What to know of the rows" not in sections_of(folder)


def test_one_query_says_so_in_place_of_tests_and_slices(folder: Path, stub: None) -> None:
    pairs = {"note_id": ["n1"], "related_note_id": ["n6"], "score": [1.0], "rank": [1]}
    Dataset.from_dict(pairs).to_parquet(folder / "one.parquet")
    run.main([*arguments(folder, "--model", "stub=x"), "--pairs", str(folder / "one.parquet")])
    sections = sections_of(folder)
    assert sections["How sure are we?"]["text"] == [
        "One query cannot tell any difference from stub (both) from luck: evaluate more of them."
    ]
    assert sections["How sure are we?"]["tables"] == [] and "Slices" not in sections
    markdown = (folder / "report" / "report.md").read_text(encoding="utf-8")
    (chance,) = [line for line in markdown.splitlines() if line.startswith("| chance | - | 0")]
    assert "**" not in chance and "**" in markdown  # it is no system


def test_the_papers_protocol_has_other_queries(folder: Path, stub: None) -> None:
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
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    costs = {(row["system"], row["modality"]): row["cost"] for row in report["rows"]}
    assert costs["chance", "-"] == {"made_of": "a random order"}
    assert costs["bm25", "text"]["made_of"] == "words" and "dimensions" not in costs["bm25", "text"]
    for modality in ("both", "text", "image"):
        cost = costs["tiny", modality]
        assert cost["made_of"] == "LLM llama, tower clip_vision_model" and cost["dimensions"] == 16
        assert cost["parameters"] == compose().num_parameters() and cost[baselines.clock_name()] > 0
        assert ("left_out" in cost) == (modality != "text")  # the store has what the tower sees
    sections = sections_of(tmp_path)
    assert (tmp_path / "store").is_dir()
    explained, made_of_it = sections["Where the LLM looks"]["text"]
    assert "n_m is the note's state" in explained and "n_v is the image's state" in explained
    assert "Neither says that the image helps" in made_of_it
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
    costs = [row["cost"] for row in report["rows"]]
    assert all(cost["made_of"] == "multimodal LLM qwen2_vl (qwen2_vl)" for cost in costs)
    assert all(cost["dimensions"] == 32 and "left_out" not in cost for cost in costs)
