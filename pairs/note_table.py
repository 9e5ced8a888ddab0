"""A table of notes that may be larger than memory: some rows at a time, in the form of `pairs.tables.load_notes`.

Parquet files are read a thousand rows at a time, .arrow files and folders of `datasets` are mapped. CSV and JSON lines
files are read whole.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint

from pairs.files import named_faults, read_table, refuse_repeated_columns, to_arrow
from pairs.tables import NOTE_COLUMNS, to_notes

ROWS_AT_ONCE = 1000
"""Rows of a table that are in memory at a time."""


class NoteTable:
    """Notes of which some rows are in memory at a time.

    Args:
        path: what `pairs.files.read_table` takes.
        image_root: the folder that images must lie in; None: the table's. See `pairs.tables.read_notes`.

    Raises:
        FileNotFoundError: no such table.
        ValueError: it cannot be read; no column of note ids, or none of what a note holds.
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None) -> None:
        self.path = path
        self.image_root = image_root
        self._parquet: Any = None  # one of the two
        self._dataset: Any = None
        if Path(path).is_file() and Path(path).suffix == ".parquet":
            with named_faults(path):
                self._parquet = pq.ParquetFile(path, memory_map=True)
            refuse_repeated_columns(self._parquet.schema_arrow.names, path)
        else:
            self._dataset = read_table(path, NOTE_COLUMNS)
        self._refuse_other_columns()

    def __len__(self) -> int:
        rows = self._dataset.num_rows if self._dataset is not None else self._parquet.metadata.num_rows
        return int(rows)

    def rows(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The notes at positions [start, stop), as mappings.

        Raises:
            ValueError: a column of a wrong type.
        """
        for table in self._tables(start, stop, NOTE_COLUMNS):
            yield from table.to_pylist()

    def check_ids(self) -> None:
        """Raises ValueError for the first note id that is empty or there twice."""
        ids = (note_id for table in self._tables(0, len(self), NOTE_COLUMNS[:1]) for note_id in table[0].to_pylist())
        hashes = np.empty(len(self), dtype=np.int64)  # the ids themselves may take more memory than anything else here
        for row, note_id in enumerate(ids):
            if not note_id:
                raise ValueError(f"{self.path}, row {row + 1}: 'note_id' is empty; fill it in or remove the row.")
            hashes[row] = hash(note_id)
        values, counts = np.unique(hashes, return_counts=True)
        self._refuse_repeated(set(values[counts > 1].tolist()))

    def fingerprint(self) -> str:
        """A name for the table's content: a hash of its file, or the one that `datasets` has for a folder or Hub id.
        Pictures that the table names by their paths are not part of it."""
        if self._dataset is not None and not Path(self.path).is_file():
            return str(self._dataset._fingerprint)
        with Path(self.path).open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

    def _refuse_other_columns(self) -> None:
        names = self._parquet.schema_arrow.names if self._dataset is None else self._dataset.column_names
        needed, *held = NOTE_COLUMNS
        if needed not in names:
            raise ValueError(f"{self.path}: no column {needed!r}, only {names}; add or rename it.")
        if not set(held) & set(names):
            raise ValueError(f"{self.path}: no column of {held}, only {names}; give a table of notes, or rename them.")

    def _refuse_repeated(self, suspects: set[int]) -> None:
        """Two ids may have one hash: those that share one are compared themselves."""
        first_rows: dict[str, int] = {}
        if not suspects:
            return
        for row, note in enumerate(self.rows(0, len(self)), start=1):
            note_id = note["note_id"]
            if hash(note_id) in suspects and first_rows.setdefault(note_id, row) != row:
                raise ValueError(
                    f"{self.path}, rows {first_rows[note_id]} and {row}: 'note_id' {note_id!r} twice; keep one."
                )

    def _tables(self, start: int, stop: int, names: Iterable[str]) -> Iterator[pa.Table]:
        """The rows [start, stop) as tables of at most `ROWS_AT_ONCE` rows."""
        if self._parquet is not None:
            with named_faults(self.path):
                for table in _parquet_rows(self._parquet, start, stop, names):
                    # Without a fingerprint given, datasets would hash all rows.
                    dataset = Dataset(table, fingerprint=generate_random_fingerprint())
                    yield to_arrow(to_notes(dataset, self.path, self.image_root))
            return
        dataset = self._dataset.select_columns([name for name in self._dataset.column_names if name in set(names)])
        for first in range(start, stop, ROWS_AT_ONCE):
            rows = dataset.select(range(first, min(first + ROWS_AT_ONCE, stop)))
            yield to_arrow(to_notes(rows, self.path, self.image_root))


def _parquet_rows(file: pq.ParquetFile, start: int, stop: int, names: Iterable[str]) -> Iterator[pa.Table]:
    """The rows [start, stop) of a Parquet file, which row groups outside are not read for."""
    columns = [name for name in names if name in file.schema_arrow.names]
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    ends = np.cumsum(sizes).tolist()
    groups = [group for group, end in enumerate(ends) if end > start and end - sizes[group] < stop]
    if not groups:
        return
    first = ends[groups[0]] - sizes[groups[0]]
    for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=columns, use_threads=False):
        low, high = max(start - first, 0), min(stop - first, len(batch))
        first += len(batch)
        if low < high:
            yield pa.Table.from_batches([batch.slice(low, high - low)])
        if first >= stop:
            return


__all__ = ["NoteTable"]
