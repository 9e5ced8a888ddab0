"""Notes and pairs, the tables that models see, each checked and brought to one form when it is loaded.

notes   note_id, title, topics, content, image (and whatever else the table holds)
pairs   note_id, related_note_id, score, rank

Row numbers in errors count from 1 and leave a CSV header out.

A table comes from strangers, and what it names as images may be published. So an image must lie in the folder of its
table, or in the one that the caller names (`image_root`), symbolic links resolved; this is decided here, for all that
read tables.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value
from datasets.fingerprint import generate_random_fingerprint

from pairs.decoding import OUTSIDE, is_address, shown
from pairs.files import named_faults, read_table, to_arrow, write_file

TEXT_COLUMNS = ("title", "topics", "content")
NOTE_COLUMNS = ("note_id", *TEXT_COLUMNS, "image")
PAIR_COLUMNS = ("note_id", "related_note_id", "score", "rank")

ANYWHERE = os.sep
"""The `image_root` of tables whose images may lie in any folder of this machine."""

IMAGE_ROOT_HELP = (
    "folder that images must lie in; by default that of the table of notes, which could else name any file of this "
    "machine. / for anywhere"
)
"""Of the option of commands."""

_ROWS_AT_ONCE = 10_000


def load_notes(path: str | Path, image_root: str | Path | None = None) -> Dataset:
    """Loads notes.

    The rows of an .arrow file or of a folder written by `Dataset.save_to_disk` stay there: notes that are larger than
    memory are read one by one.

    Args:
        path: what `pairs.files.read_table` takes. Only `note_id` must be there.
        image_root: the folder that images must lie in, or in one inside of it; None: the table's.

    Returns:
        The columns note_id (string, unique), title, topics, content (string, never null; `topics` may also be a list
        of strings), image (string: absolute path, symbolic links resolved, or null; an `Image` feature of datasets
        stays one, not decoded), then all other columns of the table. A relative image path is taken from the table's
        folder.

    Raises:
        FileNotFoundError: no such table.
        ValueError: a missing, empty or duplicate note id, a column of a wrong type, a text that is not UTF-8, an image
            given as a URL or outside of its folder.
    """
    notes = read_notes(path, image_root)
    _refuse_bad_notes(notes, path)
    return notes


def load_written_notes(path: str | Path) -> Dataset:
    """Loads notes that `write_table` wrote, of a folder of splits: as `load_notes`, but images may lie anywhere, and
    texts are not looked through. Both were checked when the notes were first loaded."""
    notes = to_notes(read_table(path, NOTE_COLUMNS), path, is_checked=True)
    _refuse_bad_notes(notes, path)
    return notes


def _refuse_bad_notes(notes: Dataset, path: str | Path) -> None:
    table = to_arrow(notes)
    _refuse_empty(table["note_id"], "note_id", path)
    _refuse_duplicates(table["note_id"].to_pylist(), path)
    images = table["image"]
    if isinstance(notes.features["image"], Image):
        images = _paths_of_structs(images)
    _refuse_addresses(images.to_pylist(), path)


def read_notes(path: str | Path, image_root: str | Path | None = None) -> Dataset:
    """Reads notes into the form that `load_notes` gives them, but lets bad rows stand, for `pairs.scan` to report.

    Args:
        path, image_root: see `load_notes`.

    Returns:
        The columns of `load_notes`. A note id may be empty, also where the table has a null, or occur twice; an image
        may be a URL. A path out of its folder stands as "outside:" and the path, which nothing opens.

    Raises:
        FileNotFoundError: no such table.
        ValueError: no column of note ids, a column of a wrong type, or a text that is not UTF-8.
    """
    return to_notes(read_table(path, NOTE_COLUMNS), path, image_root)


def to_notes(
    dataset: Dataset, path: str | Path, image_root: str | Path | None = None, is_checked: bool = False
) -> Dataset:
    """Brings rows of a table, all or some of them, into the form that `read_notes` gives them.

    Args:
        dataset: the rows.
        path: where the table is: its folder is what relative image paths are taken from.
        image_root: see `load_notes`.
        is_checked: see `load_written_notes`.

    Raises:
        ValueError: no column of note ids, a column of a wrong type, or a text that is not UTF-8.
    """
    table = to_arrow(dataset)
    if not is_checked:
        _refuse_other_encodings(table, path)
    features = dict(dataset.features)
    columns: dict[str, pa.ChunkedArray] = {"note_id": _id_texts(table, "note_id", path)}
    for name in TEXT_COLUMNS:
        columns[name] = _texts(table, name, path)
        features[name] = Value("string") if pa.types.is_string(columns[name].type) else List(Value("string"))
    features["note_id"] = Value("string")
    if isinstance(features.get("image"), Image):
        columns["image"] = _image_structs(table["image"], path, image_root, is_checked)
        features["image"] = Image(decode=False)  # the processor decodes it, and names the note where it cannot
    else:
        columns["image"] = _image_paths(table, path, image_root, is_checked)
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
        ValueError: a damaged file, a missing column, an empty id, score or rank, a score or rank that is no number, or
            a note related to itself.
    """
    ids = ("note_id", "related_note_id")
    if Path(path).suffix == ".parquet" and Path(path).is_file():
        _refuse_damaged_footer(path)
    table = to_arrow(read_table(path, ids))
    _refuse_missing(table, ids, path)
    columns = {name: _ids(table, name, path) for name in ids}
    columns["score"] = _numbers(table, "score", pa.float64(), path)
    # A table without scores may have been written with a column of nulls; a null among scores is damage.
    if columns["score"].null_count < len(table):
        _refuse_rows(pc.is_null(columns["score"]), "score", path, "is empty; fill it in or leave the column out")
    has_ranks = "rank" in table.column_names
    columns["rank"] = _numbers(table, "rank", pa.int32(), path) if has_ranks else _places(columns["note_id"])
    _refuse_rows(pc.is_null(columns["rank"]), "rank", path, "is empty; fill it in or leave the column out")
    _refuse_rows(pc.less(columns["rank"], 1), "rank", path, "is below 1; ranks count from 1")
    itself = pc.equal(columns["note_id"], columns["related_note_id"])
    _refuse_rows(itself, "related_note_id", path, "is the note itself; remove the row")
    return Dataset(pa.table(columns))


