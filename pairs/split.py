"""Notes split into train, validation and test, such that no test note is seen in training.

The notes are split, not the pairs: a pair belongs to a split if both its notes do, and its related notes are chosen
among the notes of that split. Pairs that cross the cut are in none; they are counted.

    DIR/{train,validation,test}/{notes,pairs}.parquet
    DIR/splits.json          options, seed and counts; written last

    python -m pairs.split --notes notes.csv --views views.csv --output DIR --score cosine --min-count 2
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from pairs.build import PairOptions, add_pair_arguments, build_pairs, pair_options
from pairs.files import to_arrow
from pairs.tables import load_notes, load_pairs, load_views, write_table

SPLITS = ("train", "validation", "test")


class NotesAndPairs(NamedTuple):
    """The notes of a split, as from `load_notes`, and the pairs among them, as from `load_pairs`."""

    notes: Dataset
    pairs: Dataset


def split_notes(note_ids: Iterable[str], validation: float, test: float, seed: int) -> dict[str, list[str]]:
    """Splits notes at random, by their ids and the seed alone.

    The notes are put in the order of a hash of seed and id: the order of `note_ids` does not matter, and a few notes
    more or less move few others from one split to another.

    Args:
        note_ids: N unique ids.
        validation: share of the notes for validation, 0 to 1; round(validation * N) notes.
        test: share of the notes for test, 0 to 1; round(test * N) notes. The rest is for training.
        seed: another seed gives another split.

    Returns:
        The ids of "train", "validation" and "test", each sorted.

    Raises:
        ValueError: duplicate ids, or shares that leave nothing to train on.
    """
    note_ids = list(note_ids)
    if len(set(note_ids)) != len(note_ids):
        raise ValueError("note_ids: an id occurs twice; keep one row of each note.")
    for name, share in (("validation", validation), ("test", test)):
        if not 0 <= share < 1:
            raise ValueError(f"{name}={share}: give a share of the notes, at least 0 and below 1.")
    n_test, n_validation = round(test * len(note_ids)), round(validation * len(note_ids))
    if n_test + n_validation >= len(note_ids):
        raise ValueError(
            f"validation={validation}, test={test}: nothing of {len(note_ids)} notes is left to train on; lower them."
        )
    order = sorted(note_ids, key=lambda note_id: hashlib.sha256(f"{seed}\n{note_id}".encode()).digest())
    return {
        "train": sorted(order[n_test + n_validation :]),
        "validation": sorted(order[n_test : n_test + n_validation]),
        "test": sorted(order[:n_test]),
    }


def make_splits(
    notes: Dataset,
    views: Dataset,
    options: PairOptions,
    *,
    validation: float,
    test: float,
    seed: int,
    output_dir: str | Path,
    memory_gb: float = 4.0,
) -> None:
    """Writes notes and pairs of every split (see the top of this file) into `output_dir`.

    Args:
        notes: a table as from `load_notes`; its rows keep their order within a split.
        views: a table as from `load_views`; views of other notes count only for how many users it has.
        options: what makes two notes related.
        validation: see `split_notes`.
        test: see `split_notes`.
        seed: see `split_notes`.
        output_dir: made if it is not there; files of an earlier split are replaced.
        memory_gb: see `build_pairs`.

    splits.json holds `pair_options`, `validation`, `test`, `seed`, `counts` (for each split: notes, notes_with_pairs,
    pairs) and `pairs_across_splits`: of the pairs that the same options give when the notes are not split, how many
    have their two notes in different splits.

    Raises:
        ValueError: see `split_notes`.
    """
    output = Path(output_dir)
    parts = split_notes(notes["note_id"], validation, test, seed)
    (output / "splits.json").unlink(missing_ok=True)  # nobody shall load a half-replaced split
    table_ids = to_arrow(notes)["note_id"]
    counts: dict[str, dict[str, int]] = {}
    for name, note_ids in parts.items():
        inside = pc.is_in(table_ids, value_set=pa.array(note_ids, pa.string()))
        pairs = build_pairs(views, options, note_ids, memory_gb=memory_gb)
        write_table(notes.select(pc.indices_nonzero(inside).to_pylist()), output / name / "notes.parquet")
        write_table(pairs, output / name / "pairs.parquet")
        counts[name] = {
            "notes": len(note_ids),
            "notes_with_pairs": len(pairs.unique("note_id")),
            "pairs": len(pairs),
        }
    split_of = {note_id: name for name, note_ids in parts.items() for note_id in note_ids}
    unsplit = build_pairs(views, options, list(split_of), memory_gb=memory_gb)
    across = sum(
        split_of[a] != split_of[b] for a, b in zip(unsplit["note_id"], unsplit["related_note_id"], strict=True)
    )
    record = {
        "pair_options": asdict(options),
        "validation": validation,
        "test": test,
        "seed": seed,
        "counts": counts,
        "pairs_across_splits": across,
    }
    (output / "splits.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_split(directory: str | Path, name: str) -> NotesAndPairs:
    """Loads one split that `make_splits` wrote.

    Args:
        directory: the `output_dir` of `make_splits`.
        name: "train", "validation" or "test".

    Raises:
        ValueError: another name.
        FileNotFoundError: no such split in `directory`.
    """
    if name not in SPLITS:
        raise ValueError(f"name={name!r}: use one of {SPLITS}.")
    folder = Path(directory) / name
    if not (Path(directory) / "splits.json").is_file():
        raise FileNotFoundError(f"{directory}: no splits.json here; write the splits with python -m pairs.split.")
    return NotesAndPairs(load_notes(folder / "notes.parquet"), load_pairs(folder / "pairs.parquet"))


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = argparse.ArgumentParser(
        prog="python -m pairs.split",
        description="Split notes into train, validation and test, and build the related pairs of each split.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--notes", required=True, help="table of notes: note_id, title, topics, content, image")
    parser.add_argument("--views", required=True, help="table of views: user_id, note_id, timestamp")
    parser.add_argument("--output", required=True, help="folder to write the splits into")
    parser.add_argument("--validation", type=float, default=0.1, help="share of the notes for validation")
    parser.add_argument("--test", type=float, default=0.15, help="share of the notes for test")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another split")
    add_pair_arguments(parser)
    args = parser.parse_args(argv)
    try:
        make_splits(
            load_notes(args.notes),
            load_views(args.views),
            pair_options(args),
            validation=args.validation,
            test=args.test,
            seed=args.seed,
            output_dir=args.output,
            memory_gb=args.memory_gb,
        )
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    record: dict[str, Any] = json.loads((Path(args.output) / "splits.json").read_text(encoding="utf-8"))
    for name, count in record["counts"].items():
        sys.stdout.write(
            f"{name:<10} {count['notes']:>7} notes, {count['notes_with_pairs']:>7} of them with pairs,"
            f" {count['pairs']:>8} pairs\n"
        )
    sys.stdout.write(f"{record['pairs_across_splits']} pairs cross the cut and are in no split: {args.output}\n")


if __name__ == "__main__":
    main()
