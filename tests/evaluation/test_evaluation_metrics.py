"""Metrics: equal to a naive re-implementation that sorts, and loud about input that has no answer."""

import math
import re
from functools import partial

import numpy as np
import pytest

from evaluation import metrics
from evaluation.metrics import (
    Ranks,
    chance_metrics,
    mean_metrics,
    metric_names,
    metrics_per_query,
    rank_related,
    retrieval_metrics,
    tie_order,
)


def random_graph(num_notes: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Between 0 and 6 related notes each; the first note has none, the second all others."""
    related = []
    for note in range(num_notes):
        others = np.delete(np.arange(num_notes), note)
        related.append(rng.choice(others, size=rng.integers(0, 7), replace=False))
    related[0] = np.array([], dtype=np.int64)
    related[1] = np.delete(np.arange(num_notes), 1)
    return related


def rows(scores: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return scores[positions]


def naive_metrics(
    scores: np.ndarray, related: list[np.ndarray], ks: tuple[int, ...], candidates: np.ndarray | None = None
) -> dict[str, float]:
    """By sorting the pool: descending score, then the fixed order of ties."""
    order = tie_order(len(related))
    values: dict[str, list[float]] = {name: [] for name in metric_names(ks)}
    for query, positions in enumerate(related):
        if len(positions) == 0:
            continue
        pool = [note for note in range(len(related)) if note != query and (candidates is None or candidates[note])]
        ranking = sorted(pool, key=lambda note: (-scores[query, note], order[note]))
        gains = [note in set(positions.tolist()) for note in ranking]
        for k in ks:
            values[f"recall@{k}"].append(sum(gains[:k]) / len(positions))
            dcg = sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains[:k], start=1))
            ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(positions)) + 1))
            values[f"ndcg@{k}"].append(dcg / ideal)
            values[f"hit_rate@{k}"].append(float(any(gains[:k])))
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


def test_ties_have_a_fixed_order_and_the_query_is_not_in_its_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.ones((4, 4), dtype=np.float32)
    related = [np.array([3]), np.array([0]), np.array([], dtype=np.int64), np.array([2, 0])]
    assert sorted(tie_order(4)) == [0, 1, 2, 3] and tie_order(4).tolist() == tie_order(4).tolist()
    monkeypatch.setattr(metrics, "tie_order", np.arange)
    per_query = metrics_per_query(rank_related(partial(rows, scores), related), ks=(1, 2))
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


@pytest.mark.parametrize("tile", [5, 64, 4096])
def test_tiles_of_float32_give_the_exact_ranks(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that float32 products cannot tell apart: float64 products rounded to float32 decide, then the place."""
    monkeypatch.setattr(metrics, "TILE_COLUMNS", tile)
    rng = np.random.default_rng(4)
    num_notes = 120
    embeds = (rng.normal(size=(1, 33)) + 2e-4 * rng.normal(size=(num_notes, 33))).astype(np.float32)
    embeds[50:60], embeds[110:] = embeds[:10], 0.0
    related = random_graph(num_notes, rng)
    candidates = rng.random(num_notes) < 0.8
    related = [positions[candidates[positions]] for positions in related]
    exact = (embeds.astype(np.float64) @ embeds.T.astype(np.float64)).astype(np.float32)
    ties = tie_order(num_notes)
    order = [
        sorted((n for n in range(num_notes) if candidates[n] and n != q), key=lambda n: (-exact[q, n], ties[n]))  # noqa: B023
        for q in range(num_notes)
    ]
    ranks = rank_related(embeds, related, candidates, chunk_size=7)
    expected = [1 + order[q].index(t) for q, t in zip(ranks.query, ranks.target, strict=True)]
    assert ranks.rank.tolist() == expected
    assert (ranks.pool == candidates.sum() - candidates[ranks.query]).all()
    # Control: what float32 alone says is another order.
    rounded = (embeds @ embeds.T) if tile == 4096 else (embeds.astype(np.float16).astype(np.float32) @ embeds.T)
    by_float32 = rank_related(partial(rows, rounded), related, candidates)
    assert by_float32.rank.tolist() != expected


def test_candidates_make_the_pools() -> None:
    rng = np.random.default_rng(5)
    candidates = rng.random(40) < 0.5
    related = [positions[candidates[positions]] for positions in random_graph(40, rng)]
    scores = rng.integers(0, 9, size=(40, 40)).astype(np.float32)
    measured = retrieval_metrics(partial(rows, scores), related, (1, 5), candidates=candidates)
    assert measured == pytest.approx(naive_metrics(scores, related, (1, 5), candidates), abs=1e-12)
    assert measured != pytest.approx(retrieval_metrics(partial(rows, scores), related, (1, 5)), abs=1e-3)
    with pytest.raises(ValueError, match="no candidate"):
        retrieval_metrics(np.eye(2), [np.array([1]), np.array([])], candidates=np.array([True, False]))
    with pytest.raises(ValueError, match="candidates has shape"):
        retrieval_metrics(np.eye(2), [np.array([1]), np.array([])], candidates=np.array([1, 1]))


def test_equals_scikit_learn_without_ties() -> None:
    """NDCG without a cut, over whole pools: a second, independent definition."""
    from sklearn.metrics import label_ranking_average_precision_score, ndcg_score

    rng = np.random.default_rng(6)
    num_notes = 50
    related = [rng.choice(np.delete(np.arange(num_notes), q), size=1 + q % 5, replace=False) for q in range(num_notes)]
    scores = rng.permutation(num_notes**2).reshape(num_notes, num_notes).astype(np.float64)
    truth = np.zeros((num_notes, num_notes))
    for query, positions in enumerate(related):
        truth[query, positions] = 1
    others = ~np.eye(num_notes, dtype=bool)
    truth_of_pool, scores_of_pool = truth[others].reshape(num_notes, -1), scores[others].reshape(num_notes, -1)
    measured = retrieval_metrics(partial(rows, scores), related, (5, 49))
    assert measured["ndcg@49"] == pytest.approx(ndcg_score(truth_of_pool, scores_of_pool), abs=1e-12)
    assert measured["ndcg@5"] == pytest.approx(ndcg_score(truth_of_pool, scores_of_pool, k=5), abs=1e-12)
    one = [positions[:1] for positions in related]  # with one related note its reciprocal rank is the precision
    single = np.zeros_like(truth)
    single[np.arange(num_notes), [positions[0] for positions in one]] = 1
    precision = label_ranking_average_precision_score(single[others].reshape(num_notes, -1), scores_of_pool)
    assert retrieval_metrics(partial(rows, scores), one, (5,))["mrr"] == pytest.approx(precision, abs=1e-12)
    assert measured["ndcg@5"] != pytest.approx(ndcg_score(truth_of_pool, -scores_of_pool, k=5), abs=1e-3)  # control


def test_slices_are_pairs_with_whole_pools() -> None:
    ranks = Ranks(np.array([0, 0, 2]), np.array([1, 2, 0]), np.array([3, 1, 2]), np.array([5, 5, 5]))
    assert mean_metrics(ranks.select(np.array([True, False, True])), (2,)) == {
        "recall@2": 0.5,
        "ndcg@2": pytest.approx(0.5 / math.log2(3)),
        "hit_rate@2": 0.5,
        "mrr": pytest.approx((1 / 3 + 1 / 2) / 2),
    }
    assert mean_metrics(ranks, (2,))["recall@2"] == 0.75 and ranks.queries.tolist() == [0, 2]
    with pytest.raises(ValueError, match="no pair"):
        mean_metrics(ranks.select(np.zeros(3, dtype=bool)))


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_chance_is_the_mean_over_random_orders(share: float) -> None:
    rng = np.random.default_rng(2)
    candidates = rng.random(25) < share
    related = [positions[candidates[positions]] for positions in random_graph(25, rng)]
    ks = (1, 5, 100)
    runs = []
    for _ in range(400):
        scores = rng.random((25, 25))
        runs.append(retrieval_metrics(partial(rows, scores), related, ks, candidates=candidates))
    expected = chance_metrics(related, ks, candidates)
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
        retrieval_metrics(lambda rows: np.array([[0, 0], [np.nan, 0]]), related)
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected \(2, 2\)"):
        retrieval_metrics(lambda rows: np.zeros((2, 3)), related)
    with pytest.raises(ValueError, match=r"expected \(2, D\)"):
        retrieval_metrics(np.eye(3), related)
    with pytest.raises(ValueError, match="ks must be"):
        retrieval_metrics(np.eye(2), related, ks=(0,))
    with pytest.raises(ValueError, match="chunk_size"):
        retrieval_metrics(np.eye(2), related, chunk_size=0)


@pytest.mark.parametrize("scale", [1e-300, 1e-24, 1e19, 1e39, 1e300])
def test_lengths_of_embeddings_make_no_difference(scale: float) -> None:
    """Products of numbers that float32 holds, or those themselves, may be more than it holds."""
    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(40, 8))
    related = [rng.choice(np.delete(np.arange(40), note), 3, replace=False) for note in range(40)]
    expected = retrieval_metrics(embeds, related, (5,))
    assert 0 < expected["recall@5"] < 1
    assert retrieval_metrics(embeds * scale, related, (5,)) == pytest.approx(expected, abs=1e-12)
    longer = np.where(np.arange(40)[:, None] % 2, embeds, 3 * embeds)  # control: each its own length
    assert retrieval_metrics(longer * scale, related, (5,)) != pytest.approx(expected, abs=1e-3)


