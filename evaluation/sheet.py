"""The picture sheet of a report: what systems answer to some notes, for a person to look at.

`choose_queries` draws the queries, `picture_sheet` finds the answers, `Pictures` holds the small pictures of a page.
"""

import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evaluation.metrics import Ranks, ScoreFunction, metrics_per_query, tie_order
from modeling_notellm2.processing_notellm2 import has_image, read_image

logger = logging.getLogger(__name__)

Note = Mapping[str, Any]

THUMBNAIL_PIXELS = 160
"""The longer side of a picture in the sheet."""


@dataclass
class Answer:
    """One note of a system's answer.

    Args:
        note: the note found.
        score: its similarity with the query, on the system's own scale.
        is_related: whether it is one of the query's related notes that were asked for.
        is_known: whether it is related to the query, and was not asked for.
    """

    note: Note
    score: float
    is_related: bool
    is_known: bool = False

    @property
    def sign(self) -> str:
        """How it is marked."""
        return "✓" if self.is_related else "(✓)" if self.is_known else "✗"


@dataclass
class SheetQuery:
    """One query of the picture sheet.

    Args:
        note: the query.
        num_related: how many related notes were asked for.
        answers: system name to its first answers, best first.
        related: the first of the related notes, which a perfect system would answer.
        num_known: how many more are related to it, and were not asked for.
    """

    note: Note
    num_related: int
    answers: dict[str, list[Answer]]
    related: list[Note] = field(default_factory=list)
    num_known: int = 0


def choose_queries(ranks: Mapping[str, Ranks], count: int = 20, top_k: int = 6, seed: int = 0) -> list[int]:
    """Draw queries for `picture_sheet`: half where systems differ, a quarter where all do equally well, a quarter where
    none finds anything.

    So they are worth looking at and no fair sample: it is the main table that says how often each happens. Within a
    kind the draw is uniform. Where there are too few of a kind, there are more of the others.

    Args:
        ranks: system name to its `rank_related`, all of the same queries.
        count: how many to draw, fewer if there are fewer.
        top_k: systems differ if their recall among the first so many answers does.
        seed: of the draw.

    Returns:
        Positions of the queries, ascending.

    Raises:
        ValueError: no system, systems of different queries, or `count` is below 1.
    """
    if not ranks or count < 1:
        raise ValueError(f"ranks of {list(ranks)} and count={count}: give at least one system, and at least 1 to draw.")
    first, *others = ranks
    queries = ranks[first].queries
    for name in others:
        if not np.array_equal(ranks[name].queries, queries):
            raise ValueError(f"ranks[{name!r}] is of other queries than ranks[{first!r}]: rank the same related notes.")
    recall = np.stack([metrics_per_query(found, (top_k,))[f"recall@{top_k}"] for found in ranks.values()])  # (S, Q)
    differ = recall.min(axis=0) < recall.max(axis=0)
    missed = recall.max(axis=0) == 0
    generator = np.random.default_rng(seed)
    # Its place among its kind, over the kind's share: the lowest `count` of all are in these proportions.
    turn = np.empty(len(queries))
    for kind, share in ((differ, 0.5), (missed, 0.25), (~differ & ~missed, 0.25)):
        turn[generator.permutation(np.flatnonzero(kind))] = (np.arange(np.count_nonzero(kind)) + 0.5) / share
    return sorted(queries[np.argsort(turn, kind="stable")[:count]].tolist())


def say_drawn(num_systems: int, top_k: int = 6) -> str:
    """How `choose_queries` draws, in a sentence for who looks at the sheet: one system cannot differ from another.

    >>> say_drawn(1).split(" among")[0]
    'Half of these queries were drawn where the system finds a related note, half where it finds none'
    """
    kinds = "where systems differ, a quarter where all do equally well, a quarter where none finds a related note among"
    if num_systems == 1:
        kinds = "where the system finds a related note, half where it finds none among"
    return (
        f"Half of these queries were drawn {kinds} its first {top_k} answers: worth a look, and no fair sample. Where "
        "there are too few of a kind, there are more of the others."
    )


def say_found(answers: Sequence[Answer]) -> str:
    """How many of a system's first answers are right.

    >>> say_found([Answer({}, 1.0, True), Answer({}, 0.5, False), Answer({}, 0.25, False, is_known=True)])
    '1 of its first 3 answers is related, 1 more not asked for'
    """
    right, known = sum(one.is_related for one in answers), sum(one.is_known for one in answers)
    found = f"{right} of its first {len(answers)} answers {'is' if right == 1 else 'are'} related"
    return found + (f", {known} more not asked for" if known else "")


def say_related(query: SheetQuery) -> str:
    """How many related notes a query has.

    >>> say_related(SheetQuery({}, 1, {}, num_known=2))
    '1 related note asked for, of 3'
    """
    noun = "note" if query.num_related == 1 else "notes"
    asked = f" asked for, of {query.num_related + query.num_known}" if query.num_known else ""
    return f"{query.num_related} related {noun}{asked}"


