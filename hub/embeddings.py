"""A folder of embeddings, which `hub.encode` writes and `hub.neighbors` and `hub.app` read.

    manifest.json                    what is encoded by what
    embeddings/shard-000000.parquet  note_id (string), embedding (fixed-size list of D float32)
    failures/shard-000000.parquet    note_id, row (from 1), error: the notes that have no embedding
    text-only/shard-000000.parquet   the same of notes whose embedding is of their text alone; only where there are any

A shard is made of consecutive notes. Sorted by name, the files have the notes in the order of their table.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pairs.disk import new_file
from pairs.files import write_file

logger = logging.getLogger(__name__)

FORMAT = 2
"""Raised when this package lays out or computes embeddings in another way."""

FAILURES_SCHEMA = pa.schema({"note_id": pa.string(), "row": pa.int64(), "error": pa.string()})


def embeddings_schema(dim: int) -> pa.Schema:
    """The columns of a file of embeddings of width `dim`."""
    return pa.schema({"note_id": pa.string(), "embedding": pa.list_(pa.float32(), dim)})


@dataclass(frozen=True)
class Manifest:
    """What a folder of embeddings holds.

    Attributes:
        model, notes: where they were; may move.
        model_fingerprint, notes_fingerprint: of all that decides on an embedding, and of the table.
        num_notes: rows of the table.
        shard_size: notes of a shard, of which the last one may have fewer.
        dim: D, the width of the embeddings.
        dtype: of the model's weights; embeddings are float32.
        format: of the folder.
    """

    model: str
    model_fingerprint: str
    notes: str
    notes_fingerprint: str
    num_notes: int
    shard_size: int
    dim: int
    dtype: str
    format: int = FORMAT

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """The manifest of a folder.

        Raises:
            FileNotFoundError: the folder has none.
            ValueError: it is of another format, or damaged.
        """
        path = Path(folder) / "manifest.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no manifest.json: give a folder that hub.encode wrote.")
        try:
            manifest = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged or of another release ({error}): encode into a new folder.") from error
        if manifest.format != FORMAT:
            raise ValueError(
                f"{path} has format={manifest.format}, and this release {FORMAT}: encode into a new folder."
            )
        return manifest

    def write(self, folder: Path) -> None:
        """Writes it in one step. Raises DiskError where the disk is full."""
        with new_file(folder / "manifest.json") as unfinished:
            unfinished.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def refuse_other(self, found: "Manifest", folder: Path) -> None:
        """Raises ValueError where embeddings of `found`, which `folder` holds, do not go with those of `self`."""
        for name in (field.name for field in fields(self) if field.name not in ("model", "notes")):
            if getattr(self, name) != getattr(found, name):
                raise ValueError(
                    f"output={folder} holds embeddings with {name}={getattr(found, name)!r} (of {found.notes} by "
                    f"{found.model}), and this run has {getattr(self, name)!r}: give another output, the same model, "
                    "notes and settings, or delete the folder."
                )

    @property
    def num_shards(self) -> int:
        """How many shards the notes make."""
        return -(-self.num_notes // self.shard_size)

    @property
    def notes_of_whole_shard(self) -> int:
        """Notes of a shard that is not the rest of several."""
        return min(self.shard_size, self.num_notes)

    def rows(self, shard: int) -> tuple[int, int]:
        """The rows [start, stop) of a shard."""
        return shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_notes)


class Embeddings(NamedTuple):
    """Notes and their embeddings.

    Attributes:
        note_ids: N strings.
        vectors: (N, D) float32.
    """

    note_ids: pa.LargeStringArray
    vectors: np.ndarray


class EncodedRows(NamedTuple):
    """Some notes of a table and their embeddings.

    Attributes:
        rows: (n,) int64, their rows in the table, from 0.
        note_ids: n ids.
        vectors: (n, D) float32.
    """

    rows: np.ndarray
    note_ids: list[str]
    vectors: np.ndarray


class Failure(NamedTuple):
    """A note without embedding, or with one of its text alone.

    Attributes:
        note_id: its id.
        row: in the table, from 0; files name it from 1.
        error: what is wrong with it.
    """

    note_id: str
    row: int
    error: str


class ShardCounts(dict[int, tuple[int, int]]):
    """Of each shard that is there and whole, how many notes have an embedding and how many have failed."""

    @property
    def encoded(self) -> int:
        """Notes with an embedding."""
        return sum(encoded for encoded, _failed in self.values())

    @property
    def failed(self) -> int:
        """Notes without."""
        return sum(failed for _encoded, failed in self.values())


def shard_file(folder: str | Path, kind: Literal["embeddings", "failures", "text-only"], shard: int) -> Path:
    """Where the embeddings, the failures or the list of notes encoded by their text alone of a shard are."""
    return Path(folder) / kind / f"shard-{shard:06d}.parquet"


def whole_shards(folder: str | Path, manifest: Manifest, read: bool = False) -> ShardCounts:
    """The shards of a folder that are whole. The log names those that are not.

    Args:
        folder, manifest: where they are.
        read: read all of them and compare their checksums; otherwise the sizes that their files name are looked at.
    """
    counts = ShardCounts()
    for shard in range(manifest.num_shards):
        start, stop = manifest.rows(shard)
        files = (shard_file(folder, "embeddings", shard), shard_file(folder, "failures", shard))
        if not files[0].exists():
            continue
        try:
            encoded, failed = (pq.read_metadata(file).num_rows for file in files)
            if read:
                _read_embeddings(files[0])
                for kind in ("failures", "text-only"):
                    _listed_rows(shard_file(folder, kind, shard))
        except (OSError, ValueError) as error:  # also ArrowInvalid
            logger.warning("%s is not whole, or damaged, and does not count: %s", files[0], error)
            continue
        if encoded + failed == stop - start:
            counts[shard] = (encoded, failed)
        else:
            logger.warning("%s does not count: %d notes, not %d.", files[0], encoded + failed, stop - start)
    return counts


def count_text_only(folder: str | Path, shard: int) -> int:
    """How many notes of a shard are encoded by their text alone."""
    return len(_listed_rows(shard_file(folder, "text-only", shard)))


def text_only_ids(folder: str | Path, manifest: Manifest) -> set[str]:
    """The notes of a folder that are encoded by their text alone."""
    files = (shard_file(folder, "text-only", shard) for shard in range(manifest.num_shards))
    ids: set[str] = set()
    for file in filter(Path.exists, files):
        with _named_if_unreadable(file):
            ids.update(_read(file, ["note_id"])["note_id"].to_pylist())
    return ids


def read_shard(folder: str | Path, manifest: Manifest, shard: int) -> EncodedRows:
    """The notes of a whole shard that have an embedding of all that they hold."""
    note_ids, vectors = _read_embeddings(shard_file(folder, "embeddings", shard))
    rows = np.setdiff1d(np.arange(*manifest.rows(shard)), _listed_rows(shard_file(folder, "failures", shard)))
    is_complete = ~np.isin(rows, _listed_rows(shard_file(folder, "text-only", shard)))
    return EncodedRows(rows[is_complete], note_ids.filter(pa.array(is_complete)).to_pylist(), vectors[is_complete])


def write_shard(
    folder: str | Path,
    manifest: Manifest,
    shard: int,
    encoded: EncodedRows,
    failures: Sequence[Failure],
    text_only: Sequence[Failure] = (),
) -> None:
    """Writes a shard, or another in its place; all in any order of rows. Meanwhile, the shard is absent.

    Args:
        folder, manifest, shard: where to.
        encoded: the notes with an embedding.
        failures: those without.
        text_only: those of `encoded` whose embedding is of their text alone.
    """
    order = np.argsort(encoded.rows)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(encoded.vectors[order].reshape(-1)), manifest.dim)
    note_ids = pa.array([encoded.note_ids[position] for position in order.tolist()], pa.string())
    embedded = pa.table([note_ids, vectors], schema=embeddings_schema(manifest.dim))
    file, text_only_file = (shard_file(folder, kind, shard) for kind in ("embeddings", "text-only"))
    for old in (file, text_only_file):
        old.unlink(missing_ok=True)  # files of two runs would make no shard
    _write_listed(failures, shard_file(folder, "failures", shard))
    if text_only:
        _write_listed(text_only, text_only_file)
    write_file(iter([embedded]), embedded.schema, file)


def _write_listed(failures: Sequence[Failure], file: Path) -> None:
    rows = [failure._replace(row=failure.row + 1)._asdict() for failure in sorted(failures, key=lambda one: one.row)]
    write_file(iter([pa.Table.from_pylist(rows, schema=FAILURES_SCHEMA)]), FAILURES_SCHEMA, file)


def _listed_rows(file: Path) -> np.ndarray:
    """The rows that a list of failures names, from 0; none where there is no list."""
    if not file.exists():
        return np.empty(0, np.int64)
    with _named_if_unreadable(file):
        rows: np.ndarray = _read(file, ["row"])["row"].to_numpy() - 1
        return rows


def load_embeddings(path: str | Path) -> Embeddings:
    """Reads what `hub.encode` wrote, in the order of the notes.

    Args:
        path: its folder, or one file like those in it.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: a file is no Parquet file; shards are missing; columns are of another kind; an embedding is missing
            or not finite.
    """
    files = [Path(path)]
    if not files[0].exists():
        raise FileNotFoundError(f"{path}: no such folder or file; give a folder that hub.encode wrote.")
    if files[0].is_dir():
        manifest = Manifest.read(path)
        there = whole_shards(path, manifest)
        if len(there) < manifest.num_shards:
            raise ValueError(
                f"{path} has {len(there)} of {manifest.num_shards} shards: run hub.encode again, to encode the rest."
            )
        files = [shard_file(path, "embeddings", shard) for shard in range(manifest.num_shards)]
    count = sum(map(_num_rows, files))
    vectors: np.ndarray | None = None
    ids: list[pa.Array] = []
    first = 0
    for file in files:
        note_ids, part = _read_embeddings(file)
        if vectors is None:
            vectors = np.empty((count, part.shape[1]), dtype=np.float32)
        vectors[first : first + len(part)] = part
        ids.append(note_ids)
        first += len(part)
    if vectors is None or not count:
        raise ValueError(f"{path} holds no embedding: encode some notes.")
    return Embeddings(pa.concat_arrays(ids), vectors)


@contextmanager
def _named_if_unreadable(file: Path) -> Iterator[None]:
    """Raises ValueError where `file` turns out to be no Parquet file, or a damaged one."""
    try:
        yield
    except (OSError, pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file}: not a readable Parquet file ({error}); give what hub.encode wrote, or encode the notes anew."
        ) from error


def _read(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads a Parquet file, or some columns of it, by the checksums of its pages."""
    return pq.read_table(file, columns=columns, memory_map=True, page_checksum_verification=True)