def test_arguments_of_another_kind_are_refused_by_name() -> None:
    related = [np.array([1]), np.array([0])]
    with pytest.raises(TypeError, match=r"score is a list: give an \(N, D\) NumPy array"):
        retrieval_metrics([[1, 0], [0, 1]], related)  # type: ignore[arg-type]
    for ks in (10, "10", (), (10.5,), (10, 10)):
        with pytest.raises(ValueError, match=rf"ks must be distinct integers.*got {re.escape(repr(ks))}"):
            retrieval_metrics(np.eye(2), related, ks=ks)  # type: ignore[arg-type]
    for wrong in (["b"], ["0"], 0, "b", [0.0]):
        for measured in (lambda pairs: retrieval_metrics(np.eye(2), pairs), chance_metrics):
            with pytest.raises(
                ValueError, match=rf"related\[1\] = {re.escape(repr(wrong))} is no list of.*not their ids"
            ):
                measured([[1], wrong])
    assert retrieval_metrics(np.eye(2), [[1], []], ks=[1]) == retrieval_metrics(np.eye(2), [related[0], []], ks=(1,))


def test_a_system_that_knows_nothing_does_as_chance_also_on_a_sorted_table() -> None:
    """The popular notes stand first, and are related to most."""
    rng = np.random.default_rng(7)
    num_notes = 400
    popular = [np.delete(np.arange(40), q) if q < 40 else np.arange(40) for q in range(num_notes)]
    related = [rng.choice(notes, size=3, replace=False) for notes in popular]
    chance = chance_metrics(related, (10,))["recall@10"]
    for score in (np.zeros((num_notes, 8), dtype=np.float32), lambda rows: np.ones((len(rows), num_notes))):
        found = retrieval_metrics(score, related, (10,))["recall@10"]
        assert abs(found - chance) < 0.08  # by position it would be 0.25
    assert rank_related(np.zeros((num_notes, 8)), related).rank.tolist() == rank_related(score, related).rank.tolist()


