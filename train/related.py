"""Which notes are known to be related: asked of whole batches at once, without a matrix."""

import numpy as np


class RelatedNotes:
    """A set of unordered pairs of related notes.

    Args:
        pairs: (P, 2) int64, pairs of note indices, each in [0, num_notes).
        num_notes: how many notes there are.

    >>> related = RelatedNotes(np.array([(0, 2), (2, 3)]), num_notes=4)
    >>> related.of(2).tolist()
    [0, 3]
    >>> related.among(np.array([2, 1, 0])).tolist()
    [[0, 2], [2, 0]]
    """

    def __init__(self, pairs: np.ndarray, num_notes: int) -> None:
        a, b = np.asarray(pairs, dtype=np.int64).reshape(-1, 2).T
        keys = np.unique(np.concatenate([a * num_notes + b, b * num_notes + a]))
        self.num_notes = num_notes
        self._neighbors = keys % num_notes if num_notes else keys
        self._starts = np.searchsorted(keys, np.arange(num_notes + 1) * num_notes)

    @property
    def degrees(self) -> np.ndarray:
        """(num_notes,) int64: how many related notes each has."""
        return np.diff(self._starts)

    def of(self, note: int) -> np.ndarray:
        """The notes related to this one, in rising order."""
        return self._neighbors[self._starts[note] : self._starts[note + 1]]

    def among(self, notes: np.ndarray) -> np.ndarray:
        """The related pairs among distinct notes.

        Args:
            notes: (M,) int64, each note once.

        Returns:
            (K, 2) int64 positions in `notes`, each pair both ways, sorted. The work grows with the notes' degrees.
        """
        starts, counts = self._starts[notes], self.degrees[notes]
        sources = np.repeat(np.arange(len(notes)), counts)
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        neighbors = self._neighbors[np.repeat(starts, counts) + within]
        order = np.argsort(notes, kind="stable")
        found = np.searchsorted(notes, neighbors, sorter=order).clip(max=max(len(notes) - 1, 0))
        targets = order[found] if len(notes) else found
        hit = notes[targets] == neighbors
        ends = np.stack([sources[hit], targets[hit]], axis=1)
        return ends[np.lexsort((ends[:, 1], ends[:, 0]))]


__all__ = ["RelatedNotes"]
