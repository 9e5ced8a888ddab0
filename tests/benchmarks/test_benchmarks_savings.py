"""The benchmark of savings: its tables, its small embeddings beside brute force, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
import yaml
from sentence_transformers.util.quantization import quantize_embeddings

from benchmarks import encode, savings
from benchmarks.measure import Usage
from benchmarks.savings import COMPACT, KS, RECIPE, FrozenVariant, Recalls, Study, Variant
from evaluation.metrics import tie_order
from modeling_notellm2 import vision_notellm2

NOTES, DIM = 300, 20


@pytest.fixture
def recipe(
    world_folder: Path, llm_folder: Callable[[str], Path], tower_folder: Callable[[str], Path], tmp_path: Path
) -> str:
    """A recipe with tiny backbones on the small world, in the manner of configs/movies.yaml."""
    settings = {
        "notes": str(world_folder / "notes.jsonl"),
        "views": str(world_folder / "views.csv"),
        "test_share": 0.3,
        "llm": str(llm_folder("llama")),
        "vision": str(tower_folder("clip")),
        "num_visual_tokens": 3,
        "qformer_layers": 1,
        "qformer_hidden_size": 64,
        "embedding_dim": 16,
        "max_content_tokens": 16,
        "initial_temperature": 0.3,
        "standardize_states": True,
        "head_warmup_steps": 5,
        "head_warmup_learning_rate": 1.0e-3,
        "llm_tuning": "lora",
        "use_cpu": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "recall@10",
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return str(tmp_path / "recipe.yaml")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Runs are not started in processes of their own. Returns their settings, as they come."""
    runs: list[dict[str, Any]] = []

    def measure(command: list[str], *_limits: Any, **_settings: Any) -> Usage:
        images = vision_notellm2.PROCESSOR_IMAGES
        encode.main(command[3:])
        vision_notellm2.PROCESSOR_IMAGES = images
        runs.append(json.loads(command[4]))
        return Usage(2.0, 0.5, 0.0, None)

    monkeypatch.setattr(encode, "measure", measure)
    return runs


def test_tables_of_two_variants(
    recipe: str,
    in_this_process: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(savings.VARIANTS, "compact-int8", Variant(COMPACT | {"num_text_layers": 1}, "int8"))
    output = tmp_path / "savings.json"
    options = ["--variants", "compact-int8", "--seeds", "2", "--speed-notes", "8", "--repeat", "2"]
    savings.main([recipe, *options, "--output", str(output), "--max_title_tokens", "8"])
    text = capsys.readouterr().out
    variants, small, facts = text.split("\n\n")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in variants.splitlines()]
    assert [line[:2] for line in lines[2:]] == [
        [RECIPE, "as they are"],
        ["compact-int8", "template compact, num_text_layers 1, int8"],
    ]
    assert {len(line) for line in lines} == {12}
    assert lines[2][5:8] == ["", "", ""] and " to " in lines[3][6] and " to " in lines[3][7]
    assert len(small.splitlines()) == 2 + 2 * 7 and "| bits | the recipe's | 2 |" in small
    assert "max_title_tokens" in facts
    content = json.loads(output.read_text())
    found = {row["name"]: row for row in content["variants"]}
    assert np.mean(found[RECIPE]["recall@10"]) == pytest.approx(float(lines[2][4].split()[0]), abs=1e-4)
    # The same heads, once for each table.
    assert content["small_embeddings"][0]["recall@10"] == found[RECIPE]["recall@10"]
    assert found["compact-int8"]["recall@10"] != found[RECIPE]["recall@10"]
    names = [Path(run["model"]).name for run in in_this_process]
    assert names == [RECIPE, RECIPE, "compact-int8", "compact-int8", RECIPE, RECIPE]  # every second turn backwards
    assert [run["dtype"] for run in in_this_process][:3] == ["float32", "float32", "int8"]
    seconds = {run["name"]: [] for run in content["runs"]}
    for run in content["runs"]:
        seconds[run["name"]].append(run["result"]["seconds"])
    ratio = np.median(seconds["official recipe"]) / np.median(seconds["compact-int8"])
    assert float(lines[3][3]) == pytest.approx(ratio, abs=0.006)


