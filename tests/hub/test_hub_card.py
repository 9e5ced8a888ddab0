"""The card: what the Hub reads of it, figures from the report only, and examples that run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants

from evaluation.report import ReportRow
from evaluation.run import main as evaluate
from hub.card import LICENSES, TINY_BACKBONES, CardOptions, base_models_of, evaluation_results, model_card
from hub.export import read_run
from modeling_notellm2 import NoteLLM2Model
from modeling_notellm2.processing_notellm2 import prompt_template
from tests.backbones import random_picture
from tests.hub.conftest import HUB_LICENSES, METRICS, StandInHub


def test_front_matter(tiny_export: Path) -> None:
    data = ModelCard.load(tiny_export / "README.md").data
    assert data.library_name == "transformers" and data.pipeline_tag == "feature-extraction"
    assert data.base_model == ["some-org/llm", "some-org/tower"] and data.datasets == ["some-org/notes"]
    assert data.license == "apache-2.0" and data.language == ["en", "zh"] and "sentence-transformers" in data.tags
    assert data.model_name == "Shelf notes"
    assert data.eval_results is not None
    figures = {(result.metric_name, result.metric_type): result.metric_value for result in data.eval_results}
    names = {"recall@10": "Recall@10", "ndcg@10": "NDCG@10", "mrr": "MRR"}
    expected = {(f"{name} (text and image)", key): METRICS[key] for key, name in names.items()}
    expected |= {(f"{name} (image only)", key): round(METRICS[key] / 4, 4) for key, name in names.items()}
    assert figures == expected  # the report's main ones, and not those of other systems
    assert {result.dataset_type for result in data.eval_results} == {"some-org/notes"}
    assert {(result.dataset_split, result.dataset_config) for result in data.eval_results} == {("test", None)}


def test_the_hubs_validator_takes_the_card(tiny_export: Path, hub: StandInHub) -> None:
    ModelCard.load(tiny_export / "README.md").validate()
    assert hub.requests == ["POST /api/validate-yaml"]
    broken = ModelCard.load(tiny_export / "README.md")
    broken.data.license = ["one", "two"]
    with pytest.raises(ValueError, match="must be a string"):
        broken.validate()
    for name, value in (("license", "apache2"), ("language", ["english"])):
        broken = ModelCard.load(tiny_export / "README.md")
        setattr(broken.data, name, value)
        with pytest.raises(ValueError, match=f'{name}." '):
            broken.validate()


def test_the_text_says_what_is_known(tiny_export: Path) -> None:
    card = (tiny_export / "README.md").read_text(encoding="utf-8")
    text = " ".join(card.split())
    for part in (
        "# Shelf notes",
        "Trained on 50 pairs of related notes among 30 notes; (a, b) and (b, a) are one pair.",
        "`checksums.sha256` lists all other files",
        "in the repository that made this folder and not on PyPI",
        "The training did not aim at shorter vectors",
        "`model.encode(notes, truncate_dim=N, normalize_embeddings=True)` gives the same vectors as transformers",
        "How far the picture is used was not measured.",  # there is no row "text"
        "The vision tower is frozen: it sees what it saw before.",
        "within 7 days (score: cosine)",
        "(12 test notes that this training has not seen, 5 queries)",
        "One run, seed 3.",
        "It was trained to bring notes which the same people look at near one another.",
        "[training/report.json](training/report.json)",
        "95 % bootstrap interval",
        'NoteLLM2Module.load("some-org/shelf-notes")',
        "| trained | both | **0.4321** |",
        "<IMG_EMB>",
        "joined by a Q-Former that turns an image into 3 visual tokens",
        'SentenceTransformer("some-org/shelf-notes", trust_remote_code=True)',
        '"transformers>=',
    ):
        assert part in text, part
    assert "\n\n\n" not in card and "{{" not in text
    assert "None" not in text.replace("notes_by_id = None", "")
    assert card.endswith(".\n") and not card.endswith("\n\n")
    prose = [line for line in card.splitlines() if not line.startswith(("|", "Note content: "))]
    assert max(map(len, prose)) <= 120
    assert "simulated" not in text and "random weights" not in text and "git+" not in text


def test_examples_run(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code_blocks: Callable[[str], list[str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    random_picture(0).save("shelf.jpg")
    blocks = code_blocks((tiny_export / "README.md").read_text(encoding="utf-8"))
    found = []
    for block in blocks:
        names: dict = {}
        exec(block.replace("some-org/shelf-notes", str(tiny_export)), names)
        found.append(names)
    assert len(found) == 4
    np.testing.assert_allclose(found[0]["embeddings"], found[1]["embeddings"], atol=1e-5)
    np.testing.assert_allclose(found[0]["similarities"], found[1]["similarities"], atol=1e-5)
    np.testing.assert_allclose(found[0]["embeddings"][1], found[2]["embeddings"][1], atol=1e-5)
    assert np.abs(found[0]["embeddings"][0] - found[2]["embeddings"][0]).max() > 1e-2  # another note
    assert set(found[3]["triplets"]["negative"]) <= set(found[3]["notes"])  # ids
    notes = list(found[3]["notes"].values())
    trained = NoteLLM2Model.from_pretrained("my-notes").encode(notes)
    np.testing.assert_allclose(found[3]["model"].encode(notes), trained, atol=1e-5)
    assert np.abs(found[0]["model"].encode(notes) - trained).max() > 1e-6

    ours, theirs = found[0]["model"], found[1]["model"]  # what the card says of shorter vectors
    short = ours.encode(notes, truncate_dim=4)
    np.testing.assert_allclose(theirs.encode(notes, truncate_dim=4, normalize_embeddings=True), short, atol=1e-5)
    assert np.abs(theirs.encode(notes, truncate_dim=4) - short).max() > 1e-2
    assert theirs.encode(notes, truncate_dim=99).shape == ours.encode(notes).shape
    with pytest.raises(ValueError, match="truncate_dim=99"):
        ours.encode(notes, truncate_dim=99)


def test_what_the_text_says_of_a_simulated_run(tiny_model: NoteLLM2Model, run_folder: Path) -> None:
    training = read_run(run_folder).training
    assert training is not None
    training["rows"].append({"system": "trained", "modality": "text", "metrics": {"mrr": 0.5}})
    settings: dict[str, Any] = {
        "composition": {"llm": TINY_BACKBONES, "vision": TINY_BACKBONES},
        "data": {"notes": None, "splits": None},
        "training": {"matryoshka_dims": [16, 8]},
    }
    options = CardOptions(name="x", code_url="https://example.org/me/notes")
    card = model_card(tiny_model, options, settings, training)
    text = " ".join(str(card).split())
    for part in (
        "Notes, pictures and views are simulated",
        "The LLM and the vision tower began with random weights",
        "The vision tower is frozen, with the random weights that it began with.",
        'Compare the rows "text" and "image" above with "both"',
        "The first 16, 8 numbers were each trained to be embeddings of their own.",
        'pip install "notellm2 @ git+https://example.org/me/notes"',
    ):
        assert part in text, part
    assert "it sees what it saw before" not in text and "was not measured" not in text
    assert {(it.dataset_name, it.dataset_type) for it in card.data.eval_results or ()} == {
        ("simulated notes and views", "simulated")
    }
    # The control: of an evaluation nobody knows whether its notes are those.
    results = model_card(tiny_model, options, settings, training, training).data.eval_results
    assert {(it.dataset_name, it.dataset_type) for it in results or ()} == {("notes and views", "unknown")}


def test_without_a_run_nothing_is_claimed(compose: Callable[..., NoteLLM2Model]) -> None:
    card = model_card(compose(tower=None), CardOptions(name="bare"))
    data, text = card.data.to_dict(), " ".join(str(card).split())
    assert {"license", "base_model", "datasets", "model-index", "language"}.isdisjoint(data)
    assert "No evaluation was given" in text and "Nothing was recorded" in text and "text-only" in text
    assert "Nothing that came with it says whether it was trained" in text and "did not aim" not in text
    assert "look at near" not in text and "training data" not in text and "was trained to" not in text
    assert "<IMG>" not in text and '"image"' not in text and "training/" not in text


@pytest.mark.parametrize("template", ["paper", "compact"])
def test_the_prompts_are_shown_word_for_word(compose: Callable[..., NoteLLM2Model], template: Any) -> None:
    text = str(model_card(compose(processor={"template": template}), CardOptions(name="bare")))
    shown = [block.strip("\n") for block in text.split("````text")[1:]]
    expected = [prompt_template(prompt, "en", template) for prompt in ("micl", "text")]
    assert [block.split("\n````")[0] for block in shown] == expected


def test_the_figures_of_an_evaluation_claim_no_more_than_it_says(
    tiny_model: NoteLLM2Model, splits_folder: Path, run_folder: Path, tmp_path: Path
) -> None:
    wanted = ["--splits", str(splits_folder), "--baselines", "bm25", "--protocol", "paper", "--seed", "17"]
    evaluate([*wanted, "--sheet-queries", "0", "--ks", "10", "--output", str(tmp_path / "report")])
    evaluation, facts = read_run(tmp_path / "report").evaluation, read_facts(tmp_path / "report")
    options = CardOptions(name="x", system="bm25")
    card = model_card(tiny_model, options, evaluation=evaluation)
    text, results = " ".join(str(card).split()), card.data.eval_results
    assert f"({facts['notes']} notes, {facts['queries']} queries, protocol `paper`), `bm25` being" in text
    assert "[evaluation/report.json](evaluation/report.json)" in text and f"commit `{facts['commit']}`" in text
    for claim in ("not seen", "test notes", "One run", "seed 17", "was trained to", "training/report.json"):
        assert claim not in text, claim
    assert results and {(it.dataset_split, it.dataset_config) for it in results} == {(None, None)}
    assert {str(it.metric_args) for it in results} == {"{'protocol': 'paper'}"}
    assert {it.metric_name for it in results} >= {"Recall@10 (text only)"}

    run = read_run(run_folder)  # what is known of the training is said beside them
    text = " ".join(str(model_card(tiny_model, options, run.settings, run.training, evaluation)).split())
    assert "It was trained to bring" in text and "Trained on 50 pairs of related notes among 30 notes" in text
    assert "protocol `paper`" in text and "seed 3" not in text and "12 test notes" not in text


def read_facts(report_folder: Path) -> dict[str, Any]:
    return json.loads((report_folder / "report.json").read_text(encoding="utf-8"))["facts"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"split_by": "note"}, "(12 test notes that this training has not seen, 5 queries)"),
        ({"split_by": "both"}, "(12 test notes that this training has not seen, 5 queries)"),
        ({"split_by": "time"}, "(12 test notes with pairs of later days than this training's, 5 queries)"),
        ({"split_by": "note", "splits": "data"}, "(12 test notes, 5 queries)"),  # which were made another way
        ({}, "(12 test notes, 5 queries)"),
    ],
)
def test_how_test_notes_were_set_apart_is_said_where_it_is_known(
    tiny_model: NoteLLM2Model, run_folder: Path, data: dict[str, str], said: str
) -> None:
    training = read_run(run_folder).training
    text = str(model_card(tiny_model, CardOptions(name="x"), {"data": data}, training))
    assert said in " ".join(text.split())


@pytest.mark.parametrize(
    ("data", "by_views"),
    [
        ({"pair_score": "cosine", "pair_window_days": 7.0, "splits": None}, True),
        ({"pair_score": "cosine", "pair_window_days": 7.0, "splits": "data"}, False),  # pairs of any kind
        (None, False),  # nothing was recorded
    ],
)
def test_what_related_means_is_said_where_it_is_known(
    tiny_model: NoteLLM2Model, run_folder: Path, data: dict[str, Any] | None, by_views: bool
) -> None:
    settings = None if data is None else {"data": data}
    card = model_card(tiny_model, CardOptions(name="x"), settings, read_run(run_folder).training)
    text = " ".join(str(card).split())
    assert ("notes which the same people look at near" in text) == by_views
    assert ("viewed by the same people" in text) == by_views
    assert ("It was trained to bring related notes near one another." in text) != by_views
    assert ("Related means what the training's pairs say, whose origin was not recorded" in text) != by_views
    assert "are no measure of quality" in text


def test_base_models_are_what_this_machine_has_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("org/llm", "org/mine"):
        snapshot = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / "main"
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    composition = {"model": None, "llm": "org/llm", "vision": "models/clip"}
    assert base_models_of({"composition": composition}) == ["org/llm"]
    assert "'models/clip'" in caplog.text and "--base-model" in caplog.text and "org/llm" not in caplog.text
    assert base_models_of({"composition": {**composition, "model": "org/mine"}}) == ["org/mine"]
    assert base_models_of({"composition": {"llm": "gpt2", "vision": ""}}) == base_models_of(None) == []


def test_the_card_names_the_base_models_of_the_settings(
    tiny_model: NoteLLM2Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hub.card.try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    settings = {"composition": {"llm": "org/llm", "vision": "org/tower"}}
    data = model_card(tiny_model, CardOptions(name="x"), settings).data
    assert data.base_model == ["org/llm", "org/tower"]
    data = model_card(tiny_model, CardOptions(name="x", base_models=["other/llm"]), settings).data
    assert data.base_model == ["other/llm"]
    assert model_card(tiny_model, CardOptions(name="x", base_models=[]), settings).data.base_model is None


def test_what_a_name_says_cannot_break_the_front_matter(tiny_model: NoteLLM2Model) -> None:
    options = CardOptions(name="a: [b] # {{ dim }}\n---\nlicense: mit", license="apache-2.0", data_name="- x: {y")
    row = {"system": "trained", "modality": "both", "metrics": {"mrr": 0.5}}
    card = model_card(tiny_model, options, training={"facts": {}, "rows": [row]})
    read = ModelCard(str(card)).data
    assert read.license == "apache-2.0" and read.model_name == options.name
    assert read.eval_results is not None and read.eval_results[0].dataset_name == "- x: {y"


def test_figures_that_are_no_numbers_are_left_out() -> None:
    rows = [ReportRow("trained", "both", {"mrr": float("nan"), "recall@10": 0.5})]
    assert [result.metric_type for result in evaluation_results(rows, {}, CardOptions(name="x"))] == ["recall@10"]
    assert evaluation_results([], {}, CardOptions(name="x")) == []
    with pytest.raises(ValueError, match=r"has \['trained'\]"):
        evaluation_results(rows, {}, CardOptions(name="x", system="mine"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repo_id": "/models/x"}, "repo_id='/models/x' is no id"),
        ({"repo_id": "noslash"}, "repo_id='noslash' is no id on the Hub: give ORG/NAME"),
        ({"datasets": ["a/b/c"]}, "datasets='a/b/c' is no id"),
        ({"base_models": ["llama"]}, "base_models='llama' is no id on the Hub: give ORG/NAME"),
        ({"code_url": "http://example.org/me/notes"}, "code_url='http://example.org/me/notes' is no https address"),
        ({"code_url": "https://me:word@example.org/me/notes"}, "is no https address"),
        ({"license": "Apache 2"}, "license='Apache 2'"),
        ({"license": "apache2"}, r"no license id of the Hub \(like it: apache-2.0"),
        ({"languages": ["en", "english"]}, "languages='english' is no code"),
        ({"languages": ["EN"]}, "languages='EN' is no code"),
        ({"languages": ["xx"]}, "languages='xx' is no code"),
        ({"license": "mit", "license_name": "x", "license_link": "y"}, "no other one takes them"),
    ],
)
def test_bad_options_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CardOptions(name="x", **settings)


def test_what_the_hub_takes_is_taken() -> None:
    assert set(HUB_LICENSES) <= LICENSES
    for code in ("zh", "yue", "ger", "deu", "sla", "multilingual", "code"):
        CardOptions(name="x", license="cc-by-nc-4.0", languages=[code])


def test_a_local_folder_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    CardOptions(name="x", base_models=["backbones/llm"])
    (tmp_path / "backbones" / "llm").mkdir(parents=True)
    with pytest.raises(ValueError, match="is a folder of this machine"):
        CardOptions(name="x", base_models=["backbones/llm"])
