"""Retrieval metrics, exact, by rank counting.

Every note with at least one related note is a query; its pool is all other notes. Nothing is sorted: the rank of a
related note is one more than the number of pool notes placed before it, which are those with a higher score, and those
with an equal score and a lower position. So ties always resolve the same way, K may exceed the pool, and memory is one
chunk of scores, whatever the number of notes.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tqdm.auto import tqdm

ScoreFunction = Callable[[int, int], np.ndarray]
"""`score(start, stop)` gives the scores of notes start..stop-1 against all N notes, (stop - start, N) floats."""


def retrieval_metrics(
    score: np.ndarray | ScoreFunction,
    related: Sequence[np.ndarray],
    ks: Sequence[int] = (10, 100),
    chunk_size: int = 1024,
) -> dict[str, float]:
    """Mean Recall@K, NDCG@K and MRR over all queries: the averages of `per_query_metrics`, which see for arguments.

    Returns:
        `{"recall@10": …, "ndcg@10": …, …, "mrr": …}`, each in [0, 1].

    >>> embeds = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> retrieval_metrics(embeds, [np.array([2]), np.array([0]), np.array([])], ks=(1,))
    {'recall@1': 0.5, 'ndcg@1': 0.5, 'mrr': 0.75}
    """
    return {name: float(values.mean()) for name, values in per_query_metrics(score, related, ks, chunk_size).items()}


def per_query_metrics(
    score: np.ndarray | ScoreFunction,
    related: Sequence[np.ndarray],
    ks: Sequence[int] = (10, 100),
    chunk_size: int = 1024,
) -> dict[str, np.ndarray]:
    """Recall@K, NDCG@K and the reciprocal rank of each query, in the order of the notes.

    Recall@K is hits / number of related notes. NDCG@K has binary gains and the discount 1 / log2(rank + 1), divided by
    its value when min(K, number of related notes) related notes come first (Järvelin and Kekäläinen, 2002,
    https://doi.org/10.1145/582415.582418). The reciprocal rank is that of the first related note, without a cut.

    Args:
        score: (N, D) float embeddings, compared by their dot product (so normalise them for the cosine), or a function
            that gives the scores of a range of notes.
        related: for each of the N notes the positions of its related notes, integers; may be empty.
        ks: cuts, each at least 1.
        chunk_size: notes scored at once; memory is about `chunk_size * N * 12` bytes.

    Returns:
        `{"recall@10": (Q,) float64, …, "mrr": (Q,) float64}` for the Q notes with a related note.

    Raises:
        ValueError: if a position is out of range, repeated or the note itself, if no note has a related note, if a K
            or the chunk size is below 1, or if scores are NaN or of the wrong shape.
    """
    _check_ks(ks)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    related = _checked_related(related)
    score_function = _dot_products(score, len(related)) if isinstance(score, np.ndarray) else score
    per_query = [
        _query_metrics(ranks, ks) for ranks in _ranks_of_related(score_function, related, chunk_size)
    ]  # a list of Q dicts
    return {name: np.array([values[name] for values in per_query]) for name in metric_names(ks)}


def chance_metrics(related: Sequence[np.ndarray], ks: Sequence[int] = (10, 100)) -> dict[str, float]:
    """The exact expectation of `retrieval_metrics` when each pool is in uniformly random order.

    With M = N - 1 notes in the pool and R of them related: E[Recall@K] = min(K, M) / M. Each rank holds a related note
    with probability R / M, so E[NDCG@K] = R / M * (discounts of the first min(K, M) ranks) / ideal. The first related
    note has rank k with probability C(M - k, R - 1) / C(M, R), which gives E[MRR].

    >>> chance_metrics([np.array([1]), np.array([0]), np.array([])], ks=(1,))
    {'recall@1': 0.5, 'ndcg@1': 0.5, 'mrr': 0.75}
    """
    _check_ks(ks)
    related = _checked_related(related)
    pool = len(related) - 1
    sizes, queries = np.unique([len(positions) for positions in related if len(positions)], return_counts=True)
    expected: dict[str, float] = dict.fromkeys(metric_names(ks), 0.0)
    for size, weight in zip(sizes.tolist(), (queries / queries.sum()).tolist(), strict=True):
        for k in ks:
            expected[f"recall@{k}"] += weight * min(k, pool) / pool
            expected[f"ndcg@{k}"] += weight * size / pool * _ideal_dcg(min(k, pool)) / _ideal_dcg(min(k, size))
        expected["mrr"] += weight * _expected_reciprocal_rank(pool, size)
    return expected


def metric_names(ks: Sequence[int]) -> list[str]:
    """The keys of the metrics, in the order in which tables show them."""
    return [f"{name}@{k}" for k in ks for name in ("recall", "ndcg")] + ["mrr"]


def _ranks_of_related(score: ScoreFunction, related: Sequence[np.ndarray], chunk_size: int) -> Iterator[np.ndarray]:
    """Yield for each query the 1-based ranks (R,) of its R related notes in its pool."""
    num_notes = len(related)
    starts = range(0, num_notes, chunk_size)
    for start in tqdm(starts, desc="Ranking", unit="chunk", disable=len(starts) < 2, leave=False):
        stop = min(start + chunk_size, num_notes)
        queries = [query for query in range(start, stop) if len(related[query])]
        if not queries:
            continue
        scores = score(start, stop)  # (stop - start, N)
        if scores.shape != (stop - start, num_notes):
            raise ValueError(
                f"score({start}, {stop}) has shape {scores.shape}, expected {(stop - start, num_notes)}: "
                "give a score for every pair of notes."
            )
        for query in queries:
            row = scores[query - start]
            if np.isnan(row).any():
                raise ValueError(f"The scores of note {query} contain NaN: check its embedding before evaluating.")
            # The query leaves its own pool; the positions behind it move up by one.
            pool = np.delete(row, query)  # (N - 1,)
            positions = related[query] - (related[query] > query)
            yield np.array([_rank(pool, position) for position in positions.tolist()])


def _rank(pool: np.ndarray, position: int) -> int:
    value = pool[position]
    return 1 + int(np.count_nonzero(pool > value)) + int(np.count_nonzero(pool[:position] == value))


def _query_metrics(ranks: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    values = {}
    for k in ks:
        hits = ranks[ranks <= k]
        values[f"recall@{k}"] = len(hits) / len(ranks)
        values[f"ndcg@{k}"] = float(np.sum(1 / np.log2(hits + 1))) / _ideal_dcg(min(k, len(ranks)))
    values["mrr"] = 1 / int(ranks.min())
    return values


def _ideal_dcg(count: int) -> float:
    """The discounted gain of `count` related notes on the first `count` ranks."""
    return float(np.sum(1 / np.log2(np.arange(2, count + 2))))


def _expected_reciprocal_rank(pool: int, size: int) -> float:
    ranks = np.arange(1, pool - size + 2)
    # P(first = k + 1) / P(first = k) = (M - k - R + 1) / (M - k), which never forms the huge binomials.
    ratios = (pool - ranks[:-1] - size + 1) / (pool - ranks[:-1])
    probabilities = size / pool * np.cumprod(np.concatenate([[1.0], ratios]))
    return float(np.sum(probabilities / ranks))


def _dot_products(embeds: np.ndarray, num_notes: int) -> ScoreFunction:
    if embeds.ndim != 2 or len(embeds) != num_notes:
        raise ValueError(
            f"score has shape {embeds.shape}, expected ({num_notes}, D): one embedding for each entry of related."
        )
    # Float32 products of equal embeddings can differ in the last bit with their place in the matrix. Rounding float64
    # products to float32 makes them equal, so that ties, and with them the metrics, do not depend on chunk_size.
    exact = embeds.astype(np.float64)
    return lambda start, stop: (exact[start:stop] @ exact.T).astype(np.float32)


def _check_ks(ks: Sequence[int]) -> None:
    if not ks or min(ks) < 1 or len(set(ks)) < len(ks):
        raise ValueError(f"ks must be distinct integers of at least 1, got {list(ks)}.")


def _checked_related(related: Sequence[np.ndarray]) -> list[np.ndarray]:
    checked = [np.asarray(positions, dtype=np.int64) for positions in related]
    for query, positions in enumerate(checked):
        if len(positions) == 0:
            continue
        if not np.issubdtype(np.asarray(related[query]).dtype, np.integer):
            raise ValueError(f"related[{query}] = {related[query]} is not of integers: give positions of notes.")
        if positions.min() < 0 or positions.max() >= len(checked):
            raise ValueError(
                f"related[{query}] = {positions.tolist()} has a position outside 0..{len(checked) - 1}: "
                "give positions among the evaluated notes only."
            )
        if query in positions or len(np.unique(positions)) < len(positions):
            raise ValueError(
                f"related[{query}] = {positions.tolist()} names the note itself or a note twice: remove those pairs."
            )
    if not any(len(positions) for positions in checked):
        raise ValueError("related has no related note at all: check that the pairs' note ids occur among the notes.")
    return checked