def _refuse_damaged_footer(path: str | Path) -> None:
    """Raises ValueError where what a Parquet file says twice differs. The checksums of its pages do not cover its
    footer, of which a changed byte can rename a column or leave out rows."""
    with named_faults(path):
        footer = pq.read_metadata(path)
        written = footer.schema.to_arrow_schema()
    damaged = f"{path}: not a readable .parquet table, its footer is damaged"
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    # Not of columns: for what a damaged footer says of them Parquet ends the process.
    if sum(group.num_rows for group in groups) != footer.num_rows:
        raise ValueError(f"{damaged}: its numbers of rows differ; write it again.")
    said = (written.metadata or {}).get(b"huggingface")  # by `write_table`, and by datasets
    if said is None:
        return
    try:
        names = list(Features.from_dict(json.loads(said)["info"]["features"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # whatever datasets meets there
        raise ValueError(f"{damaged} ({error}); write it again.") from error
    if names != written.names:
        raise ValueError(f"{damaged}: its columns are {written.names} and {names}; write it again.")


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


def _refuse_other_encodings(table: pa.Table, path: str | Path) -> None:
    """Parquet and Arrow files hold any bytes as text, which would fail where a row is read, and also offsets that lead
    out of them."""
    for name in NOTE_COLUMNS:
        if name in table.column_names:
            try:
                table[name].validate(full=True)
            except pa.ArrowInvalid as error:
                raise ValueError(
                    f"{path}: column {name!r} is damaged, or no UTF-8 ({error}); write the table again, as UTF-8."
                ) from error


def _image_paths(table: pa.Table, path: str | Path, image_root: str | Path | None, is_checked: bool) -> pa.ChunkedArray:
    if "image" not in table.column_names:
        return pa.chunked_array([pa.nulls(len(table), pa.string())])
    column = table["image"]
    if not (_is_text(column.type) or pa.types.is_null(column.type)):
        raise ValueError(f"{path}: column 'image' is {column.type}; give paths, or cast it to datasets.Image().")
    resolve = _ImagePlaces(path, image_root, is_checked)
    return pa.chunked_array([pa.array([resolve(value) for value in column.to_pylist()], pa.string())])


def _image_structs(
    column: pa.ChunkedArray, path: str | Path, image_root: str | Path | None, is_checked: bool
) -> pa.ChunkedArray:
    """Images of an `Image` feature; where one has no bytes, its path is used, and is treated as all paths are."""
    named = _paths_of_structs(column)
    if named.null_count == len(named):
        return column
    resolve = _ImagePlaces(path, image_root, is_checked)
    paths = pc.coalesce(
        pa.chunked_array([pa.array([resolve(value) for value in named.to_pylist()], pa.string())]),
        pc.struct_field(column, "path"),
    )
    content = pc.struct_field(column, "bytes").combine_chunks()
    is_null = column.is_null().combine_chunks()
    return pa.chunked_array(
        [pa.StructArray.from_arrays([content, paths.combine_chunks()], names=["bytes", "path"], mask=is_null)]
    )


def _paths_of_structs(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The paths of images that have no bytes; null elsewhere."""
    content, path = (pc.struct_field(column, name) for name in ("bytes", "path"))
    return pc.if_else(content.is_valid(), None, path)


class _ImagePlaces:
    """A path as a table names it ─► the absolute one, links resolved; `OUTSIDE` and the path where that leaves the
    folder of images.

    Args:
        path: where the table is.
        image_root: see `load_notes`.
        is_checked: nothing is resolved, nor refused.
    """

    def __init__(self, path: str | Path, image_root: str | Path | None, is_checked: bool) -> None:
        source = Path(path)
        # Of a data set of the Hub, files lie in the cache; relative paths have no folder.
        self._folder = None
        if source.exists():
            self._folder = str(source.resolve() if source.is_dir() else source.parent.resolve())
        self._root = os.path.realpath(image_root or self._folder or datasets.config.HF_CACHE_HOME)
        self._is_checked = is_checked
        self._folders: dict[str, str] = {}  # as named ─► resolved: images share few, and each link costs a system call

    def __call__(self, value: str | None) -> str | None:
        if not value or is_address(value):
            return value or None
        if self._folder is None and not os.path.isabs(value):
            return OUTSIDE + value
        place = os.path.join(self._folder or "", value)
        if self._is_checked:
            return os.path.normpath(place)
        if "\0" in value:  # no file has such a name
            return OUTSIDE + value
        folder, name = os.path.split(place)
        if name in ("", os.curdir, os.pardir):
            return OUTSIDE + value  # a folder
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        found = os.path.join(self._folders[folder], name)
        if os.path.islink(found):
            found = os.path.realpath(found)
        return found if os.path.commonpath([found, self._root]) == self._root else OUTSIDE + value


def _refuse_addresses(images: Iterable[str | None], path: str | Path) -> None:
    for row, value in enumerate(images, start=1):
        if not value or os.path.isabs(value):
            continue
        if not value.startswith(OUTSIDE):
            raise ValueError(
                f"{path}, row {row}: 'image' {shown(value)} is a URL, and nothing is fetched; download it and give its "
                "path."
            )
        named = shown(value.removeprefix(OUTSIDE))
        if not Path(path).exists():
            raise ValueError(f"{path}, row {row}: 'image' {named} has no folder on the Hub; use an Image feature.")
        raise ValueError(
            f"{path}, row {row}: 'image' {named} is no file inside the table's folder, symbolic links resolved; "
            "move it there, or name the folder that images may lie in: --image-root DIR (image_root)."
        )
