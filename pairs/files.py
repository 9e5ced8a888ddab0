"""Table files: CSV, JSON lines, Parquet and Arrow in, the same out.

Every table is a `datasets.Dataset`, that is, an Arrow table. Ids are text: "007" in a CSV file must not become 7, so a
caller names the columns to be read as text and only the others have their types inferred. A file is written beside its
final place and then renamed, so that a reader never sees half of it; pages of Parquet files carry checksums, which
reading compares.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.fingerprint import generate_random_fingerprint

from pairs.disk import new_file


def to_arrow(dataset: Dataset) -> pa.Table:
    """The Arrow table behind `dataset`: its rows in order, images left encoded."""
    return dataset.with_format("arrow")[:]


def read_table(path: str | Path, text_columns: Collection[str]) -> Dataset:
    """Reads one table.

    Args:
        path: a .csv, .jsonl, .parquet or .arrow file (an Arrow stream, whose rows stay on disk until they are asked
            for, so that it may be larger than memory); a folder written by `Dataset.save_to_disk`; or any other folder
            or Hub id that `datasets.load_dataset` takes and that holds one split.
        text_columns: columns of a CSV or JSON lines file to read as text instead of inferring their type.

    Raises:
        FileNotFoundError: nothing is at `path`, here or on the Hub.
        ValueError: the file cannot be parsed, its kind is unknown, or the folder or Hub id holds several splits.
    """
    source = Path(path)
    if source.is_file():
        if source.suffix not in _READERS:
            raise ValueError(f"{path}: unknown kind of table {source.suffix!r}; use one of {', '.join(_READERS)}.")
        with named_faults(path):
            table = _READERS[source.suffix](source, text_columns)
            refuse_repeated_columns(table.column_names, path)
            # Without a fingerprint given, datasets would copy all rows into memory to hash them.
            return Dataset(table, fingerprint=generate_random_fingerprint())
    if source.is_dir() and any((source / name).is_file() for name in ("state.json", "dataset_dict.json")):
        loaded = load_from_disk(str(source))
    elif source.is_dir() or _may_be_hub_id(path):
        try:
            loaded = load_dataset(str(path))
        except OSError as error:  # also DatasetNotFoundError, and the ConnectionError of a machine without network
            raise FileNotFoundError(
                f"{path}: neither a table on this machine nor a data set that the Hub gives ({error})."
            ) from error
    else:
        raise FileNotFoundError(f"{path}: no such file or folder; give a .csv, .jsonl, .parquet or .arrow file.")
    if isinstance(loaded, DatasetDict):
        if len(loaded) != 1:
            raise ValueError(f"{path}: holds the splits {sorted(loaded)}; save the one you need as a Parquet file.")
        loaded = next(iter(loaded.values()))
    return loaded


@contextmanager
def named_faults(path: str | Path) -> Iterator[None]:
    """Turns what Arrow and Python raise on a table's damaged file into a ValueError that names it. Trouble of the
    machine, which has a number, stays an OSError."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        kind = Path(path).suffix
        raise ValueError(f"{path}: not a readable {kind} table ({error}); repair or convert it, as UTF-8.") from error