def test_a_seed_is_a_head_of_its_own_and_the_same_for_all_variants(recipe: str, tmp_path: Path) -> None:
    study = Study(recipe, [], tmp_path, None, None)
    variant = FrozenVariant(study, savings.VARIANTS[RECIPE])
    first = variant.embeds(0, None)
    assert variant.model.note_standardizer is not None and variant.model.note_standardizer.is_fitted
    other = variant.embeds(1, None)
    np.testing.assert_array_equal(variant.embeds(0, None), first)  # nothing is left of the seed before
    assert np.abs(other - first).max() > 0.01
    # What trains is what the checkpoint has: its `encode` gives these embeddings.
    encoded = variant.model.encode(list(study.test.notes))
    np.testing.assert_allclose(encoded, first, atol=1e-5)
    fewer = FrozenVariant(study, Variant({"num_visual_tokens": 1}))
    assert not torch.equal(
        fewer.states.select(torch.arange(4)).note_states, variant.states.select(torch.arange(4)).note_states
    )
    for frozen in (variant, fewer):
        frozen.restart(3)
    weights = [frozen.model.state_dict() for frozen in (variant, fewer)]
    for name in ("head.weight", "late_fusion.projection.weight"):
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=0)


def test_int8_leaves_the_last_product_of_the_mlp_and_changes_the_states(recipe: str, tmp_path: Path) -> None:
    study = Study(recipe, [], tmp_path, None, None)
    plain, int8 = (FrozenVariant(study, Variant({}, dtype)) for dtype in ("float32", "int8"))
    rows = torch.arange(len(study.test.notes))
    states, rounded = (frozen.test_states.select(rows).note_states for frozen in (plain, int8))
    assert 1e-5 < (states - rounded).norm() / states.norm() < 0.1
    layer = encode.quantized(plain.model.language_model).layers[0]
    assert type(layer.mlp.down_proj) is torch.nn.Linear and type(layer.mlp.up_proj) is not torch.nn.Linear
    assert type(int8.model.language_model.layers[0].mlp.up_proj) is torch.nn.Linear  # what the checkpoint holds


def embeds_and_related() -> tuple[np.ndarray, list[np.ndarray]]:
    """Random embeddings, a little aligned with who is related to whom, so that recalls are neither 0 nor 1."""
    draw = np.random.default_rng(0)
    groups = draw.integers(0, 40, NOTES)
    embeds = draw.normal(size=(NOTES, DIM)) + 0.7 * draw.normal(size=(40, DIM))[groups] + 0.3
    related = [np.flatnonzero((groups == group) & (np.arange(NOTES) != note)) for note, group in enumerate(groups)]
    return savings._unit_length(embeds).astype(np.float32), related


def brute_force(keys: Callable[[int], list[tuple[float, ...]]], related: list[np.ndarray], k: int) -> float:
    """Mean Recall@k where the notes are sorted by `keys(query)`, one for each note, and then by the order of ties."""
    order, recalls = tie_order(NOTES), []
    for query in range(NOTES):
        if not len(related[query]):
            continue
        of_query = keys(query)
        best = sorted((note for note in range(NOTES) if note != query), key=lambda n: (*of_query[n], order[n]))[:k]
        recalls.append(len(set(best) & set(related[query].tolist())) / len(related[query]))
    return float(np.mean(recalls))


def recall_of(name: str, embeds: np.ndarray, related: list[np.ndarray]) -> Recalls:
    scores = {kind: make for kind, _size, make in savings.small_embeddings(DIM)}[name]
    return savings.recalls_of([scores(embeds)], related)


def test_truncated_embeddings_are_those_of_brute_force() -> None:
    embeds, related = embeds_and_related()
    for width in (20, 10, 5, 2):
        name = "float32" if width == DIM else f"first {width} dimensions"
        kept = embeds[:, :width].astype(np.float64)
        kept /= np.linalg.norm(kept, axis=1, keepdims=True)
        found = recall_of(name, embeds, related)
        for k in KS:
            assert found[k].mean() == pytest.approx(
                brute_force(lambda q, kept=kept: [(-x,) for x in kept @ kept[q]], related, k)
            )
    assert recall_of("first 5 dimensions", embeds, related)[10].mean() != pytest.approx(
        recall_of("first 5 dimensions", embeds[:, ::-1].copy(), related)[10].mean()
    )


