"""The benchmarks of training run, and learn from as many pairs as they say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from benchmarks import graph_batches, train_step
from benchmarks.measure import Usage
from benchmarks.train_step import FlopCounter, Run, StepTimes, batch_pairs_for, markdown_table
from hub.tiny_backbones import save_tiny_llm, save_tiny_vision_tower
from pairs.query import PairOptions
from pairs.simulate import SimulationOptions, simulate
from pairs.split import SplitOptions, load_split, make_splits
from pairs.tables import load_notes
from train.batches import BatchOptions, BatchPlanner
from train.data import PairDataset


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe with tiny backbones, and its splits."""
    folder = tmp_path_factory.mktemp("recipe")
    simulate(SimulationOptions(notes=120, subjects=3, looks=3, users=150, image_size=24, seed=1)).write(folder)
    notes = load_notes(folder / "notes.jsonl")
    make_splits(notes, folder / "views.csv", PairOptions(score="cosine", top_k=5), SplitOptions(), folder / "splits")
    save_tiny_llm([note["content"] for note in notes], folder / "llm", hidden_size=32)
    save_tiny_vision_tower(folder / "vision", 24, 32)
    settings = {
        "notes": str(folder / "notes.jsonl"),
        "views": str(folder / "views.csv"),
        "llm": str(folder / "llm"),
        "vision": str(folder / "vision"),
        "num_visual_tokens": 2,
        "qformer_layers": 1,
        "qformer_hidden_size": 64,
        "llm_tuning": "lora",
        "standardize_states": True,  # as configs/rooms.yaml
        "use_cpu": True,
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder / "recipe.yaml", folder / "splits"


@pytest.mark.parametrize("system", ["official", "store", "lengths", "gradcache-pairs", "graph", "gradcache"])
def test_every_system_makes_its_steps(system: str, recipe: tuple[Path, Path], tmp_path: Path):
    config, splits = recipe
    result = tmp_path / "result.json"
    train_step.main(
        [
            str(config),
            "--run",
            system,
            "--pairs",
            "12",
            "--steps",
            "3",
            "--mini-batch-size",
            "4",
            "--splits",
            str(splits),
        ]
        + ["--store", str(tmp_path / "store"), "--result", str(result), "--output-dir", str(tmp_path / "run")]
    )
    content = json.loads(result.read_text())
    times = content["times"]
    assert len(times["seconds"]) == 3 and min(times["seconds"]) > 0
    assert 0 < times["flops"] < content["peak_flops"]
    if system == "official":
        assert (times["notes"], times["pairs"]) == (24, 12)
    elif system in ("store", "lengths", "gradcache-pairs"):
        assert times["pairs"] == pytest.approx(12, abs=0.1) and times["notes"] < 24
    else:
        assert times["pairs"] == pytest.approx(12, rel=1.0) and content["batch_pairs"] < 12


def test_graph_batches_of_so_many_pairs(recipe: tuple[Path, Path]):
    dataset = PairDataset(*load_split(recipe[1], "train"))
    size = batch_pairs_for(dataset, BatchOptions("graph", 10, 4), 30)
    planner = BatchPlanner(dataset.pairs, dataset.related, BatchOptions("graph", size, 4))
    assert np.mean([len(plan.positives) / 2 for plan in planner.plans()]) == pytest.approx(30, rel=0.5)


def test_the_table_has_medians_and_says_what_failed():
    def run(system: str, seconds: list[float], pairs: float, memory: float) -> Run:
        return Run(system, 8, Usage(9.0, memory, 0.0, None), StepTimes(seconds, 16.0, pairs, 5e9, None), 2e10)

    runs = [
        run("official", [2.0, 4.0, 9.0], 8.0, 1.0),
        run("graph", [1.0, 1.0, 1.0], 9.0, 2.0),
        run("official", [6.0, 6.0, 6.0], 8.0, 3.0),
        Run("store", 8, Usage(9.0, 9.0, 0.0, "out of memory"), None),
    ]
    _heads, _rule, official, graph, store = markdown_table(runs).splitlines()
    assert official == "| official | 2 | 16 | 8.0 | 5.00 | 3.20 | 1.60 | 1.00 | 25% | 2.00 |"
    assert graph == "| graph | 1 | 16 | 9.0 | 1.00 | 16.00 | 9.00 | 5.62 | 25% | 2.00 |"
    assert "out of memory" in store


def test_products_are_counted_forward_and_backward():
    left, right = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    with FlopCounter() as counter:
        (left @ right).sum().backward()
    assert counter.total == 3 * 2 * 3 * 4 * 5


def test_recall_is_of_standardized_states_where_the_recipe_says_so(recipe: tuple[Path, Path]):
    study = graph_batches.Study(str(recipe[0]), [], str(recipe[1]))
    assert study.model.note_standardizer is not None and study.model.note_standardizer.is_fitted


def test_recall_by_encoded_notes(recipe: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    graph_batches.main(
        [str(recipe[0]), "--splits", str(recipe[1]), "--encodings", "60", "120", "--neighborhoods", "4", "--seeds", "2"]
        + ["--pairs", "8"]
    )
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[0].strip("| ") for row in table[2:]] == ["pairs", "graph, neighbourhoods of 4"]
    densities = [float(row[1]) for row in table[2:]]
    assert 0.5 <= densities[0] < densities[1]
    assert all(0 <= float(cell.split()[0]) <= 1 for row in table[2:] for cell in row[2:])
