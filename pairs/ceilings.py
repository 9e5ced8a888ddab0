"""How well notes of the simulated world can be ranked at best by who knows their subject, their look, or both.

Knowing a note's group (all notes of its subject, say) and nothing else, the best ranking puts the other notes of the
group first, in any order, then the rest, in any order: users' likings are drawn independently, so nothing known tells
the notes of either part from one another. Of g other notes in the group r are related; then a place of the first g
holds a related note with probability r / g, a later place with (R - r) / (N - 1 - g), where R is the number of all
related notes and N that of all notes. Recall@K and DCG@K are sums over places, so their expectations follow exactly.

These are expectations over the random orders: a system with the same knowledge may be a little luckier on a few notes.
"""

from collections.abc import Sequence

import numpy as np


def ceilings(
    subjects: Sequence[str], looks: Sequence[str], related: Sequence[np.ndarray], ks: Sequence[int]
) -> dict[str, dict[str, float]]:
    """The best possible expected Recall@K and NDCG@K of knowing the subject, the look, or both.

    `related` is taken as it is: pairs built from views hold some by chance ("noise pairs": popular notes, users' other
    likings), which nobody can foresee. They lower all three ceilings.

    Recall@K = hits / R. NDCG@K has gain 1 for a related note, discount 1 / log2(place + 1), and min(K, R) related notes
    first as the ideal. Notes without related notes are no queries; every other note is a candidate of a query.

    Args:
        subjects: the subject of each of N notes.
        looks: the look of each of N notes.
        related: N arrays of positions of related notes, without repetition and without the note itself.
        ks: cut-offs, each at least 1.

    Returns:
        {"text": {"recall@10": …, "ndcg@10": …, …}, "image": {…}, "both": {…}}, means over the queries.

    Raises:
        ValueError: lengths differ, a note is related to itself or twice to another, a cut-off is below 1, or no note
            has a related note.
    """
    n_notes = len(related)
    if not len(subjects) == len(looks) == n_notes:
        raise ValueError(f"{len(subjects)} subjects, {len(looks)} looks, {n_notes} related: give one of each a note.")
    if any(k < 1 for k in ks):
        raise ValueError(f"ks={list(ks)}: a cut-off counts places, give 1 or more.")
    for note, others in enumerate(related):
        if note in others or len(np.unique(others)) != len(others):
            raise ValueError(f"related[{note}]={list(others)}: name each other note once and never the note itself.")
    n_related = np.array([len(others) for others in related])
    queries: list[int] = np.flatnonzero(n_related).tolist()
    if not queries:
        raise ValueError("related: no note has a related note; build pairs with a lower threshold or more notes.")

    subject = np.unique(np.asarray(subjects), return_inverse=True)[1]
    look = np.unique(np.asarray(looks), return_inverse=True)[1]
    groups = {"text": subject, "image": look, "both": subject * n_notes + look}
    total = n_related[queries]
    # discounts[p] is the sum of discounts of the first p places
    discounts = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, n_notes + 1)))])  # (N,)
    result: dict[str, dict[str, float]] = {}
    for name, group in groups.items():
        size = np.array([np.sum(group == group[query]) - 1 for query in queries])
        inside = np.array([np.sum(group[related[query]] == group[query]) for query in queries])
        rate_inside = inside / np.maximum(size, 1)
        rate_outside = (total - inside) / np.maximum(n_notes - 1 - size, 1)
        result[name] = {}
        for k in ks:
            last = min(k, n_notes - 1)
            first_part = np.minimum(last, size)
            hits = rate_inside * first_part + rate_outside * (last - first_part)
            gain = rate_inside * discounts[first_part] + rate_outside * (discounts[last] - discounts[first_part])
            result[name][f"recall@{k}"] = float(np.mean(hits / total))
            result[name][f"ndcg@{k}"] = float(np.mean(gain / discounts[np.minimum(k, total)]))
    return result
