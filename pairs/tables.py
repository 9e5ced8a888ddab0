"""Notes and pairs, the tables that models see, each checked and brought to one form when it is loaded.

notes   note_id, title, topics, content, image (and whatever else the table holds)
pairs   note_id, related_note_id, score, rank

Row numbers in errors count from 1 and leave a CSV header out.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, List, Value
from datasets.fingerprint import generate_random_fingerprint

from pairs.files import read_table, to_arrow, write_file

TEXT_COLUMNS = ("title", "topics", "content")
NOTE_COLUMNS = ("note_id", *TEXT_COLUMNS, "image")
PAIR_COLUMNS = ("note_id", "related_note_id", "score", "rank")

_ROWS_AT_ONCE = 10_000


def load_notes(path: str | Path) -> Dataset:
    """Loads notes.

    The rows of an .arrow file or of a folder written by `Dataset.save_to_disk` stay there: notes that are larger than
    memory are read one by one.

    Args:
        path: what `pairs.files.read_table` takes. Only `note_id` must be there.

    Returns:
        The columns note_id (string, unique), title, topics, content (string, never null; `topics` may also be a list
        of strings), image (string: absolute path, or null; an `Image` feature of datasets stays one, not decoded),
        then all other columns of the table. A relative image path is taken from the table's folder.

    Raises:
        FileNotFoundError: no such table.
        ValueError: a missing, empty or duplicate note id, a column of a wrong type, an image given as a URL.
    """
    notes = read_notes(path)
    table = to_arrow(notes)
    _refuse_empty(table["note_id"], "note_id", path)
    _refuse_duplicates(table["note_id"].to_pylist(), path)
    if not isinstance(notes.features["image"], Image):
        _refuse_unusable_paths(table["image"].to_pylist(), path)
    return notes


def read_notes(path: str | Path) -> Dataset:
    """Reads notes into the form that `load_notes` gives them, but lets bad rows stand, for `pairs.scan` to report.

    Args:
        path: see `load_notes`.

    Returns:
        The columns of `load_notes`. A note id may be empty, also where the table has a null, or occur twice; an image
        may be a URL or, in a table of the Hub, a relative path.

    Raises:
        FileNotFoundError: no such table.
        ValueError: no column of note ids, or a column of a wrong type.
    """
    return to_notes(read_table(path, NOTE_COLUMNS), path)


def to_notes(dataset: Dataset, path: str | Path) -> Dataset:
    """Brings rows of a table, all or some of them, into the form that `read_notes` gives them.

    Args:
        dataset: the rows.
        path: where the table is: its folder is what relative image paths are taken from.

    Raises:
        ValueError: no column of note ids, or a column of a wrong type.
    """
    table = to_arrow(dataset)
    features = dict(dataset.features)
    columns: dict[str, pa.ChunkedArray] = {"note_id": _id_texts(table, "note_id", path)}
    for name in TEXT_COLUMNS:
        columns[name] = _texts(table, name, path)
        features[name] = Value("string") if pa.types.is_string(columns[name].type) else List(Value("string"))
    features["note_id"] = Value("string")
    if isinstance(features.get("image"), Image):
        columns["image"] = table["image"]
        features["image"] = Image(decode=False)  # the processor decodes it, and names the note where it cannot
    else:
        columns["image"] = _image_paths(table, path)
        features["image"] = Value("string")
    columns |= {name: table[name] for name in table.column_names if name not in columns}
    ordered = Features({name: features[name] for name in columns})
    # The features travel as metadata of the schema, which is also how datasets itself writes them to a file. Without a
    # fingerprint given, datasets would copy all rows into memory to hash them.
    return Dataset(
        pa.table(columns).replace_schema_metadata(ordered.arrow_schema.metadata),
        fingerprint=generate_random_fingerprint(),
    )


def load_pairs(path: str | Path) -> Dataset:
    """Loads related pairs.

    Args:
        path: what `pairs.files.read_table` takes. Only `note_id` and `related_note_id` must be there.

    Returns:
        note_id (string), related_note_id (string), score (float64; null where the table has none), rank (int32, 1 =
        most related; without that column, where the row stands among the rows of its note).

    Raises:
        FileNotFoundError: no such table.
        ValueError: a missing column, an empty id or rank, a score or rank that is no number, or a note related to
            itself.
    """
    ids = ("note_id", "related_note_id")
    table = to_arrow(read_table(path, ids))
    _refuse_missing(table, ids, path)
    columns = {name: _ids(table, name, path) for name in ids}
    columns["score"] = _numbers(table, "score", pa.float64(), path)
    has_ranks = "rank" in table.column_names
    columns["rank"] = _numbers(table, "rank", pa.int32(), path) if has_ranks else _places(columns["note_id"])
    _refuse_rows(pc.is_null(columns["rank"]), "rank", path, "is empty; fill it in or leave the column out")
    _refuse_rows(pc.less(columns["rank"], 1), "rank", path, "is below 1; ranks count from 1")
    itself = pc.equal(columns["note_id"], columns["related_note_id"])
    _refuse_rows(itself, "related_note_id", path, "is the note itself; remove the row")
    return Dataset(pa.table(columns))


def write_table(dataset: Dataset, path: str | Path) -> None:
    """Writes a table as .parquet, .csv, .jsonl or .arrow, by the ending of `path`, replacing an old file in one step.

    Rows of a memory-mapped table are read as they are written. Absolute paths in an `image` column are written relative
    to the table's folder: table and images can then move together.

    Raises:
        ValueError: another ending, or a column that this kind of file cannot hold (a list in CSV, bytes in JSON lines).
    """
    image = dataset.features.get("image")
    has_paths = isinstance(image, Value) and image.dtype == "string"
    folder = Path(path).parent.resolve()

    def batches() -> Iterator[pa.Table]:
        for table in dataset.with_format("arrow").iter(_ROWS_AT_ONCE):
            if has_paths:
                relative = [
                    os.path.relpath(value, folder) if value and os.path.isabs(value) else value
                    for value in table["image"].to_pylist()
                ]
                position = table.column_names.index("image")
                table = table.set_column(position, table.schema.field(position), pa.array(relative, pa.string()))
            yield table.cast(schema)

    schema = dataset.features.arrow_schema
    write_file(batches(), schema, path)


def related_indices(
    note_ids: Sequence[str], pairs: Dataset, *, missing: Literal["error", "drop"] = "error"
) -> list[np.ndarray]:
    """The related notes of each note as positions in `note_ids`.

    Args:
        note_ids: N unique ids.
        pairs: a table as from `load_pairs`.
        missing: what to do with a pair one of whose notes is not in `note_ids`.

    Returns:
        N arrays (int64), each in rank order, empty for a note without related notes.

    Raises:
        ValueError: a duplicate in `note_ids`, or an unknown note in `pairs` while `missing` is "error".
    """
    positions, rank = pair_positions(note_ids, pairs, missing=missing)
    order = np.lexsort((rank, positions[:, 0]))
    ends = np.cumsum(np.bincount(positions[:, 0], minlength=len(note_ids)))
    return np.split(positions[order, 1], ends[:-1]) if len(note_ids) else []


def pair_positions(
    note_ids: Sequence[str], pairs: Dataset, *, missing: Literal["error", "drop"] = "error"
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of a table as positions in `note_ids`, in the order of the table.

    Args:
        note_ids, pairs, missing: as in `related_indices`.

    Returns:
        (P, 2) int64 positions of the note and its related note, and (P,) int64 ranks.

    Raises:
        ValueError: as `related_indices`.
    """
    if missing not in ("error", "drop"):
        raise ValueError(f"missing={missing!r}: use 'error' or 'drop'.")
    _refuse_duplicates(note_ids, "note_ids")
    table = to_arrow(pairs)
    known = pa.array(note_ids, pa.string())
    anchors = pc.index_in(table["note_id"], value_set=known)
    related = pc.index_in(table["related_note_id"], value_set=known)
    found = pc.and_(pc.is_valid(anchors), pc.is_valid(related))
    if missing == "error" and not pc.all(found, min_count=0).as_py():
        row = table.filter(pc.invert(found)).slice(0, 1).to_pylist()[0]
        raise ValueError(
            f"pairs: ({row['note_id']!r}, {row['related_note_id']!r}) has a note outside the {len(note_ids)} notes"
            " given; give the notes that these pairs were built on, or leave such pairs out of the table."
        )
    anchor, other, rank = (
        column.filter(found).to_numpy().astype(np.int64) for column in (anchors, related, table["rank"])
    )
    return np.stack([anchor, other], axis=1), rank


