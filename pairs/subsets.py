"""Subsets of pairs for evaluation: short queries and targets, as in the paper, and popular and unknown notes.

The paper reports pairs with a short query and with a short target (NoteLLM-2, experiments) and does not say what is
short. Here it is a text among the shortest quarter of the split's notes.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from pairs.files import read_table, to_arrow
from pairs.tables import TEXT_COLUMNS

Popularity = Literal["head", "torso", "tail", "cold"]

SHORT_SHARE = 0.25
# Head: the notes with most users, which together have half of the users of all notes; torso: up to four fifths.
HEAD_SHARE = 0.5
TORSO_SHARE = 0.8


def text_lengths(notes: Dataset) -> np.ndarray:
    """Characters of title, topics and content of each note: (N,) int64."""
    total = np.zeros(len(notes), np.int64)
    table = to_arrow(notes.select_columns([name for name in TEXT_COLUMNS if name in notes.column_names]))
    for name in table.column_names:
        column = table[name]
        if pa.types.is_list(column.type):
            column = pc.binary_join(column.cast(pa.list_(pa.string())), ", ")
        total += pc.fill_null(pc.utf8_length(column), 0).to_numpy()
    return total


def popularity_classes(users: np.ndarray) -> np.ndarray:
    """What each note is by the number of its users.

    Args:
        users: (N,) int64, distinct users who viewed the note in training.

    Returns:
        (N,) strings: "cold" where there is no user; else "head" for the notes with most users that together have
        `HEAD_SHARE` of all, "torso" for the next ones up to `TORSO_SHARE`, "tail" for the rest. Notes with equally many
        users are in the same class, the more popular one.
    """
    counts, place, notes = np.unique(users, return_inverse=True, return_counts=True)
    views = counts * notes
    # For each count, the share of the users of all notes that have more: a class begins before its share is reached.
    before = (views[::-1].cumsum()[::-1] - views) / max(int(views.sum()), 1)
    names = np.select([counts == 0, before < HEAD_SHARE, before < TORSO_SHARE], ["cold", "head", "torso"], "tail")
    return names[place]


def pair_subsets(pairs: Dataset, notes: Dataset, users: pa.Table) -> Dataset:
    """Which subsets each pair is in.

    Args:
        pairs: note_id (the query) and related_note_id (the target), notes of `notes`.
        notes: the notes of the split.
        users: note_id, users: how many users viewed each note in training; notes that are not there have none.

    Returns:
        For each row of `pairs`: note_id, related_note_id (string), short_query, short_target (bool), query_popularity,
        target_popularity (string: head, torso, tail or cold).
    """
    ids = to_arrow(notes.select_columns("note_id"))["note_id"]
    lengths = text_lengths(notes)
    short = lengths <= np.quantile(lengths, SHORT_SHARE) if len(lengths) else np.zeros(0, bool)
    # Classes are those of all notes, not of the split's alone: head means the same in every split.
    classes = popularity_classes(users["users"].to_numpy())
    place = pc.index_in(ids, value_set=users["note_id"].combine_chunks())
    popularity = np.append(classes, "cold")[pc.fill_null(place, len(classes)).to_numpy()]
    columns: dict[str, pa.Array] = {}
    for name, role in (("note_id", "query"), ("related_note_id", "target")):
        column = to_arrow(pairs)[name]
        rows = pc.index_in(column, value_set=ids.combine_chunks()).to_numpy()
        columns |= {
            name: column,
            f"short_{role}": pa.array(short[rows]),
            f"{role}_popularity": pa.array(popularity[rows]),
        }
    order = ["note_id", "related_note_id", "short_query", "short_target", "query_popularity", "target_popularity"]
    return Dataset(pa.table({name: columns[name] for name in order}))


def load_subsets(directory: str | Path, name: str) -> Dataset:
    """The subsets of the pairs of a split that `pairs.split.make_splits` wrote; see `pair_subsets`.

    Args:
        directory: the `output_dir` of `make_splits`.
        name: "validation" or "test".

    Raises:
        FileNotFoundError: no such split in `directory`, or it is the one for training.
    """
    return read_table(Path(directory) / name / "subsets.parquet", ("note_id", "related_note_id"))
