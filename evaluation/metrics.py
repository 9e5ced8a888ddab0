"""Retrieval metrics, exact, by rank counting.

Every note with at least one related note is a query; its pool is all other notes, or those that are candidates. Nothing
is sorted: the rank of a related note is one more than the number of notes of the pool placed before it, which are those
with a higher score, and those with an equal score that come first in a fixed random order (`tie_order`). So ties always
resolve the same way, a system that knows nothing does as chance does also on a table sorted by popularity, K may exceed
the pool, and memory is one tile of scores, whatever the number of notes.

`rank_related` does the work once; every metric, of all queries or of some, is read off the ranks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from tqdm.auto import tqdm

ScoreFunction = Callable[[np.ndarray], np.ndarray]
"""`score(rows)` gives the scores of the R notes at positions `rows` (int64) against all N notes, (R, N) numbers."""

TILE_COLUMNS = 4096
"""Notes of the pool that a chunk of queries is compared with at a time: a tile of scores has to stay in the cache."""

EXACT_NUMBERS = 2**22
"""Numbers of each side of exact products that are multiplied at a time."""

SCORE_NUMBERS = 2**26
"""Scores that a `ScoreFunction` is asked for at a time, at most; of one note at least."""


@dataclass(frozen=True)
class Ranks:
    """Where the related notes of the queries were found: one entry for each of P pairs of a query and a related note.

    Attributes:
        query: (P,) int64, positions of the queries, ascending.
        target: (P,) int64, position of the related note.
        rank: (P,) int64, its place in the query's pool, from 1.
        pool: (P,) int64, how many notes the pool holds.
    """

    query: np.ndarray
    target: np.ndarray
    rank: np.ndarray
    pool: np.ndarray

    @property
    def queries(self) -> np.ndarray:
        """(Q,) int64, the positions of the queries, each once, ascending: the order of `metrics_per_query`."""
        return np.unique(self.query)

    def select(self, pairs: np.ndarray) -> "Ranks":
        """The ranks of some pairs alone, by a (P,) bool mask: a slice of the evaluation. The pools stay whole."""
        return Ranks(self.query[pairs], self.target[pairs], self.rank[pairs], self.pool[pairs])


def retrieval_metrics(
    score: np.ndarray | ScoreFunction,
    related: Sequence[np.ndarray],
    ks: Sequence[int] = (10, 100),
    chunk_size: int = 256,
    candidates: np.ndarray | None = None,
) -> dict[str, float]:
    """Mean Recall@K, NDCG@K, hit rate@K and MRR over all queries: `mean_metrics` of `rank_related`.

    Returns:
        `{"recall@10": …, "ndcg@10": …, "hit_rate@10": …, …, "mrr": …}`, each in [0, 1].

    Raises: what these two raise.

    >>> embeds = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> retrieval_metrics(embeds, [np.array([2]), np.array([0]), np.array([])], ks=(1,))
    {'recall@1': 0.5, 'ndcg@1': 0.5, 'hit_rate@1': 0.5, 'mrr': 0.75}
    """
    _check_ks(ks)
    return mean_metrics(rank_related(score, related, candidates, chunk_size), ks)


def mean_metrics(ranks: Ranks, ks: Sequence[int] = (10, 100)) -> dict[str, float]:
    """The means of `metrics_per_query` over the queries."""
    return {name: float(values.mean()) for name, values in metrics_per_query(ranks, ks).items()}


def metrics_per_query(ranks: Ranks, ks: Sequence[int] = (10, 100)) -> dict[str, np.ndarray]:
    """Recall@K, NDCG@K, hit rate@K and the reciprocal rank of each query, in the order of `ranks.queries`.

    Recall@K is hits / number of related notes; hit rate@K is 1 where there is a hit. NDCG@K has binary gains and the
    discount 1 / log2(rank + 1), divided by its value when min(K, number of related notes) related notes come first
    (Järvelin and Kekäläinen, 2002, https://doi.org/10.1145/582415.582418). The reciprocal rank is that of the first
    related note, without a cut.

    Returns:
        `{"recall@10": (Q,) float64, …, "mrr": (Q,) float64}`.

    Raises:
        ValueError: `ks` are no integers of at least 1, each once; there is no pair.
    """
    _check_ks(ks)
    if not len(ranks.query):
        raise ValueError("there is no pair of a query and a related note to measure.")
    _, place, sizes = np.unique(ranks.query, return_inverse=True, return_counts=True)
    values: dict[str, np.ndarray] = {}
    ideals = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, sizes.max() + 2)))])
    for k in ks:
        hit = ranks.rank <= k
        hits = np.bincount(place, weights=hit, minlength=len(sizes))
        gains = np.bincount(place, weights=hit / np.log2(ranks.rank + 1), minlength=len(sizes))
        values[f"recall@{k}"] = hits / sizes
        values[f"ndcg@{k}"] = gains / ideals[np.minimum(k, sizes)]
        values[f"hit_rate@{k}"] = (hits > 0).astype(np.float64)
    first = np.full(len(sizes), np.iinfo(np.int64).max)
    np.minimum.at(first, place, ranks.rank)
    values["mrr"] = 1 / first
    return values


def rank_related(
    score: np.ndarray | ScoreFunction,
    related: Sequence[np.ndarray],
    candidates: np.ndarray | None = None,
    chunk_size: int = 256,
) -> Ranks:
    """Find the rank of every related note of every query, exactly, without sorting.

    Args:
        score: (N, D) float embeddings, compared by their dot product (so normalise them for the cosine), or a function
            that gives the scores of some notes. Embeddings are compared in tiles of float32 products; whatever
            lies too near to the related note's score for float32 to tell is compared again by the float64 product
            rounded to float32, which does not depend on tiles.
        related: for each of the N notes the positions of its related notes, integers; may be empty.
        candidates: (N,) bool, the notes that pools are made of. Default: all.
        chunk_size: queries scored at once, fewer where a function would give more than `SCORE_NUMBERS`. Memory beside
            the embeddings is some tens of MB, and a few times the scores of a chunk for a function.

    Raises:
        TypeError: `score` is neither an array nor a function.
        ValueError: a related note is not given by its position; a position is out of range, repeated, the note itself
            or no candidate; no note has a related note; the chunk size is below 1; scores are NaN or misshapen.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    related = _checked_related(related, candidates)
    sizes = np.array([len(positions) for positions in related])
    query = np.repeat(np.arange(len(related)), sizes)
    target = np.concatenate([positions for positions in related if len(positions)])
    is_candidate = np.ones(len(related), dtype=bool) if candidates is None else candidates
    if not isinstance(score, np.ndarray) and not callable(score):
        raise TypeError(
            f"score is a {type(score).__name__}: give an (N, D) NumPy array of embeddings, as np.asarray(score) makes "
            "it of lists, or a function of scores."
        )
    if isinstance(score, np.ndarray):
        rank = _ranks_of_embeds(score, query, target, is_candidate, chunk_size)
    else:
        rank = _ranks_of_scores(score, query, target, is_candidate, chunk_size)
    return Ranks(query, target, rank, int(is_candidate.sum()) - is_candidate[query].astype(np.int64))


def chance_metrics(
    related: Sequence[np.ndarray], ks: Sequence[int] = (10, 100), candidates: np.ndarray | None = None
) -> dict[str, float]:
    """The exact expectation of `retrieval_metrics` when each pool is in uniformly random order.

    With M notes in the pool and R of them related: E[Recall@K] = min(K, M) / M. Each rank holds a related note with
    probability R / M, so E[NDCG@K] = R / M * (discounts of the first min(K, M) ranks) / ideal. No related note is among
    the first K with probability C(M - K, R) / C(M, R), which gives the hit rate, and the first one has rank k with
    probability C(M - k, R - 1) / C(M, R), which gives E[MRR].

    >>> chance_metrics([np.array([1]), np.array([0]), np.array([])], ks=(1,))
    {'recall@1': 0.5, 'ndcg@1': 0.5, 'hit_rate@1': 0.5, 'mrr': 0.75}
    """
    _check_ks(ks)
    related = _checked_related(related, candidates)
    is_candidate = np.ones(len(related), dtype=bool) if candidates is None else candidates
    pools = is_candidate.sum() - is_candidate
    kinds = [(int(pools[query]), len(positions)) for query, positions in enumerate(related) if len(positions)]
    expected: dict[str, float] = dict.fromkeys(metric_names(ks), 0.0)
    for (pool, size), count in zip(*np.unique(kinds, axis=0, return_counts=True), strict=True):
        weight = count / len(kinds)
        for k in ks:
            cut = min(k, pool)
            expected[f"recall@{k}"] += weight * cut / pool
            expected[f"ndcg@{k}"] += weight * size / pool * _ideal_dcg(cut) / _ideal_dcg(min(k, size))
            missed = np.clip(1 - cut / (pool - np.arange(size)), 0, 1).prod()
            expected[f"hit_rate@{k}"] += weight * (1 - missed)
        expected["mrr"] += weight * _expected_reciprocal_rank(int(pool), int(size))
    return {name: float(value) for name, value in expected.items()}


def metric_names(ks: Sequence[int]) -> list[str]:
    """The keys of the metrics, in the order in which tables show them."""
    return [f"{name}@{k}" for k in ks for name in ("recall", "ndcg", "hit_rate")] + ["mrr"]


def _ranks_of_embeds(
    embeds: np.ndarray, query: np.ndarray, target: np.ndarray, is_candidate: np.ndarray, chunk_size: int
) -> np.ndarray:
    """(P,) ranks by the dot product of (N, D) embeddings."""
    if embeds.ndim != 2 or len(embeds) != len(is_candidate):
        raise ValueError(
            f"score has shape {embeds.shape}, expected ({len(is_candidate)}, D): one embedding for each entry of "
            "related."
        )
    finite = np.isfinite(embeds).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"The embedding of note {int(finite.argmin())} contains NaN or infinity: check it before evaluating."
        )
    largest = max(float(embeds.max(initial=0)), -float(embeds.min(initial=0)))
    if largest and not 2.0**-30 < largest < 2.0**30:  # their products could leave float32's range
        embeds = np.ldexp(embeds.astype(np.float64), -math.frexp(largest)[1])
    vectors = torch.from_numpy(np.ascontiguousarray(embeds, dtype=np.float32))
    columns = torch.from_numpy(np.flatnonzero(is_candidate))
    pool = vectors if len(columns) == len(vectors) else vectors[columns]
    order = torch.from_numpy(tie_order(len(vectors)))
    # Rounding moves a float32 product of D terms by no more than D + 4 half-units in the last place of |a| · |b|.
    error = (vectors.shape[1] + 4) * 2.0**-24 * vectors.norm(dim=1) * pool.norm(dim=1).max()
    is_blank = (vectors.norm(dim=1) == 0).numpy()[query]
    rank = np.empty(len(query), dtype=np.int64)
    rank[is_blank] = _ranks_by_tie_order(query[is_blank], target[is_blank], is_candidate)
    query, target = query[~is_blank], target[~is_blank]
    rank[~is_blank] = _ranks_of_tiles(vectors, pool, columns, error, order, query, target, chunk_size)
    return rank