def _num_rows(file: Path) -> int:
    with _named_if_unreadable(file):
        return int(pq.read_metadata(file).num_rows)


def _read_embeddings(file: Path) -> tuple[pa.LargeStringArray, np.ndarray]:
    with _named_if_unreadable(file):
        table = _read(file)
    kinds = {field.name: field.type for field in table.schema}
    if "note_id" not in kinds or not pa.types.is_fixed_size_list(kinds.get("embedding", pa.null())):
        raise ValueError(f"{file} has the columns {kinds}: hub.encode writes note_id, and embedding of a fixed size.")
    if table["note_id"].null_count or table["embedding"].null_count:
        raise ValueError(f"{file}: a note_id or embedding is empty; remove the row.")
    dim = kinds["embedding"].list_size
    vectors = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    vectors = vectors.astype(np.float32, copy=False)
    is_finite = np.isfinite(vectors).all(axis=1)
    if not is_finite.all():
        raise ValueError(f"{file}, row {int(is_finite.argmin()) + 1}: 'embedding' is not finite; encode the note anew.")
    return table["note_id"].cast(pa.large_string()).combine_chunks(), vectors


__all__ = [
    "EncodedRows",
    "Embeddings",
    "Failure",
    "Manifest",
    "ShardCounts",
    "count_text_only",
    "embeddings_schema",
    "load_embeddings",
    "read_shard",
    "shard_file",
    "text_only_ids",
    "whole_shards",
    "write_shard",
]
