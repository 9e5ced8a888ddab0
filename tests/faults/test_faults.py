"""Faults of every kind, by seed: a restart gives what an undisturbed run gives. More: benchmarks/reliability.py."""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.faults import FaultBench, Kind, Outcome, inject, plan
from hub.embeddings import Manifest, load_embeddings, whole_shards
from pairs.disk import DamagedError, sha256
from pairs.files import to_arrow
from pairs.split import load_split
from pairs.tables import load_pairs, write_table

JOBS = ["pairs.build", "pairs.split", "features", "training", "encoding", "export"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> FaultBench:
    return FaultBench(tmp_path_factory.mktemp("faults"))


def assert_good(outcome: Outcome) -> None:
    assert outcome.is_good, outcome


@pytest.mark.parametrize("job", JOBS)
def test_killed(bench: FaultBench, job: str):
    assert_good(bench.kill(bench.jobs[job], np.random.default_rng(3), by_event=True))


@pytest.mark.parametrize("job", [job for job in JOBS if job != "pairs.split"])
def test_full_disk(bench: FaultBench, job: str):
    assert_good(inject(bench, "disk", job, 6))  # by a limit on files, which needs no rights


@pytest.mark.parametrize("job", JOBS)
def test_damaged(bench: FaultBench, job: str):
    for seed in range(12):
        assert_good(inject(bench, "damage", job, seed))


@pytest.mark.parametrize("job", [job for job in JOBS if job != "features"])
def test_two_at_once(bench: FaultBench, job: str):
    assert_good(bench.start_twice(bench.jobs[job]))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "job", "seed"), [one for one in plan(36, 1) if one[0] != "damage"])
def test_more_faults(bench: FaultBench, kind: Kind, job: str, seed: int):
    assert_good(inject(bench, kind, job, seed))


def test_a_wrong_result_and_a_lost_note_are_seen(bench: FaultBench):
    """Control: what a restart would give if it took half for whole."""
    job = bench.jobs["encoding"]
    bench.undisturbed(job)
    folder = bench.folder / "undisturbed-encoding"
    file = folder / "embeddings" / "embeddings" / "shard-000001.parquet"
    whole, table = file.read_bytes(), pq.read_table(file)
    reverse = table.take(list(range(len(table)))[::-1])
    # A shard that lacks a row is not whole: none of its notes counts.
    for rows, words, lost in ((reverse, "differs", 0), (table[:-1], "missing", len(table))):
        pq.write_table(rows, file)
        outcome = Outcome("kill", job.name, "control")
        bench.compare(job, folder, outcome)
        assert any(words in wrong for wrong in outcome.wrong) and outcome.lost == lost
    file.write_bytes(whole)
    outcome = Outcome("kill", job.name, "control")
    bench.compare(job, folder, outcome)
    assert outcome.is_good


def test_a_damaged_split_is_refused_by_name(bench: FaultBench, tmp_path: Path):
    """Damage that leaves a table readable."""
    bench.undisturbed(bench.jobs["pairs.split"])
    folder = bench.folder / "undisturbed-pairs.split" / "splits"
    file = folder / "train" / "notes.arrow"
    whole = file.read_bytes()
    title = load_split(folder, "train").notes[0]["title"].encode()
    damaged = whole.replace(title, title[::-1])
    assert damaged != whole
    file.write_bytes(damaged)
    with pytest.raises(DamagedError, match=r"train/notes\.arrow is damaged, by its checksum.*write the splits again"):
        load_split(folder, "train")
    load_split(folder, "test")
    checksums = (folder / "splits.json").read_text()
    (folder / "splits.json").write_text(checksums.replace(sha256_of(whole, tmp_path), sha256(file)))
    assert load_split(folder, "train").notes[0]["title"].encode() == title[::-1]  # control: nothing else finds it
    (folder / "splits.json").write_text(checksums)
    file.write_bytes(whole)


def sha256_of(content: bytes, folder: Path) -> str:
    (folder / "content").write_bytes(content)
    return sha256(folder / "content")


def test_a_flipped_byte_of_a_table_of_pairs_is_found(bench: FaultBench, tmp_path: Path):
    """Pages have checksums; the footer has none, and says most things twice: what it says once is read, or unused."""
    bench.undisturbed(bench.jobs["pairs.build"])
    expected = load_pairs(bench.folder / "undisturbed-pairs.build" / "pairs.parquet").select(range(40))
    write_table(expected, tmp_path / "pairs.parquet")
    whole = (tmp_path / "pairs.parquet").read_bytes()
    refused = 0
    for place in range(4, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        (tmp_path / "pairs.parquet").write_bytes(damaged)
        try:
            found = load_pairs(tmp_path / "pairs.parquet")
        except ValueError as error:
            assert "pairs.parquet" in str(error)
            refused += 1
        else:
            assert to_arrow(found).equals(to_arrow(expected))
    assert refused > 30


@pytest.mark.parametrize("name", ["note_id", "related_note_id", "score"])
def test_a_null_among_pairs_is_refused(name: str, tmp_path: Path):
    pairs = {"note_id": ["a", "b"], "related_note_id": ["b", "a"], "score": [0.5, 0.25]}
    pq.write_table(pa.table(pairs), tmp_path / "pairs.parquet")
    assert load_pairs(tmp_path / "pairs.parquet")["score"][:] == [0.5, 0.25]  # control
    pq.write_table(pa.table(pairs | {name: [pairs[name][0], None]}), tmp_path / "pairs.parquet")
    with pytest.raises(ValueError, match=rf"pairs\.parquet.*{name}"):
        load_pairs(tmp_path / "pairs.parquet")
    del pairs["score"]
    pq.write_table(pa.table(pairs), tmp_path / "pairs.parquet")
    assert load_pairs(tmp_path / "pairs.parquet")["score"][:] == [None, None]


def test_a_damaged_shard_is_named_and_encoded_again(bench: FaultBench, caplog: pytest.LogCaptureFixture):
    job = bench.jobs["encoding"]
    bench.undisturbed(job)
    folder = bench.folder / "undisturbed-encoding" / "embeddings"
    file = folder / "embeddings" / "shard-000002.parquet"
    whole = file.read_bytes()
    vectors = load_embeddings(file).vectors
    place = whole.index(vectors[3].tobytes())
    damaged = bytearray(whole)
    damaged[place + 3] ^= 0x01
    file.write_bytes(damaged)
    manifest = Manifest.read(folder)
    with pytest.raises(ValueError, match=r"shard-000002\.parquet"):
        load_embeddings(folder)
    with caplog.at_level(logging.WARNING):
        assert 2 not in whole_shards(folder, manifest, read=True)
    assert "shard-000002.parquet is not whole, or damaged" in caplog.text
    assert_good(bench.restart(job, folder.parent, Outcome("damage", job.name, "one bit")))
    assert file.read_bytes() != bytes(damaged)