def refuse_repeated_columns(names: Sequence[str], path: str | Path) -> None:
    """Raises ValueError for two columns of one name."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path}: {names.count(name)} columns {name!r}; keep one.")


def write_file(batches: Iterator[pa.Table], schema: pa.Schema, path: str | Path) -> None:
    """Writes a table as .parquet, .csv, .jsonl or .arrow, by the ending of `path`; folders are made, an old file is
    replaced.

    Args:
        batches: its rows, one or several tables of `schema`, of which one is in memory at a time.
        schema: its columns.
        path: where to.

    Raises:
        ValueError: the ending is another one, or a column cannot be said in this kind of file (lists in CSV, bytes in
            JSON lines).
        DiskError: the disk is full, or cannot be written for another cause.
    """
    refuse_unwritable(path)
    with new_file(path) as unfinished:
        _WRITERS[Path(path).suffix](batches, schema, unfinished)


def refuse_unwritable(path: str | Path) -> None:
    """Raises ValueError where `write_file` could not write to `path`: for a URL, and for an unknown ending."""
    if "://" in str(path):
        raise ValueError(f"{path}: a single file is written to this machine; give a path, or a URL without an ending.")
    if Path(path).suffix not in _WRITERS:
        raise ValueError(f"{path}: unknown kind of table {Path(path).suffix!r}; use one of {', '.join(_WRITERS)}.")


def _may_be_hub_id(path: str | Path) -> bool:
    """Whether `path` is spelled as "name" or "owner/name", and not as a file or an absolute or dotted path."""
    text = str(path)
    return not text.startswith((".", "/", "~")) and text.count("/") <= 1 and Path(text).suffix not in _READERS


_CSV_BLOCK = 2**26  # bytes: a row must fit in; Arrow's own megabyte would let one long text refuse a whole table
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def _read_csv(path: Path, text_columns: Collection[str]) -> pa.Table:
    return pa_csv.read_csv(
        path,
        read_options=pa_csv.ReadOptions(block_size=_CSV_BLOCK),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(column_types={name: pa.string() for name in text_columns}),
    )


def _read_jsonl(path: Path, text_columns: Collection[str]) -> pa.Table:
    # Line by line: Arrow's own reader turns texts that look like dates into timestamps.
    rows: list[dict[str, Any]] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if _SURROGATE.search(line):
                    row = _without_surrogates(row)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error}); convert the file.") from error
            except (ValueError, RecursionError) as error:  # also of numbers of thousands of digits
                raise ValueError(f"{path}, line {number}: not JSON ({error}); write one object a line.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: {type(row).__name__} found; write one object a line.")
            rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns: dict[str, pa.Array] = {}
    for name in names:
        values = [row.get(name) for row in rows]
        if name in text_columns:
            values = [str(value) if isinstance(value, int | float) else value for value in values]
        try:
            columns[name] = pa.array(values)
        except OverflowError as error:
            raise ValueError(
                f"{path}: column {name!r} holds a number beyond 64 bits ({error}); write it as text."
            ) from error
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"{path}: column {name!r} mixes types ({error}); use one type for it.") from error
    return pa.table(columns)


def _without_surrogates(value: Any) -> Any:
    """Half of a pair of surrogates, as of an emoji that was cut, is "?", as the processor reads it: no note is lost."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value


def _read_parquet(path: Path, text_columns: Collection[str]) -> pa.Table:
    return pq.read_table(path, memory_map=True, page_checksum_verification=True)  # it states its types


def _read_arrow(path: Path, text_columns: Collection[str]) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()  # of the file, not of memory


def _write_csv(batches: Iterator[pa.Table], schema: pa.Schema, path: Path) -> None:
    for field in schema:
        if pa.types.is_nested(field.type) or pa.types.is_binary(field.type):
            raise ValueError(f"column {field.name!r} ({field.type}) cannot be written as CSV; use .jsonl or .parquet.")
    with pa_csv.CSVWriter(path, schema) as writer:
        for table in batches:
            writer.write_table(table)


def _write_jsonl(batches: Iterator[pa.Table], schema: pa.Schema, path: Path) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for table in batches:
            for batch in table.to_batches(max_chunksize=1000):
                for row in batch.to_pylist():
                    try:
                        lines.write(json.dumps(row, ensure_ascii=False) + "\n")
                    except TypeError as error:
                        raise ValueError(f"a row cannot be written as JSON ({error}); use .parquet.") from error


def _write_parquet(batches: Iterator[pa.Table], schema: pa.Schema, path: Path) -> None:
    with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        for table in batches:
            writer.write_table(table)


def _write_arrow(batches: Iterator[pa.Table], schema: pa.Schema, path: Path) -> None:
    with pa.ipc.new_stream(str(path), schema) as writer:
        for table in batches:
            writer.write_table(table)


_READERS: dict[str, Callable[[Path, Collection[str]], pa.Table]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
_WRITERS: dict[str, Callable[[Iterator[pa.Table], pa.Schema, Path], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
    ".arrow": _write_arrow,
}