def tie_order(num_notes: int) -> np.ndarray:
    """(N,) int64, each once: of notes with equal scores the one with the lower number comes first."""
    return np.random.default_rng(0).permutation(num_notes)


def _ranks_by_tie_order(query: np.ndarray, target: np.ndarray, is_candidate: np.ndarray) -> np.ndarray:
    """(P,) ranks of queries that score all notes alike: a blank note's embedding is zero."""
    order = tie_order(len(is_candidate))
    ahead = np.searchsorted(np.sort(order[is_candidate]), order[target])
    ranks: np.ndarray = 1 + ahead - (is_candidate[query] & (order[query] < order[target]))
    return ranks


def _ranks_of_tiles(
    vectors: torch.Tensor,
    pool: torch.Tensor,
    columns: torch.Tensor,
    error: torch.Tensor,
    order: torch.Tensor,
    query: np.ndarray,
    target: np.ndarray,
    chunk_size: int,
) -> np.ndarray:
    """(P,) ranks by tiles of float32 products; `error` (N,) bounds those of each query."""
    queries, places = np.unique(query, return_inverse=True)
    edges = np.searchsorted(places, np.arange(0, len(queries) + chunk_size, chunk_size))  # pairs of each chunk
    rank = np.empty(len(query), dtype=np.int64)
    starts = range(0, len(queries), chunk_size)
    for chunk, start in enumerate(tqdm(starts, desc="Ranking", unit="chunk", disable=len(starts) < 64, leave=False)):
        pairs = slice(edges[chunk], edges[chunk + 1])
        rows = torch.from_numpy(queries[start : start + chunk_size])
        row_of = torch.from_numpy(places[pairs] - start)  # pair ─► row of the tile
        own, wanted = torch.from_numpy(query[pairs]), torch.from_numpy(target[pairs])
        value = _exact_products(vectors, own, wanted)
        before = torch.zeros(len(own), dtype=torch.int64)
        for first in range(0, len(columns), TILE_COLUMNS):
            some = columns[first : first + TILE_COLUMNS]
            tile = vectors[rows] @ pool[first : first + TILE_COLUMNS].T
            place = torch.searchsorted(some, rows)
            inside = torch.where(place < len(some), some[place.clamp(max=len(some) - 1)] == rows, False)
            tile[inside, place[inside]] = -torch.inf  # the query leaves its own pool
            for part in torch.arange(len(own)).split(chunk_size):
                distance = tile[row_of[part]] - value[part, None]
                bound = error[own[part], None]
                before[part] += (distance > bound).sum(1)
                pair, column = (distance.abs_() <= bound).nonzero(as_tuple=True)
                pair = part[pair]
                exact, other = _exact_products(vectors, own[pair], some[column]), some[column]
                ahead = (exact > value[pair]) | ((exact == value[pair]) & (order[other] < order[wanted[pair]]))
                before.index_add_(0, pair, ahead.long())
        rank[pairs] = (before + 1).numpy()
    return rank