def test_functions_are_asked_for_queries_alone_and_for_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    scores = np.random.default_rng(8).random((50, 50))

    def score(positions: np.ndarray) -> np.ndarray:
        asked.append(positions.tolist())
        return scores[positions]

    related = [np.array([0]) if note in (7, 20, 49) else np.array([], dtype=np.int64) for note in range(50)]
    rank_related(score, related)
    assert asked == [[7, 20, 49]]
    monkeypatch.setattr(metrics, "SCORE_NUMBERS", 100)
    asked.clear()
    rank_related(score, related)
    assert asked == [[7, 20], [49]]


def test_near_embeddings_of_a_wide_model_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of vectors that all point one way, float32 tells few apart: all are compared again, some at a time."""
    rng = np.random.default_rng(9)
    embeds = (1 + 1e-4 * rng.normal(size=(300, 512))).astype(np.float32)
    related = [np.array([(note + 1) % 300]) for note in range(300)]
    expected = rank_related(embeds, related)
    monkeypatch.setattr(metrics, "EXACT_NUMBERS", 4096)
    largest = 0
    double = metrics.torch.Tensor.double

    def measured(tensor: metrics.torch.Tensor) -> metrics.torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return double(tensor)

    monkeypatch.setattr(metrics.torch.Tensor, "double", measured)
    assert rank_related(embeds, related).rank.tolist() == expected.rank.tolist()
    assert 0 < largest <= 4096