def picture_sheet(
    notes: Sequence[Note],
    related: Sequence[np.ndarray],
    scores: Mapping[str, np.ndarray | ScoreFunction],
    queries: Sequence[int],
    top_k: int = 6,
    candidates: np.ndarray | None = None,
    known: Sequence[np.ndarray] | None = None,
) -> list[SheetQuery]:
    """What each system answers to some queries: the notes of the pool with the highest scores, but for the query.

    Ties are resolved as in `evaluation.metrics`, embeddings compared by their float64 product rounded to float32.

    Args:
        notes: N notes.
        related: for each note the positions of its related notes that are asked for, integers.
        scores: system name to its (N, D) embeddings or its function, as `rank_related` takes them.
        queries: positions of the queries to show, as from `choose_queries`.
        top_k: answers of a system, and related notes, to show.
        candidates: (N,) bool, the notes of the pool. Default: all.
        known: for each note the positions of all its related notes, also of those that a protocol does not ask for, so
            that the sheet does not call an answer wrong which is right. Default: `related`.

    Raises:
        ValueError: `top_k` is below 1; `known` is not of N notes; scores are NaN or of the wrong shape.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    if known is not None and len(known) != len(notes):
        raise ValueError(f"known is of {len(known)} notes, notes are {len(notes)}: give the related notes of each.")
    shown: dict[int, Note] = {}  # each note once, however often it is answered, also where `notes` reads from disk

    def note_at(position: int) -> Note:
        if position not in shown:
            shown[position] = notes[position]
        return shown[position]

    sheet, ties = [], tie_order(len(notes))
    for query in map(int, queries):
        wanted = {int(position): None for position in related[query]}  # in the order of `related`
        more = set() if known is None else set(map(int, known[query])) - wanted.keys() - {query}
        in_pool = np.ones(len(notes), dtype=bool) if candidates is None else candidates.copy()
        in_pool[query] = False
        answers = {}
        for name, score in scores.items():
            row = score_row(name, score, query, len(notes))
            order = np.lexsort((ties, -row))
            answers[name] = [
                Answer(note_at(position), float(row[position]), position in wanted, position in more)
                for position in order[in_pool[order]][:top_k].tolist()
            ]
        first = [note_at(position) for position in list(wanted)[:top_k]]
        sheet.append(SheetQuery(note_at(query), len(wanted), answers, first, len(more)))
    return sheet


class Pictures:
    """The pictures of a page's notes as small JPEGs, equal ones once.

    Attributes:
        files: the different pictures, each with its place.
    """

    def __init__(self) -> None:
        self.files: dict[bytes, int] = {}
        self._places: dict[int, int | None] = {}  # by the note's identity: a note is decoded once

    def add(self, note: Note) -> None:
        """Take a note's picture in; the note must outlive this object."""
        if id(note) not in self._places:
            file = thumbnail(note)
            self._places[id(note)] = None if file is None else self.files.setdefault(file, len(self.files))

    def place(self, note: Note) -> int | None:
        """Which of `files` shows a note that was added; None if none does."""
        return self._places[id(note)]


def field_text(note: Note, name: str, length: int = 10_000) -> str:
    """A field of a note on one line, cut to so many characters; topics with commas between them.

    >>> field_text({"topics": ["home", "oak"]}, "topics"), field_text({"title": "Vase,  blue"}, "title", 6)
    ('home, oak', 'Vase,…')
    """
    value = note.get(name)
    if isinstance(value, Iterable) and not isinstance(value, str):
        value = ", ".join(map(str, value))
    text = " ".join(str(value if value is not None else "").split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def note_label(note: Note) -> str:
    """What a note is called: its title, or else what it has."""
    fields = (field_text(note, name, 60) for name in ("title", "content", "topics", "note_id"))
    return next(filter(None, fields), "a note without text")


def score_row(name: str, score: np.ndarray | ScoreFunction, query: int, num_notes: int) -> np.ndarray:
    """(N,) float scores of one query, those of embeddings compared as in `evaluation.metrics`.

    Raises:
        ValueError: scores are NaN or not N; the message has the system's name.
    """
    if isinstance(score, np.ndarray):
        own = score[query].astype(np.float32).astype(np.float64)
        blocks = (score[start : start + 65536].astype(np.float32) for start in range(0, len(score), 65536))
        row = np.concatenate([(block * own).sum(axis=1) for block in blocks]).astype(np.float32)
    else:
        row = score(np.array([query]))[0]
    if row.shape != (num_notes,):
        raise ValueError(
            f"scores[{name!r}] gives scores of shape {row.shape} for note {query}, expected ({num_notes},): give a "
            "score for every note."
        )
    if np.isnan(row).any():
        raise ValueError(f"scores[{name!r}] of note {query} contain NaN: check its embedding before the report.")
    return row


def thumbnail(note: Note) -> bytes | None:
    """A note's picture as a small JPEG file; None if it has none, or none that can be read."""
    if not has_image(note):
        return None
    try:
        picture = read_image(note["image"])
        picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=70, optimize=True)
    except Exception as error:  # a broken file can fail in every way, and must not cost a whole evaluation's report
        logger.warning("The picture of note %s cannot be shown: %s", note.get("note_id"), error)
        return None
    return file.getvalue()