def _exact_products(vectors: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(P,) float32: the float64 dot products of pairs of vectors, rounded: equal vectors have equal products."""
    size = max(1, EXACT_NUMBERS // vectors.shape[1])
    parts = zip(rows.split(size), columns.split(size), strict=True)
    products = [(vectors[some].double() * vectors[others].double()).sum(1).float() for some, others in parts]
    return torch.cat(products) if products else vectors.new_empty(0)


def _ranks_of_scores(
    score: ScoreFunction, query: np.ndarray, target: np.ndarray, is_candidate: np.ndarray, chunk_size: int
) -> np.ndarray:
    """(P,) ranks by a function's scores."""
    num_notes, order = len(is_candidate), tie_order(len(is_candidate))
    queries, firsts = np.unique(query, return_index=True)
    edges = np.append(firsts, len(query))
    rank = np.empty(len(query), dtype=np.int64)
    size = max(1, min(chunk_size, SCORE_NUMBERS // num_notes))
    starts = range(0, len(queries), size)
    for start in tqdm(starts, desc="Ranking", unit="chunk", disable=len(starts) < 64, leave=False):
        rows = queries[start : start + size]
        scores = score(rows)  # (R, N)
        if scores.shape != (len(rows), num_notes):
            raise ValueError(
                f"score of {len(rows)} notes has shape {scores.shape}, expected {(len(rows), num_notes)}: "
                "give a score for every pair of notes."
            )
        for number, (note, row) in enumerate(zip(rows.tolist(), scores, strict=True), start=start):
            if np.isnan(row).any():
                raise ValueError(f"The scores of note {note} contain NaN: check its embedding before evaluating.")
            in_pool = is_candidate.copy()
            in_pool[note] = False  # the query leaves its own pool
            for pair in range(edges[number], edges[number + 1]):
                position = target[pair]
                ahead = (row > row[position]) | ((row == row[position]) & (order < order[position]))
                rank[pair] = 1 + np.count_nonzero(ahead & in_pool)
    return rank


def _ideal_dcg(count: int) -> float:
    """The discounted gain of `count` related notes on the first `count` ranks."""
    return float(np.sum(1 / np.log2(np.arange(2, count + 2))))


def _expected_reciprocal_rank(pool: int, size: int) -> float:
    ranks = np.arange(1, pool - size + 2)
    # P(first = k + 1) / P(first = k) = (M - k - R + 1) / (M - k), which never forms the huge binomials.
    ratios = (pool - ranks[:-1] - size + 1) / (pool - ranks[:-1])
    probabilities = size / pool * np.cumprod(np.concatenate([[1.0], ratios]))
    return float(np.sum(probabilities / ranks))


def _check_ks(ks: Sequence[int]) -> None:
    is_listed = isinstance(ks, Sequence) and len(ks) > 0 and all(isinstance(k, Integral) for k in ks)
    if not is_listed or min(ks) < 1 or len(set(ks)) < len(ks):
        raise ValueError(f"ks must be distinct integers of at least 1, as (10, 100) or (10,), got {ks!r}.")


def _checked_positions(query: int, positions: np.ndarray) -> np.ndarray:
    """(R,) int64, one note's related notes. An empty array may be of any dtype."""
    found = np.asarray(positions)
    if found.ndim != 1 or len(found) and not np.issubdtype(found.dtype, np.integer):
        raise ValueError(
            f"related[{query}] = {positions!r} is no list of integers: give the positions of its related notes among "
            "the notes, from 0, not their ids; pairs.tables.related_indices makes them of a table of pairs."
        )
    return found.astype(np.int64)


def _checked_related(related: Sequence[np.ndarray], candidates: np.ndarray | None) -> list[np.ndarray]:
    checked = [_checked_positions(query, positions) for query, positions in enumerate(related)]
    if candidates is not None and (candidates.shape != (len(checked),) or candidates.dtype != bool):
        raise ValueError(
            f"candidates has shape {candidates.shape} and dtype {candidates.dtype}, expected ({len(checked)},) bool: "
            "one entry for each note."
        )
    for query, positions in enumerate(checked):
        if len(positions) == 0:
            continue
        if positions.min() < 0 or positions.max() >= len(checked):
            raise ValueError(
                f"related[{query}] = {positions.tolist()} has a position outside 0..{len(checked) - 1}: "
                "give positions among the evaluated notes only."
            )
        if query in positions or len(np.unique(positions)) < len(positions):
            raise ValueError(
                f"related[{query}] = {positions.tolist()} names the note itself or a note twice: remove those pairs."
            )
        if candidates is not None and not candidates[positions].all():
            raise ValueError(
                f"related[{query}] = {positions.tolist()} names a note that is no candidate and could not be found: "
                "remove the pair, or make the note a candidate."
            )
    if not any(len(positions) for positions in checked):
        raise ValueError("related has no related note at all: check that the pairs' note ids occur among the notes.")
    return checked


__all__ = [
    "Ranks",
    "ScoreFunction",
    "chance_metrics",
    "mean_metrics",
    "metric_names",
    "metrics_per_query",
    "rank_related",
    "retrieval_metrics",
    "tie_order",
]
