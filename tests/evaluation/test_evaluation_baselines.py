"""The registry: each baseline asks for what it needs, gets it once, and gives the scores that its parts give."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from evaluation import baselines
from evaluation.baselines import (
    BASELINES,
    BaselineInputs,
    NotesAndRelated,
    baseline_scores,
    check_baselines,
    clock_name,
    timed,
)
from evaluation.collaborative import item_cf_scores, popularity_scores
from evaluation.encoders import normalized
from evaluation.head import HeadSettings
from evaluation.lexical import bm25_scores, note_text, tfidf_scores
from evaluation.metrics import retrieval_metrics

HEAD = HeadSettings(hidden_dim=32, embedding_dim=16, steps=40, batch_pairs=64, eval_steps=20, learning_rate=5e-3)
SHORT = replace(HEAD, steps=2)


def make_notes(count: int, seed: int) -> list[dict[str, Any]]:
    """Notes of five hidden kinds; text and image each tell one of them now and then, and some notes lack one."""
    rng = np.random.default_rng(seed)
    notes: list[dict[str, Any]] = []
    for number in range(count):
        kind = int(rng.integers(5))
        note: dict[str, Any] = {"note_id": f"{seed}-{number}", "kind": kind, "noise": rng.normal(size=(4, 8))}
        if number % 7 != 1:
            note["title"] = f"kind{kind} word{rng.integers(9)}"
        if number % 5 != 2:
            note["image"] = f"{kind}.jpg"
        notes.append(note)
    return notes


def related_of(notes: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    kinds = np.array([note["kind"] for note in notes])
    return [np.flatnonzero((kinds == kind) & (np.arange(len(kinds)) != place)) for place, kind in enumerate(kinds)]


class FakeEncoder:
    """In a frozen encoder's place: a noisy code of the kind, of unit length, zero without the field that it reads."""

    made: list[tuple[str, str]] = []

    def __init__(self, name: str, field: str, place: int, width: int, shared: float = 0.0) -> None:
        self.name, self.field, self.place, self.width, self.shared = name, field, place, width, shared
        self.num_parameters = 10**place

    def __call__(self, notes: Sequence[Mapping[str, Any]]) -> np.ndarray:
        FakeEncoder.made.append((self.name, notes[0]["note_id"]))
        codes = np.random.default_rng(self.place).normal(size=(5, self.width))
        vectors = [
            (self.field in n) * (self.shared + codes[n["kind"]] + n["noise"][self.place, : self.width]) for n in notes
        ]
        return normalized(np.array(vectors)).astype(np.float32)


class FakeDualEncoder:
    def __init__(self, path: str, batch_size: int, dtype: torch.dtype) -> None:
        self.texts, self.images = FakeEncoder("clip-text", "title", 1, 8), FakeEncoder("clip-image", "image", 1, 8)
        self.num_parameters = 10


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> BaselineInputs:
    FakeEncoder.made = []
    monkeypatch.setattr(baselines, "TextEncoder", lambda *_: FakeEncoder("text", "title", 0, 6))
    monkeypatch.setattr(baselines, "ImageEncoder", lambda *_: FakeEncoder("image", "image", 2, 7))
    monkeypatch.setattr(baselines, "DualEncoder", FakeDualEncoder)
    monkeypatch.setattr(baselines, "LLMEncoder", lambda *_: FakeEncoder("llm", "title", 3, 8, 40.0))
    notes, train, validation = make_notes(60, 0), make_notes(90, 1), make_notes(50, 2)
    viewed = np.random.default_rng(3).random((60, 20)) < 0.2
    return BaselineInputs(
        notes,
        text_encoder="t",
        vision="v",
        clip="c",
        llm="l",
        train=NotesAndRelated(train, related_of(train)),
        validation=NotesAndRelated(validation, related_of(validation)),
        viewers=csr_array(viewed.astype(np.int32)),
        head=HEAD,
    )


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_gives_finite_scores_of_all_notes(name: str, inputs: BaselineInputs) -> None:
    inputs.head = SHORT
    modality, scores, details, cost = baseline_scores(name, inputs)
    assert cost["made_of"] and 0 <= cost[baselines.clock_name()] < 60 and cost["notes"] == 60
    if isinstance(scores, np.ndarray):
        assert scores.shape[0] == 60
        scores = scores @ scores.T
    else:
        scores = scores(np.arange(60))
    assert scores.shape == (60, 60)
    assert np.isfinite(scores).all() and scores.std() > 0
    num_texts, num_images = (sum(field in note for note in inputs.notes) for field in ("title", "image"))
    num_either = sum("title" in note or "image" in note for note in inputs.notes)
    blank = {"text": 60 - num_texts, "image": 60 - num_images, "both": 60 - num_either}
    assert details == ({"cold_notes": 0} if modality == "-" else {"blank_notes": blank[modality]})
    # What does not stand in `needs` is not needed.
    fields = {field: getattr(inputs, field) for field in BASELINES[name].needs}
    baseline_scores(name, BaselineInputs(inputs.notes, head=SHORT, **fields))


