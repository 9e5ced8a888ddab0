"""Protocols against a reading in loops, and slices by hand."""

import numpy as np
import pytest
from datasets import Dataset

from evaluation.metrics import rank_related, retrieval_metrics
from evaluation.protocols import make_task
from evaluation.slices import pair_slices, popularity_of_notes, short_notes


def random_pairs(rng: np.random.Generator, num_notes: int) -> np.ndarray:
    pairs = [(a, b) for a in range(num_notes) for b in range(num_notes) if a != b and rng.random() < 0.1]
    return rng.permutation(np.array(pairs))


def test_the_papers_protocol_keeps_a_pair_of_new_notes_and_takes_queries_out_of_the_pool() -> None:
    rng = np.random.default_rng(0)
    pairs = random_pairs(rng, 30)
    seen: set[int] = set()
    kept: dict[int, int] = {}
    for query, target in pairs.tolist():
        if query not in seen and target not in seen:
            seen |= {query, target}
            kept[query] = target
    task = make_task("paper", pairs, 30)
    assert {note: own.tolist() for note, own in enumerate(task.related) if len(own)} == {
        query: [target] for query, target in kept.items()
    }
    assert task.candidates is not None and np.flatnonzero(~task.candidates).tolist() == sorted(kept)
    embeds = rng.normal(size=(30, 5)).astype(np.float32)
    ranks = rank_related(embeds, task.related, task.candidates)
    assert (ranks.pool == 30 - len(kept)).all()
    metrics = retrieval_metrics(embeds, task.related, (3,), candidates=task.candidates)
    assert metrics["recall@3"] == metrics["hit_rate@3"]
    assert metrics != retrieval_metrics(embeds, make_task("graph", pairs, 30).related, (3,))  # control


def test_the_graph_asks_for_every_pair() -> None:
    pairs = random_pairs(np.random.default_rng(1), 20)
    task = make_task("graph", pairs, 20)
    assert task.candidates is None
    assert sorted((note, other) for note, own in enumerate(task.related) for other in own.tolist()) == sorted(
        map(tuple, pairs.tolist())
    )
    with pytest.raises(ValueError, match="protocol='papers'"):
        make_task("papers", pairs, 20)  # type: ignore[arg-type]


def test_slices() -> None:
    notes = Dataset.from_dict(
        {"title": ["a", "bb", "c" * 30, "d" * 40, "e" * 50], "topics": [["x"], ["x", "y"], [], ["y"], []]}
    )
    short = short_notes(notes)
    assert short.tolist() == [True, True, False, False, False]
    subsets = Dataset.from_dict(
        {
            "note_id": ["n0", "n2"],
            "related_note_id": ["n3", "n1"],
            "query_popularity": ["head", "cold"],
            "target_popularity": ["tail", "head"],
        }
    )
    popularity = popularity_of_notes([f"n{i}" for i in range(5)], subsets)
    assert popularity.tolist() == ["head", "head", "cold", "tail", ""]
    query, target = np.array([0, 0, 2]), np.array([3, 2, 1])
    slices = {name: mask.tolist() for name, mask in pair_slices(query, target, short, popularity).items()}
    assert slices == {
        "short query": [True, True, False],
        "short target": [False, False, True],
        "head query": [True, True, False],
        "cold query": [False, False, True],
        "head target": [False, False, True],
        "tail target": [True, False, False],
        "cold target": [False, True, False],
    }


def test_topics_with_enough_queries_are_slices() -> None:
    queries = np.arange(50)
    topics = [["often", "rare"] if note < 15 else ["often"] if note < 30 else [] for note in range(50)]
    slices = pair_slices(queries, (queries + 1) % 50, np.zeros(50, dtype=bool), topics=topics)
    assert list(slices) == ["topic often"] and slices["topic often"].sum() == 30
