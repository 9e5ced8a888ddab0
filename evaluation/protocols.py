"""Which pairs are asked for, and among which notes: the two protocols.

`graph`: every note with a related note is a query, all its related notes are to be found among all other notes.

`paper`: as the paper's code evaluates. The pairs are read in their order, and one is kept only if neither of its notes
has been seen on either side, so that each query has one related note, and Recall@K is a hit rate. The queries are not
in the pool.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Protocol = Literal["graph", "paper"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


@dataclass(frozen=True)
class Task:
    """What is to be found where.

    Attributes:
        related: for each of N notes the positions of the notes to find; empty for a note that is no query.
        candidates: (N,) bool, the notes that pools are made of; None: all.
    """

    related: Sequence[np.ndarray]
    candidates: np.ndarray | None = None

    @property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(P,) int64 each, the queries and their related notes, in the order of `evaluation.metrics.Ranks`."""
        sizes = [len(positions) for positions in self.related]
        return np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.zeros(0, dtype=np.int64), *self.related])


def make_task(protocol: Protocol, pairs: np.ndarray, num_notes: int) -> Task:
    """The task of a protocol.

    Args:
        protocol: `graph` or `paper`.
        pairs: (P, 2) int64 positions of query and related note, in the order of the table, each pair once.
        num_notes: N.

    Raises:
        ValueError: the protocol is unknown.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r}: choose one of {', '.join(PROTOCOLS)}.")
    candidates = None
    if protocol == "paper":
        pairs = pairs[_first_meetings(pairs, num_notes)]
        candidates = np.ones(num_notes, dtype=bool)
        candidates[pairs[:, 0]] = False
    order = np.argsort(pairs[:, 0], kind="stable")
    edges = np.searchsorted(pairs[order, 0], np.arange(num_notes + 1))
    targets = pairs[order, 1]
    return Task([targets[edges[note] : edges[note + 1]] for note in range(num_notes)], candidates)


def _first_meetings(pairs: np.ndarray, num_notes: int) -> np.ndarray:
    """(P,) bool: the pairs neither of whose notes is in a pair that was kept before."""
    seen = np.zeros(num_notes, dtype=bool)
    kept = np.zeros(len(pairs), dtype=bool)
    for number, (query, target) in enumerate(pairs.tolist()):
        if query != target and not (seen[query] or seen[target]):
            seen[query] = seen[target] = kept[number] = True
    return kept


__all__ = ["PROTOCOLS", "Protocol", "Task", "make_task"]