def test_binary_embeddings_are_those_of_brute_force() -> None:
    embeds, related = embeds_and_related()
    signs = np.where(embeds > 0, 1, -1)
    distances = (signs[:, None] != signs).sum(-1)
    found = recall_of("bits", embeds, related)
    for k in KS:
        expected = brute_force(lambda q: [(d,) for d in distances[q]], related, k)
        assert found[k].mean() == pytest.approx(expected)
    # Without centring, here, the signs tell less: other bits give another recall.
    other = recall_of("bits", embeds - embeds.mean(0), related)
    assert abs(other[10].mean() - found[10].mean()) > 0.005


@pytest.mark.parametrize("by", ["bits", "floats"])
def test_rescored_embeddings_are_those_of_brute_force(by: str) -> None:
    embeds, related = embeds_and_related()
    signs = np.where(embeds > 0, 1, -1)
    notes = (signs if by == "bits" else embeds).astype(np.float64)
    distances = (signs[:, None] != signs).sum(-1)
    order = tie_order(NOTES)
    found = recall_of(f"bits, best 10·K again by the {by}", embeds, related)

    def keys(shortlist: int) -> Callable[[int], list[tuple[float, ...]]]:
        def of_query(query: int) -> list[tuple[float, ...]]:
            others = [note for note in range(NOTES) if note != query]
            nearest = set(sorted(others, key=lambda n: (distances[query, n], order[n]))[:shortlist])
            products = notes @ embeds[query].astype(np.float64)
            return [(note not in nearest, -products[note] if note in nearest else 0.0) for note in range(NOTES)]

        return of_query

    for k in KS:
        assert found[k].mean() == pytest.approx(brute_force(keys(10 * k), related, k), abs=1e-6)
    # A shorter list loses some, and no list at all is the bits' own order.
    assert found[10].mean() > brute_force(keys(15), related, 10) + 0.001
    assert found[10].mean() != pytest.approx(recall_of("bits", embeds, related)[10].mean())


def test_distances_are_those_of_faiss() -> None:
    embeds, _related = embeds_and_related()
    bits = quantize_embeddings(embeds, "ubinary")
    index = faiss.IndexBinaryFlat(8 * bits.shape[1])
    index.add(bits)
    distances, notes = index.search(bits[:5], NOTES)
    found = savings.hamming_distances(bits, np.arange(5))
    np.testing.assert_array_equal(np.take_along_axis(found, notes, 1), distances)
    assert len(np.unique(distances)) > 10


def test_differences_are_paired_and_have_intervals() -> None:
    draw = np.random.default_rng(0)
    reference = draw.random((6, 50))
    luck = draw.normal(scale=0.01, size=(6, 50))
    found = savings.compare(reference - 0.02 + luck, reference)
    assert found.mean == pytest.approx(-0.02, abs=0.002)
    assert found.of_seeds[0] < found.mean < found.of_seeds[1] < 0
    assert found.of_queries[0] < found.mean < found.of_queries[1] < 0
    # Not paired, the seeds' own differences would hide it.
    assert not savings.compare(draw.random((6, 50)), reference).of_queries[1] < 0
    assert np.isnan(savings.compare(reference[:1], reference[1:2]).of_seeds[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "layers-99"], "invalid choice: 'layers-99'"),
        (["--seeds", "0"], "give 1 or more"),
        (["--speed-notes", "1000"], "speed_notes=1000, but there are"),
        (["--head_warmup_steps", "0"], "head_warmup_steps=0 in"),
        (["--embedding_dim", "0", "--late_fusion", "none"], "nothing after the LLM trains"),
        (["--no_such_option", "1"], "no_such_option"),
    ],
)
def test_refuses(options: list[str], message: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as caught:
        savings.main([recipe, "--variants", "compact", "--speed-notes", "8", *options])
    assert message in capsys.readouterr().err + str(caught.value)
