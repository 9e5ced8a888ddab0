"""Which notes share a batch: plans of batches, the same in every process, each of which encodes its share.

A plan names each note once, however many of its pairs the batch holds. Everything random is drawn from the seed, the
epoch and the number of the batch, so that a resumed run and a run on another number of processes see the same batches.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch.utils.data import Sampler

from train.related import RelatedNotes

BatchKind = Literal["pairs", "graph"]


@dataclass(frozen=True)
class BatchPlan:
    """One batch of all processes together.

    Attributes:
        notes: (M,) int64 rows of the table of notes, each once.
        positives: (P, 2) int64 positions in `notes`: the related pairs to learn from, each both ways.
        withheld_text: (M,) bool: encode the note without its text, if it has an image.
        withheld_image: (M,) bool: encode the note without its image, if it has a text. Never both.
    """

    notes: np.ndarray
    positives: np.ndarray
    withheld_text: np.ndarray
    withheld_image: np.ndarray


@dataclass(frozen=True)
class BatchOptions:
    """How batches are made.

    Attributes:
        kind: `pairs`: related pairs drawn at random, each once an epoch. `graph`: connected neighbourhoods of the graph
            of pairs, with all pairs among their notes; each note about once an epoch.
        pairs: size of a batch: as many pairs, or twice as many notes.
        neighborhood: `graph`: the most notes of one neighbourhood.
        hard_negatives: mined notes added for every two notes of the batch.
        text_dropout: probability with which a note's text is withheld.
        image_dropout: probability with which a note's image is withheld.
        seed: of all that is random here.
    """

    kind: BatchKind = "pairs"
    pairs: int = 32
    neighborhood: int = 8
    hard_negatives: int = 0
    text_dropout: float = 0.0
    image_dropout: float = 0.0
    seed: int = 0


def distinct_notes(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(P, 2) pairs of notes ─► (M,) their notes, each once, and (2P, 2) the pairs' positions in them, both ways.

    >>> notes, positives = distinct_notes(np.array([(7, 4), (4, 9)]))
    >>> notes.tolist(), positives.tolist()
    ([4, 7, 9], [[1, 0], [0, 2], [0, 1], [2, 0]])
    """
    notes, places = np.unique(pairs, return_inverse=True)
    places = places.reshape(-1, 2)
    return notes, np.concatenate([places, places[:, ::-1]])


def drawn_log_probability(degrees: np.ndarray, batch: int, total: int) -> np.ndarray:
    """log of the probability that a note is in a batch of pairs drawn at random without replacement, each pair being
    in it with probability batch / total: 1 − (1 − batch / total)^degree.

    Args:
        degrees: (N,) int64, how many pairs each note has. A note of no pair counts as having one.
        batch: pairs of a batch.
        total: number of pairs.

    Returns:
        (N,) float32; all 0 where a batch holds all pairs.
    """
    if batch >= total:
        return np.zeros(len(degrees), dtype=np.float32)
    missed = np.maximum(degrees, 1) * np.log1p(-batch / total)
    return np.log(-np.expm1(missed)).astype(np.float32)


class BatchPlanner(Sampler[list[BatchPlan]]):
    """The plans of an epoch, as the batch sampler of a `DataLoader` (which wants lists: of one plan each).

    Args:
        pairs: (P, 2) int64, each unordered pair of related notes once.
        related: the same pairs.
        options: how batches are made.
        mine: epoch ─► (N, K) int64, for each note others that look related and are not known to be (−1: none); asked
            once an epoch. Needed with `hard_negatives`.
    """

    def __init__(
        self,
        pairs: np.ndarray,
        related: RelatedNotes,
        options: BatchOptions,
        mine: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        self.pairs = pairs
        self.related = related
        self.options = options
        self.mine = mine
        self.epoch = 0
        self._connected = np.flatnonzero(related.degrees)

    def set_epoch(self, epoch: int) -> None:
        """What the next iteration is to draw."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.options.kind == "graph":
            return max(1, len(self._connected) // (2 * self.options.pairs))
        return -(-len(self.pairs) // self.options.pairs)

    def __iter__(self) -> Iterator[list[BatchPlan]]:
        for plan in self.plans():
            yield [plan]

    def plans(self) -> Iterator[BatchPlan]:
        """The plans of the epoch that `set_epoch` named."""
        options, length = self.options, len(self)
        mined = None if not options.hard_negatives or self.mine is None else self.mine(self.epoch)
        draw = np.random.default_rng((options.seed, self.epoch))
        batches = self._graph_batches(draw) if options.kind == "graph" else self._pair_batches(draw)
        for number in range(length):
            notes, positives = next(batches)
            # A generator for each batch: skipped batches need not be finished to know the next.
            chance = np.random.default_rng((options.seed, self.epoch, number))
            if mined is not None:
                notes = self._with_hard_negatives(notes, mined, chance)
            kind = chance.random(len(notes))
            withheld_text = kind < options.text_dropout
            withheld_image = ~withheld_text & (kind < options.text_dropout + options.image_dropout)
            yield BatchPlan(notes, positives, withheld_text, withheld_image)

    def _pair_batches(self, draw: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        order = draw.permutation(len(self.pairs))
        for start in range(0, len(order), self.options.pairs):
            yield distinct_notes(self.pairs[order[start : start + self.options.pairs]])

    def _graph_batches(self, draw: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        size = min(2 * self.options.pairs, len(self._connected))
        batch: dict[int, None] = {}
        for neighborhood in self._neighborhoods(draw):
            for note in neighborhood:
                batch[note] = None
                if len(batch) == size:
                    notes = np.fromiter(batch, np.int64, size)
                    yield notes, self.related.among(notes)
                    batch = {}

    def _neighborhoods(self, draw: np.random.Generator) -> Iterator[list[int]]:
        """Connected notes, `neighborhood` at most: the graph cut up at random, again and again."""
        while True:
            taken = np.zeros(self.related.num_notes, dtype=bool)
            for seed in draw.permutation(self._connected).tolist():
                if taken[seed]:
                    continue
                taken[seed] = True
                members = [seed]
                for member in members:  # grows while it is read: breadth first
                    near = self.related.of(member)
                    near = draw.permutation(near[~taken[near]])[: self.options.neighborhood - len(members)]
                    taken[near] = True
                    members += near.tolist()
                    if len(members) >= self.options.neighborhood:
                        break
                if len(members) == 1:  # all that is near is taken: a neighbour is encoded again
                    members.append(int(draw.choice(self.related.of(seed))))
                yield members

    def _with_hard_negatives(self, notes: np.ndarray, mined: np.ndarray, chance: np.random.Generator) -> np.ndarray:
        candidates = np.setdiff1d(mined[notes].ravel(), notes)
        candidates = candidates[candidates >= 0]
        count = min(self.options.hard_negatives * ((len(notes) + 1) // 2), len(candidates))
        return np.concatenate([notes, chance.choice(candidates, count, replace=False)])


__all__ = ["BatchKind", "BatchOptions", "BatchPlan", "BatchPlanner", "distinct_notes", "drawn_log_probability"]