def test_costs_are_those_of_the_parts(inputs: BaselineInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs.head, inputs.text_encoder = SHORT, "org/encoder"
    clock = iter(range(1000))
    monkeypatch.setattr(baselines, "clock_name", lambda: "cpu_seconds")
    monkeypatch.setattr(baselines.time, "process_time", lambda: float(next(clock)))  # whatever is timed takes a second
    costs = {name: baseline_scores(name, inputs).cost for name in BASELINES}
    one = {"cpu_seconds": 1, "notes": 60}
    assert costs["bm25"] == {"made_of": "words", **one}
    assert costs["item-cf"] == {"made_of": "views in training", **one}
    assert costs["frozen-text"] == {"made_of": "text encoder org/encoder", "parameters": 1, **one}
    assert costs["clip-text"] == {"made_of": "dual encoder c", "parameters": 10, **one}
    shared = costs["clip-sum"].pop("shared_with")  # one model, two passes
    assert costs["clip-sum"] == {"made_of": "dual encoder c", "parameters": 10, "cpu_seconds": 2, "notes": 60}
    head = costs["head-both"]
    assert head["made_of"] == "head on text encoder org/encoder, tower v" and head["cpu_seconds"] == 3
    assert shared == ["clip-image", "clip-text"] and head["shared_with"] == ["frozen-image", "frozen-text"]
    assert "shared_with" not in costs["clip-image"] | costs["zero-shot-llm"] | costs["bm25"]
    hidden, width = SHORT.hidden_dim, SHORT.embedding_dim
    assert head["parameters"] == 1 + 100 + (13 * hidden + hidden) + (hidden * width + width)
    # Each kind was encoded once a split, though several baselines asked.
    assert len(FakeEncoder.made) == len(set(FakeEncoder.made))


@pytest.mark.parametrize(("has_gpu", "clock"), [(True, "seconds"), (False, "cpu_seconds")])
def test_what_a_gpu_does_is_timed_by_the_clock(has_gpu: bool, clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes on while the process sleeps; the time of processors does not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    _, seconds = timed(lambda: time.sleep(0.2))
    assert clock_name() == clock and (seconds > 0.19) == has_gpu


def test_scores_are_those_of_the_parts(inputs: BaselineInputs) -> None:
    texts = [note_text(note) for note in inputs.notes]
    assert inputs.viewers is not None
    for name, score in (
        ("popularity", popularity_scores(inputs.viewers)),
        ("item-cf", item_cf_scores(inputs.viewers)),
        ("bm25", bm25_scores(texts)),
        ("tfidf", tfidf_scores(texts)),
    ):
        found = baseline_scores(name, inputs).scores
        assert not isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found(np.arange(60)), score(np.arange(60)))
    for name, source in (("frozen-text", "text"), ("frozen-image", "image"), ("zero-shot-llm", "llm")):
        np.testing.assert_allclose(baseline_scores(name, inputs).scores, inputs.features(source), atol=1e-6)


def test_cold_notes_are_counted_and_said(inputs: BaselineInputs, caplog: pytest.LogCaptureFixture) -> None:
    baseline_scores("item-cf", inputs)
    assert not caplog.records
    inputs.viewers = csr_array((60, 0), dtype=np.int32)  # a split by note
    assert baseline_scores("item-cf", inputs).details == {"cold_notes": 60}
    assert "item-cf: nobody viewed 60 of the 60 notes in training" in caplog.text


def test_clip_sum_adds_both_sides_and_takes_the_other_where_one_is_missing(inputs: BaselineInputs) -> None:
    summed = baseline_scores("clip-sum", inputs).scores
    text, image = inputs.features("clip-text"), inputs.features("clip-image")
    np.testing.assert_allclose(summed, normalized(text + image), atol=1e-6)
    lacks_text = [position for position, note in enumerate(inputs.notes) if "title" not in note and "image" in note]
    lacks_image = [position for position, note in enumerate(inputs.notes) if "image" not in note and "title" in note]
    assert lacks_text and lacks_image
    assert isinstance(summed, np.ndarray)
    np.testing.assert_allclose(summed[lacks_text], image[lacks_text], atol=1e-6)
    np.testing.assert_allclose(summed[lacks_image], text[lacks_image], atol=1e-6)
    recall = {
        name: retrieval_metrics(baseline_scores(name, inputs).scores, related_of(inputs.notes), (10,))["recall@10"]
        for name in ("clip-sum", "clip-text", "clip-image")
    }
    assert recall["clip-sum"] > max(recall["clip-text"], recall["clip-image"])


@pytest.mark.parametrize(
    ("both", "alone"), [("head-both", ["head-text", "head-image"]), ("head-llm-both", ["head-llm", "head-image"])]
)
def test_heads_learn_from_what_stands_side_by_side(both: str, alone: list[str], inputs: BaselineInputs) -> None:
    recall = {
        name: retrieval_metrics(baseline_scores(name, inputs).scores, related_of(inputs.notes), (10,))["recall@10"]
        for name in (both, *alone)
    }
    assert recall[both] > max(recall[name] for name in alone)


def test_sides_have_the_same_spread_in_a_head(inputs: BaselineInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []

    def keep(features: np.ndarray, *arguments: Any) -> Any:
        seen.append(features)
        return SimpleNamespace(encode=lambda features: features, parameters=list)

    monkeypatch.setattr(baselines, "train_head", keep)
    baseline_scores("head-llm-both", inputs)
    assert inputs.train is not None
    has_text = np.array(["title" in note for note in inputs.train.notes])
    has_image = np.array(["image" in note for note in inputs.train.notes])
    given = {"llm": inputs.features("llm", "train")[has_text], "image": inputs.features("image", "train")[has_image]}
    shown = {"llm": seen[0][has_text, :8], "image": seen[0][has_image, 8:]}
    spread = {name: np.sqrt(vectors.var(axis=0).sum()) for name, vectors in shown.items()}
    assert spread == pytest.approx({"llm": 1.0, "image": 1.0}, abs=1e-5)
    assert given["llm"].var(axis=0).sum() < 0.05 * given["image"].var(axis=0).sum()  # the control: as they came
    assert not seen[0][~has_text, :8].any()


def test_encoders_run_once_a_split_and_only_where_asked(inputs: BaselineInputs) -> None:
    inputs.head = SHORT
    baseline_scores("frozen-text", inputs)
    assert FakeEncoder.made == [("text", "0-0")]
    for name in ("head-text", "head-both", "frozen-image"):
        baseline_scores(name, inputs)
    assert sorted(FakeEncoder.made) == [(name, f"{split}-0") for name in ("image", "text") for split in range(3)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown", "baselines has 'unknown': choose from popularity, item-cf"),
        ("popularity", r"'popularity' needs viewers \(--train-views\): give it"),
        ("frozen-text", r"'frozen-text' needs text_encoder \(--text-encoder\)"),
        ("clip-sum", r"'clip-sum' needs clip \(--clip\)"),
        ("zero-shot-llm", r"'zero-shot-llm' needs llm \(--llm\)"),
        ("head-llm-both", r"llm \(--llm\), vision \(--vision\), train \(--train\), validation \(--validation\)"),
    ],
)
def test_what_is_missing_is_named(name: str, message: str) -> None:
    inputs = BaselineInputs(make_notes(3, 0))
    for check in (lambda: check_baselines(["bm25", name], inputs), lambda: baseline_scores(name, inputs)):
        with pytest.raises(ValueError, match=message):
            check()


def test_features_and_viewers_that_do_not_fit_are_refused(inputs: BaselineInputs) -> None:
    with pytest.raises(ValueError, match=r"Features 'llm' needs llm \(--llm\), train \(--train\)"):
        BaselineInputs(inputs.notes).features("llm", "train")
    inputs.viewers = csr_array((59, 3), dtype=np.int32)
    with pytest.raises(ValueError, match="viewers has 59 rows for 60 notes"):
        check_baselines(["popularity"], inputs)
