"""Slices of the evaluation: pairs with a short query or target, with popular and unknown notes, and by topic.

A slice keeps some pairs of a query and a related note; the pool, and so every rank, stays what it is.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from pairs.subsets import SHORT_SHARE, text_lengths

POPULARITY = ("head", "torso", "tail", "cold")
MIN_QUERIES = 20
"""A topic with fewer queries is no slice: its mean would say nothing."""


def short_notes(notes: Dataset) -> np.ndarray:
    """(N,) bool: the notes whose text is among the shortest quarter, as in `pairs.subsets`."""
    lengths = text_lengths(notes)
    return lengths <= np.quantile(lengths, SHORT_SHARE) if len(lengths) else np.zeros(0, dtype=bool)


def popularity_of_notes(note_ids: Sequence[str], subsets: Dataset) -> np.ndarray:
    """(N,) strings: "head", "torso", "tail" or "cold" by users in training, "" for a note of no pair.

    Args:
        note_ids: ids of the N notes.
        subsets: as from `pairs.subsets.load_subsets`.
    """
    known: dict[str, str] = {}
    for name, column in (("note_id", "query_popularity"), ("related_note_id", "target_popularity")):
        known |= dict(zip(subsets[name], subsets[column], strict=True))
    return np.array([known.get(note_id, "") for note_id in note_ids])


def topics_of(note: Mapping[str, Any]) -> list[str]:
    """The topics of a note, which may be a list or a text with commas.

    >>> topics_of({"topics": "Drama, War"}), topics_of({"topics": ["home"]}), topics_of({})
    (['Drama', 'War'], ['home'], [])
    """
    topics = note.get("topics")
    parts = topics.split(",") if isinstance(topics, str) else topics if topics is not None else []
    return [text for part in parts if (text := str(part).strip())]


def pair_slices(
    query: np.ndarray,
    target: np.ndarray,
    short: np.ndarray,
    popularity: np.ndarray | None = None,
    topics: Sequence[Sequence[str]] | None = None,
    num_topics: int = 8,
) -> dict[str, np.ndarray]:
    """The slices that hold a pair, by name: (P,) bool masks for `Ranks.select`.

    Args:
        query, target: (P,) int64, positions of the two notes of each pair.
        short: (N,) bool, from `short_notes`.
        popularity: (N,) strings, from `popularity_of_notes`; None: unknown.
        topics: the topics of each note; None: unknown.
        num_topics: slices by topic, those with most queries.

    Returns:
        Of those that hold a pair: "short query", "short target"; "head query", …, "cold target"; "topic Drama", … (the
        query's).
    """
    slices = {"short query": short[query], "short target": short[target]}
    if popularity is not None:
        for name in POPULARITY:
            slices |= {f"{name} query": popularity[query] == name}
        for name in POPULARITY:
            slices |= {f"{name} target": popularity[target] == name}
    if topics is not None:
        counts = Counter(topic for note in np.unique(query).tolist() for topic in set(topics[note]))
        for topic, count in counts.most_common(num_topics):
            if count >= MIN_QUERIES:
                has_topic = np.array([topic in own for own in topics])
                slices[f"topic {topic}"] = has_topic[query]
    return {name: mask for name, mask in slices.items() if mask.any()}


__all__ = ["MIN_QUERIES", "pair_slices", "popularity_of_notes", "short_notes", "topics_of"]
