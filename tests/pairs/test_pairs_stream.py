"""What is streamed is the join that memory would give, and the notes stay on disk."""

import pyarrow as pa
import pytest
from datasets import Dataset
from torch.utils.data import DataLoader

from pairs.stream import stream_pairs
from pairs.tables import load_notes, write_table
from train.data import PairDataset

N_NOTES = 200
CONTENT = 50_000  # letters a note: 10 MB in all


@pytest.fixture
def memory():
    """A pool that counts what Arrow allocates during the test; memory-mapped files are not allocated."""
    default = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(default)
    pa.set_memory_pool(pool)
    yield pool
    pa.set_memory_pool(default)


@pytest.fixture
def saved(tmp_path):
    """Notes as a folder of Arrow files, and pairs as a Parquet file."""
    notes = {
        "note_id": [f"n{i}" for i in range(N_NOTES)],
        "topics": [["a", str(i)] for i in range(N_NOTES)],
        "content": [f"{i} ".ljust(CONTENT, "x") for i in range(N_NOTES)],
    }
    Dataset.from_dict(notes).save_to_disk(tmp_path / "notes")
    numbers = [(i, (7 * i + 1 + k) % N_NOTES) for i in range(N_NOTES) for k in range(3)]
    numbers = [(a, b) for a, b in numbers if a != b]
    pairs = {
        "note_id": [f"n{a}" for a, _ in numbers],
        "related_note_id": [f"n{b}" for _, b in numbers],
        "score": [1.0] * len(numbers),
        "rank": [1] * len(numbers),
    }
    write_table(Dataset.from_dict(pairs), tmp_path / "pairs.parquet")
    return tmp_path


def read_pairs(folder, streaming=False):
    pairs = Dataset.from_parquet(str(folder / "pairs.parquet"), cache_dir=str(folder / "cache"))
    return pairs.to_iterable_dataset() if streaming else pairs


def by_ids(rows):
    return sorted(rows, key=lambda row: (row["note"]["note_id"], row["related_note"]["note_id"]))


def ids_of(rows):
    return [(row["note"]["note_id"], row["related_note"]["note_id"]) for row in rows]


def joined_in_memory(notes, pairs):
    note_of = {note["note_id"]: note for note in notes}
    return [
        {"note": note_of[a], "related_note": note_of[b]}
        for a, b in zip(pairs["note_id"], pairs["related_note_id"], strict=True)
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_stream_is_the_join_in_another_order(saved, streaming):
    notes = load_notes(saved / "notes")
    expected = joined_in_memory(notes, read_pairs(saved))
    streamed = list(stream_pairs(notes, read_pairs(saved, streaming), shuffle_buffer=50, seed=0))
    assert by_ids(streamed) == by_ids(expected)
    assert streamed != expected
    swapped = [{"note": row["related_note"], "related_note": row["note"]} for row in expected]
    assert by_ids(streamed) != by_ids(swapped)


def test_the_stream_has_the_pairs_of_the_trainer(saved):
    notes, pairs = load_notes(saved / "notes"), read_pairs(saved)
    note_ids = notes["note_id"]
    trained = {frozenset((note_ids[a], note_ids[b])) for a, b in PairDataset(notes, pairs)}
    assert {frozenset(ids) for ids in ids_of(stream_pairs(notes, pairs, shuffle_buffer=50, seed=0))} == trained
    fewer = pairs.select(range(300))
    assert {frozenset(ids) for ids in ids_of(stream_pairs(notes, fewer, shuffle_buffer=50, seed=0))} < trained


def test_seed_and_epoch_give_the_order(saved):
    notes, pairs = load_notes(saved / "notes"), read_pairs(saved)
    first = ids_of(stream_pairs(notes, pairs, shuffle_buffer=50, seed=0))
    stream = stream_pairs(notes, pairs, shuffle_buffer=50, seed=0)
    assert ids_of(stream) == first
    stream.set_epoch(1)
    assert ids_of(stream) != first and sorted(ids_of(stream)) == sorted(first)
    assert ids_of(stream_pairs(notes, pairs, shuffle_buffer=50, seed=2)) != first


def test_workers_of_a_loader_share_the_pairs(saved):
    notes, pairs = load_notes(saved / "notes"), read_pairs(saved)
    stream = stream_pairs(notes, pairs, shuffle_buffer=50, seed=0)
    rows = [row for batch in DataLoader(stream, batch_size=8, num_workers=2, collate_fn=list) for row in batch]
    assert sorted(ids_of(rows)) == sorted(ids_of(joined_in_memory(notes, pairs)))


def test_notes_are_read_from_disk_one_by_one(saved, memory):
    notes = load_notes(saved / "notes")
    pairs = read_pairs(saved)
    letters = sum(len(row["note"]["content"]) for row in stream_pairs(notes, pairs, shuffle_buffer=50, seed=0))
    assert letters == len(pairs) * CONTENT
    assert memory.max_memory() < N_NOTES * CONTENT / 10


def test_the_same_notes_of_a_parquet_file_are_in_memory(saved, memory):
    write_table(load_notes(saved / "notes"), saved / "notes.parquet")
    notes = load_notes(saved / "notes.parquet")
    assert memory.bytes_allocated() > 0.9 * len(notes) * CONTENT


def test_unknown_notes_and_no_buffer_are_refused(saved):
    notes = load_notes(saved / "notes")
    pairs = Dataset.from_dict({"note_id": ["n0"], "related_note_id": ["x"]})
    with pytest.raises(ValueError, match="pairs name the note 'x', which the notes lack"):
        list(stream_pairs(notes, pairs, shuffle_buffer=1, seed=0))
    with pytest.raises(ValueError, match="shuffle_buffer=0: give 1 or more"):
        stream_pairs(notes, pairs, shuffle_buffer=0, seed=0)
    assert list(stream_pairs(notes, pairs.select([]), shuffle_buffer=1, seed=0)) == []
