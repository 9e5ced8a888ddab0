"""What is written of a corpus is what is read, and what is missing or damaged is said."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hub.embeddings
from hub.embeddings import (
    EncodedRows,
    Failure,
    Manifest,
    count_text_only,
    embeddings_schema,
    load_embeddings,
    read_shard,
    shard_file,
    whole_shards,
    write_shard,
)

MANIFEST = Manifest("m", "1", "n", "2", num_notes=8, shard_size=5, dim=3, dtype="float32")


def vectors(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3), dtype=np.float32)


def write_embeddings(path: Path, ids: list[str], vectors: np.ndarray) -> Path:
    schema = embeddings_schema(vectors.shape[1])
    values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    pq.write_table(pa.table([pa.array(ids), values], schema=schema), path)
    return path


def test_a_shard_is_sorted_and_read_back(tmp_path: Path):
    embeds = vectors(3)
    encoded = EncodedRows(np.array([7, 5]), ["h", "f"], embeds[:2])
    write_shard(tmp_path, MANIFEST, 1, encoded, [Failure("g", 6, "no picture")])
    found = read_shard(tmp_path, MANIFEST, 1)
    assert found.rows.tolist() == [5, 7] and found.note_ids == ["f", "h"]
    np.testing.assert_array_equal(found.vectors, embeds[[1, 0]])
    failures = pq.read_table(shard_file(tmp_path, "failures", 1)).to_pylist()
    assert failures == [{"note_id": "g", "row": 7, "error": "no picture"}]
    assert whole_shards(tmp_path, MANIFEST) == {1: (2, 1)}
    # Another one in its place, of which nothing of the first is left.
    write_shard(tmp_path, MANIFEST, 1, EncodedRows(np.array([6, 5, 7]), ["g", "f", "h"], embeds), [])
    assert whole_shards(tmp_path, MANIFEST) == {1: (3, 0)}
    assert read_shard(tmp_path, MANIFEST, 1).note_ids == ["f", "g", "h"]


def test_what_is_encoded_by_its_text_alone_is_listed(tmp_path: Path):
    """It has an embedding and counts as encoded, but is not among what `read_shard` takes for done."""
    embeds = vectors(2)
    encoded = EncodedRows(np.array([7, 5]), ["h", "f"], embeds)
    write_shard(tmp_path, MANIFEST, 1, encoded, [Failure("g", 6, "-")], [Failure("h", 7, "no picture")])
    assert whole_shards(tmp_path, MANIFEST) == {1: (2, 1)} and count_text_only(tmp_path, 1) == 1
    listed = pq.read_table(shard_file(tmp_path, "text-only", 1)).to_pylist()
    assert listed == [{"note_id": "h", "row": 8, "error": "no picture"}]
    found = read_shard(tmp_path, MANIFEST, 1)
    assert (found.rows.tolist(), found.note_ids) == ([5], ["f"])
    np.testing.assert_array_equal(found.vectors, embeds[1:])
    # Another one in its place leaves nothing of the list.
    write_shard(tmp_path, MANIFEST, 1, encoded, [Failure("g", 6, "-")])
    assert count_text_only(tmp_path, 1) == 0 and read_shard(tmp_path, MANIFEST, 1).rows.tolist() == [5, 7]


def test_a_shard_that_is_killed_while_it_is_replaced_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another note than before fails: the old embeddings with the new failures would look whole, and lose a note."""
    write_shard(tmp_path, MANIFEST, 1, EncodedRows(np.array([5, 6]), ["f", "g"], vectors(2)), [Failure("h", 7, "-")])

    def killed(*arguments: object) -> None:
        write_file(*arguments)
        raise KeyboardInterrupt

    write_file = hub.embeddings.write_file
    monkeypatch.setattr(hub.embeddings, "write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, MANIFEST, 1, EncodedRows(np.array([5, 7]), ["f", "h"], vectors(2)), [Failure("g", 6, "")])
    assert whole_shards(tmp_path, MANIFEST) == {}


def test_a_folder_of_another_format_is_refused(tmp_path: Path):
    MANIFEST.write(tmp_path)
    assert Manifest.read(tmp_path) == MANIFEST  # control
    replace(MANIFEST, format=MANIFEST.format - 1).write(tmp_path)
    with pytest.raises(ValueError, match=r"manifest\.json has format=1, and this release 2: encode into a new folder"):
        Manifest.read(tmp_path)


def test_what_is_no_embeddings_is_named(tmp_path: Path):
    pq.write_table(pa.table({"note_id": ["a"], "vector": [[1.0]]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="embedding of a fixed size"):
        load_embeddings(tmp_path / "other.parquet")
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        load_embeddings(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none: no such folder or file; give a folder that hub\.encode wrote"):
        load_embeddings(tmp_path / "none")
    (tmp_path / "notes.jsonl").write_text('{"note_id": "a"}\n')
    with pytest.raises(ValueError, match=r"notes\.jsonl: not a readable Parquet file .*give what hub"):
        load_embeddings(tmp_path / "notes.jsonl")
    damaged = vectors(3)
    damaged[1, 2] = np.nan
    with pytest.raises(ValueError, match="row 2: 'embedding' is not finite"):
        load_embeddings(write_embeddings(tmp_path / "damaged.parquet", list("abc"), damaged))