def is_url(reference: str) -> bool:
    """Whether an image's reference is a URL ("https://…", "s3://…") and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", reference) is not None


def _refuse_missing(table: pa.Table, names: Iterable[str], path: str | Path) -> None:
    missing = " and no column ".join(repr(name) for name in names if name not in table.column_names)
    if missing:
        raise ValueError(f"{path}: no column {missing}, only {table.column_names}; add or rename it.")


def _numbers(table: pa.Table, name: str, kind: pa.DataType, path: str | Path) -> pa.ChunkedArray:
    """A column as numbers, null where there is none."""
    if name not in table.column_names:
        return pa.chunked_array([pa.nulls(len(table), kind)])
    try:
        return table[name].cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{path}: column {name!r} is not {kind} ({error}); make it numbers or leave it out."
        ) from error


def _places(note_ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Where each row stands among the rows of its note, from 1, as int32."""
    notes = pc.index_in(note_ids, value_set=pc.unique(note_ids)).to_numpy()
    order = np.argsort(notes, kind="stable")
    sizes = np.bincount(notes)
    places = np.empty(len(notes), np.int32)
    places[order] = np.arange(len(notes)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + 1
    return pa.chunked_array([places])


def _refuse_rows(bad: pa.ChunkedArray, name: str, path: str | Path, complaint: str) -> None:
    row = pc.index(bad, True).as_py()
    if row >= 0:
        raise ValueError(f"{path}, row {row + 1}: {name!r} {complaint}.")


def _ids(table: pa.Table, name: str, path: str | Path) -> pa.ChunkedArray:
    column = _id_texts(table, name, path)
    _refuse_empty(column, name, path)
    return column


def _id_texts(table: pa.Table, name: str, path: str | Path) -> pa.ChunkedArray:
    """A column of ids as text, "" where there is none."""
    _refuse_missing(table, [name], path)
    column = table[name]
    if not (_is_text(column.type) or pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise ValueError(f"{path}: column {name!r} is {column.type}; ids are strings or integers.")
    return pc.fill_null(column.cast(pa.string()), "")


def _refuse_empty(ids: pa.ChunkedArray, name: str, path: str | Path) -> None:
    _refuse_rows(pc.equal(ids, ""), name, path, "is empty; fill it in or remove the row")


def _refuse_duplicates(note_ids: Sequence[str], where: str | Path) -> None:
    first_rows: dict[str, int] = {}
    for row, note_id in enumerate(note_ids, start=1):
        if first_rows.setdefault(note_id, row) != row:
            raise ValueError(f"{where}, rows {first_rows[note_id]} and {row}: 'note_id' {note_id!r} twice; keep one.")


def _texts(table: pa.Table, name: str, path: str | Path) -> pa.ChunkedArray:
    if name not in table.column_names:
        return pa.chunked_array([[""] * len(table)], pa.string())
    column = table[name]
    if name == "topics" and pa.types.is_list(column.type):
        if not (_is_text(column.type.value_type) or pa.types.is_null(column.type.value_type)):
            raise ValueError(f"{path}: column 'topics' is {column.type}; make it lists of strings, or text.")
        return pc.fill_null(column.cast(pa.list_(pa.string())), [])
    if not (_is_text(column.type) or pa.types.is_primitive(column.type) or pa.types.is_null(column.type)):
        raise ValueError(f"{path}: column {name!r} is {column.type}; make it text.")
    return pc.fill_null(column.cast(pa.string()), "")


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _image_paths(table: pa.Table, path: str | Path) -> pa.ChunkedArray:
    if "image" not in table.column_names:
        return pa.chunked_array([pa.nulls(len(table), pa.string())])
    column = table["image"]
    if not (_is_text(column.type) or pa.types.is_null(column.type)):
        raise ValueError(f"{path}: column 'image' is {column.type}; give paths, or cast it to datasets.Image().")
    source = Path(path)
    folder = source.resolve() if source.is_dir() else source.parent.resolve()
    resolved: list[str | None] = []
    for value in column.to_pylist():
        if not value:
            resolved.append(None)
        elif os.path.isabs(value) or is_url(value) or not source.exists():
            resolved.append(value)
        else:
            resolved.append(os.path.normpath(folder / value))
    return pa.chunked_array([pa.array(resolved, pa.string())])


def _refuse_unusable_paths(images: Iterable[str | None], path: str | Path) -> None:
    for row, value in enumerate(images, start=1):
        if value is None or os.path.isabs(value):
            continue
        if is_url(value):
            raise ValueError(f"{path}, row {row}: 'image' {value!r} is a URL; download it and give its path.")
        raise ValueError(f"{path}, row {row}: 'image' {value!r} has no folder on the Hub; use an Image feature.")
