"""Metrics: equal to a naive re-implementation that sorts, and loud about input that has no answer."""

import math
from functools import partial

import numpy as np
import pytest

from evaluation.metrics import chance_metrics, metric_names, per_query_metrics, retrieval_metrics


def random_graph(num_notes: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Between 0 and 6 related notes each; the first note has none, the second all others."""
    related = []
    for note in range(num_notes):
        others = np.delete(np.arange(num_notes), note)
        related.append(rng.choice(others, size=rng.integers(0, 7), replace=False))
    related[0] = np.array([], dtype=np.int64)
    related[1] = np.delete(np.arange(num_notes), 1)
    return related


def rows(scores: np.ndarray, start: int, stop: int) -> np.ndarray:
    return scores[start:stop]


def naive_metrics(scores: np.ndarray, related: list[np.ndarray], ks: tuple[int, ...]) -> dict[str, float]:
    """By sorting the pool: descending score, then ascending position."""
    values: dict[str, list[float]] = {name: [] for name in metric_names(ks)}
    for query, positions in enumerate(related):
        if len(positions) == 0:
            continue
        pool = [note for note in range(len(related)) if note != query]
        ranking = sorted(pool, key=lambda note: (-scores[query, note], note))
        gains = [note in set(positions.tolist()) for note in ranking]
        for k in ks:
            values[f"recall@{k}"].append(sum(gains[:k]) / len(positions))
            dcg = sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains[:k], start=1))
            ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(positions)) + 1))
            values[f"ndcg@{k}"].append(dcg / ideal)
        values["mrr"].append(1 / (gains.index(True) + 1))
    return {name: float(np.mean(entries)) for name, entries in values.items()}


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_equals_naive_metrics_on_scores_with_many_ties(chunk_size: int) -> None:
    rng = np.random.default_rng(0)
    ks = (1, 5, 10, 500)  # the last is beyond the pool
    related = random_graph(60, rng)
    scores = rng.integers(0, 4, size=(60, 60)).astype(np.float32)
    scores[3, 10:20] = -np.inf  # a score may be minus infinity: still exact
    measured = retrieval_metrics(partial(rows, scores), related, ks, chunk_size)
    assert measured == pytest.approx(naive_metrics(scores, related, ks), abs=1e-12)
    assert measured["recall@500"] == 1.0
    # Negative control: the other order of ties, or other scores, give other values.
    assert measured != pytest.approx(naive_metrics(scores[:, ::-1][::-1].T, related, ks), abs=1e-3)


def test_ties_go_to_the_lower_position_and_the_query_is_not_in_its_pool() -> None:
    scores = np.ones((4, 4), dtype=np.float32)
    related = [np.array([3]), np.array([0]), np.array([], dtype=np.int64), np.array([2, 0])]
    per_query = per_query_metrics(partial(rows, scores), related, ks=(1, 2))
    # Ranks: note 3 is third of (1, 2, 3); note 0 first of (0, 2, 3); notes 0 and 2 first and third of (0, 1, 2).
    np.testing.assert_allclose(per_query["mrr"], [1 / 3, 1, 1])
    np.testing.assert_allclose(per_query["recall@2"], [0, 1, 0.5])
    np.testing.assert_allclose(per_query["ndcg@2"], [0, 1, 1 / (1 + 1 / math.log2(3))])


def test_embeddings_are_scored_by_dot_product_whatever_the_chunk_size() -> None:
    rng = np.random.default_rng(1)
    related = random_graph(80, rng)
    embeds = rng.normal(size=(80, 9)).astype(np.float32)
    embeds[40:] = embeds[:40]  # each note twice: every score is a tie
    embeds[70:] = 0
    reference = naive_metrics((embeds.astype(np.float64) @ embeds.T).astype(np.float32), related, (10,))
    for chunk_size in (1, 13, 80):
        assert retrieval_metrics(embeds, related, (10,), chunk_size) == pytest.approx(reference, abs=1e-12)


def test_chance_is_the_mean_over_random_orders() -> None:
    rng = np.random.default_rng(2)
    related = random_graph(25, rng)
    ks = (1, 5, 100)
    runs = []
    for _ in range(400):
        scores = rng.random((25, 25))
        runs.append(retrieval_metrics(partial(rows, scores), related, ks))
    expected = chance_metrics(related, ks)
    assert list(expected) == metric_names(ks)
    for name, value in expected.items():
        draws = np.array([run[name] for run in runs])
        error = draws.std() / math.sqrt(len(draws))
        assert abs(draws.mean() - value) < 4 * error + 1e-12, name


@pytest.mark.parametrize(
    ("related", "message"),
    [
        ([[0], [0]], "the note itself"),
        ([[1, 1], [0]], "twice"),
        ([[2], [0]], "outside 0..1"),
        ([[-1], [0]], "outside 0..1"),
        ([[1.0], [0]], "integers"),
        ([[], []], "no related note at all"),
    ],
)
def test_bad_relations_are_refused(related: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(np.eye(2), [np.array(positions) for positions in related])
    with pytest.raises(ValueError, match=message):
        chance_metrics([np.array(positions) for positions in related])


def test_bad_scores_and_cuts_are_refused() -> None:
    related = [np.array([1]), np.array([0])]
    with pytest.raises(ValueError, match="note 1 contain NaN"):
        retrieval_metrics(lambda start, stop: np.array([[0, 0], [np.nan, 0]]), related)
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected \(2, 2\)"):
        retrieval_metrics(lambda start, stop: np.zeros((2, 3)), related)
    with pytest.raises(ValueError, match=r"expected \(2, D\)"):
        retrieval_metrics(np.eye(3), related)
    with pytest.raises(ValueError, match="ks must be"):
        retrieval_metrics(np.eye(2), related, ks=(0,))
    with pytest.raises(ValueError, match="chunk_size"):
        retrieval_metrics(np.eye(2), related, chunk_size=0)
