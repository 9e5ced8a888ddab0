"""Related pairs streamed with their notes, for training on tables that are larger than memory.

A note is read when its turn comes, from disk if the table of notes is memory-mapped. In memory are the note ids and a
buffer of pairs, without their notes:

    notes = load_written_notes("splits/train/notes.arrow")   # as pairs.split writes it
    pairs = load_dataset("parquet", data_files="splits/train/pairs.parquet", split="train", streaming=True)
    for pair in stream_pairs(notes, pairs, shuffle_buffer=100_000, seed=0):
        pair["note"], pair["related_note"]

Notes that do not even fit once are saved by `Dataset.from_parquet(…).save_to_disk(…)`; their images must then be in the
table or have absolute paths.
"""

from typing import Any

from datasets import Dataset, IterableDataset

from pairs.files import to_arrow

_NUM_SHARDS = 64  # shuffled as wholes, and shared out to the workers of a DataLoader


def stream_pairs(
    notes: Dataset, pairs: Dataset | IterableDataset, *, shuffle_buffer: int, seed: int
) -> IterableDataset:
    """Streams every row of `pairs`, its two notes joined in, in a random order.

    Args:
        notes: a table with unique `note_id`. What `load_notes` makes of an .arrow file or of a folder written by
            `Dataset.save_to_disk` is memory-mapped.
        pairs: a table with `note_id` and `related_note_id`, or a stream of such rows.
        shuffle_buffer: each next pair is drawn from so many; the larger, the better mixed.
        seed: another seed gives another order, as does `set_epoch` of the returned stream.

    Returns:
        A stream of {"note": …, "related_note": …}, both as `notes[row]` gives them. Both directions of a pair are
        streamed if both are in `pairs`.

    Raises:
        ValueError: shuffle_buffer is below 1; while streaming, a pair of a note that `notes` lacks.
    """
    if shuffle_buffer < 1:
        raise ValueError(f"shuffle_buffer={shuffle_buffer}: give 1 or more pairs to draw from.")
    row_of = {note_id: row for row, note_id in enumerate(to_arrow(notes)["note_id"].to_pylist())}

    def note_of(note_id: str) -> dict[str, Any]:
        if note_id not in row_of:
            raise ValueError(f"pairs name the note {note_id!r}, which the notes lack: build the pairs of these notes.")
        return notes[row_of[note_id]]

    def join(pair: dict[str, Any]) -> dict[str, Any]:
        return {"note": note_of(pair["note_id"]), "related_note": note_of(pair["related_note_id"])}

    if isinstance(pairs, Dataset):
        pairs = pairs.to_iterable_dataset(num_shards=min(_NUM_SHARDS, len(pairs)))
    ids = pairs.select_columns(["note_id", "related_note_id"])
    # Shuffled before the join, so that the buffer holds ids and no notes.
    return ids.shuffle(seed=seed, buffer_size=shuffle_buffer).map(join, remove_columns=["note_id", "related_note_id"])
