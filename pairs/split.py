"""Notes and pairs split into train, validation and test, such that training sees nothing of what is tested.

By note: each note is in one split; a split's pairs are those between its notes, its related notes chosen among them.
By time: a split's pairs are those that users saw within its period, test being the last days; all notes are in every
split, and pairs that training has are taken out of the others. By both: new notes in new days. What crosses a cut is in
no split; it is counted.

    DIR/{train,validation,test}/notes.arrow     read from disk as they are asked for, not into memory
    DIR/{train,validation,test}/pairs.parquet
    DIR/{validation,test}/subsets.parquet       see pairs.subsets
    DIR/splits.json                             options, counts and checksums of the files above; written last

    python -m pairs.split --notes notes.csv --views views.csv --output DIR --score cosine --min-count 2
"""

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import ibis
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from ibis import _
from ibis.expr import types as ir

from pairs.build import add_engine_options, add_view_options, opened_engine, parsed_view_options
from pairs.command import CommandParser, interruption_said
from pairs.disk import UNFINISHED, DamagedError, alone_in, new_file, remove, sha256
from pairs.engines import Engine, connect
from pairs.files import to_arrow
from pairs.options import add_options, parsed_options
from pairs.query import SECONDS_PER_DAY, PairOptions, ViewLog, count_pairs, name_pairs, rank_pairs, view_log
from pairs.subsets import pair_subsets
from pairs.tables import IMAGE_ROOT_HELP, load_notes, load_pairs, load_written_notes, write_table
from pairs.views import ReadViews, ViewOptions, broken_rules_text, read_views

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
SplitBy = Literal["note", "time", "both"]
_FILES = ("notes.arrow", "pairs.parquet", "subsets.parquet")


class NotesAndPairs(NamedTuple):
    """The notes of a split, as from `load_notes`, and the pairs among them, as from `load_pairs`."""

    notes: Dataset
    pairs: Dataset


@dataclass(frozen=True)
class SplitOptions:
    """What is kept for validation and test. Each field's metadata says what it is; the command's --help repeats it."""

    by: SplitBy = field(
        default="note",
        metadata={
            "help": "note: test notes are new; time: test pairs are those of the last days; both: new notes then"
        },
    )
    validation: float = field(default=0.1, metadata={"help": "share of the notes for validation (by note or both)"})
    test: float = field(default=0.15, metadata={"help": "share of the notes for test (by note or both)"})
    validation_days: float = field(
        default=3.0, metadata={"help": "days before those of the test that are for validation (by time or both)"}
    )
    test_days: float = field(default=7.0, metadata={"help": "last days of the log, for test (by time or both)"})
    seed: int = field(default=0, metadata={"help": "another seed gives another split of the notes"})

    def __post_init__(self) -> None:
        if self.by not in get_args(SplitBy):
            raise ValueError(f"by={self.by!r}: use one of {get_args(SplitBy)}.")
        for name in ("validation", "test"):
            share = getattr(self, name)
            if not 0 <= share < 1:
                raise ValueError(f"{name}={share}: give a share of the notes, at least 0 and below 1.")
        for name in ("validation_days", "test_days"):
            days = getattr(self, name)
            if not 0 <= days < 100_000:
                raise ValueError(f"{name}={days}: give a number of days, at least 0.")


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
    views: str | Path | Dataset | pa.Table,
    options: PairOptions,
    split: SplitOptions,
    output_dir: str | Path,
    *,
    view_options: ViewOptions | None = None,
    engine: Engine | None = None,
) -> str:
    """Writes notes and pairs of every split (see the top of this file) into `output_dir`.

    Args:
        notes: a table as from `load_notes`; its rows keep their order within a split.
        views: a path or URL, or a table in memory, with a user's id, a note's id and a time in each row.
        options: what makes two notes related. By note, users of a note and activity of a user are counted over the
            views of all notes; by time, over those of the split's period, as the future is not known in training. The
            rules of `view_options` look at the whole log: who is a bot in the test's days is none in training, either.
        split: what is kept for validation and test.
        output_dir: made if it is not there; files of an earlier split are replaced.
        view_options: where `views` has them, and which of them count; None: the defaults.
        engine: what computes; None: DuckDB with its defaults.

    Returns:
        What was read and which rows were dropped, as `broken_rules_text` says it.

    splits.json holds the options, `views` (`rows`, `kept`, and the rows of each rule), `counts` (for each split: notes,
    notes_with_pairs, pairs), `periods` (by time or both: first second and the one after the last of each split),
    `pairs_across_splits`: of the pairs that the whole log gives with the same options, how many are in no split because
    their notes, or the views that made them, lie on two sides of a cut; and `pairs_known_from_training` (by time): how
    many pairs were taken out of validation and test because training has them, in whichever direction.

    Raises:
        FileNotFoundError: nothing is at `views`.
        ValueError: see `split_notes` and `read_views`; periods that leave no views for training; another run is writing
            into `output_dir`.
        DiskError: the disk is full.
    """
    if engine is None:
        with connect() as engine:
            return make_splits(notes, views, options, split, output_dir, view_options=view_options, engine=engine)
    with alone_in(output_dir):
        return _make_splits(notes, views, options, split, Path(output_dir), view_options or ViewOptions(), engine)


def _make_splits(
    notes: Dataset,
    views: str | Path | Dataset | pa.Table,
    options: PairOptions,
    split: SplitOptions,
    output: Path,
    view_options: ViewOptions,
    engine: Engine,
) -> str:
    note_ids = to_arrow(notes.select_columns("note_id"))["note_id"]
    parts = dict.fromkeys(SPLITS, note_ids)
    if split.by != "time":
        lists = split_notes(note_ids.to_pylist(), split.validation, split.test, split.seed)
        parts = {name: pa.array(ids, pa.string()) for name, ids in lists.items()}
    read = read_views(engine, views, view_options, note_ids.to_pylist())
    logs, periods = _logs(read, split, engine)

    ranked: dict[str, ir.Table] = {}
    inside: list[ir.Table] = []
    known = dict.fromkeys(SPLITS[1:], 0)
    for name in SPLITS:
        eligible = None
        if split.by != "time":
            wanted = engine.from_arrow(pa.table({"note_id": parts[name]}))
            eligible = read.log.notes.semi_join(wanted, "note_id").select("note")
        counted = count_pairs(logs[name], options, engine, eligible)
        inside.append(counted.select("note", "related"))
        if split.by == "time" and name != "train":
            trained = ranked["train"].select("note", "related")
            trained = trained.union(trained.select(note="related", related="note"))
            new = engine.keep(counted.anti_join(trained, ["note", "related"]))
            known[name] = engine.count(counted) - engine.count(new)
            counted = new
        ranked[name] = rank_pairs(counted, logs[name], options, engine)
    unsplit = rank_pairs(count_pairs(read.log, options, engine), read.log, options, engine)
    across = engine.count(unsplit.anti_join(ibis.union(*inside), ["note", "related"]))

    (output / "splits.json").unlink(missing_ok=True)  # nobody shall load a half-replaced split
    # A list: what is in a folder is gone with it.
    for unfinished in sorted(output.glob(f"**/.*.{UNFINISHED}*")):  # of a run that was killed
        if unfinished.exists():
            remove(unfinished)
    users = engine.fetch(logs["train"].notes.select("note_id", "users"))
    counts: dict[str, dict[str, int]] = {}
    for name in SPLITS:
        own = notes
        if split.by != "time":
            own = notes.select(pc.indices_nonzero(pc.is_in(note_ids, value_set=parts[name])).to_pylist())
        pairs = Dataset(engine.fetch(name_pairs(ranked[name], logs[name])))
        write_table(own, output / name / "notes.arrow")
        write_table(pairs, output / name / "pairs.parquet")
        if name != "train":
            write_table(pair_subsets(pairs, own, users), output / name / "subsets.parquet")
        counts[name] = {"notes": len(own), "notes_with_pairs": len(pairs.unique("note_id")), "pairs": len(pairs)}
    record: dict[str, Any] = {
        "pair_options": asdict(options),
        "split_options": asdict(split),
        "view_options": asdict(view_options),
        "views": {"rows": read.rows, "kept": read.kept, "broken_rules": read.broken},
        "counts": counts,
        "pairs_across_splits": across,
        "checksums": {
            file.relative_to(output).as_posix(): sha256(file)
            for name in SPLITS
            for file in sorted((output / name).iterdir())
            if file.name in _FILES
        },
    }
    if split.by != "note":
        record["periods"] = periods
    if split.by == "time":
        record["pairs_known_from_training"] = known
    for name, count in counts.items():
        if count["notes"] and not count["pairs"]:
            logger.warning("%s has no pairs: give it more notes or days, lower min_count, or bring more views.", name)
    with new_file(output / "splits.json") as unfinished:
        unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return broken_rules_text(read, view_options)


def _logs(
    read: ReadViews, split: SplitOptions, engine: Engine
) -> tuple[dict[str, ViewLog], dict[str, tuple[int, int]]]:
    """The views that each split may know, and their periods: first second, and the one after the last."""
    log, begin, end = read.log, read.first, read.last + 1
    if split.by == "note":
        return dict.fromkeys(SPLITS, log), dict.fromkeys(SPLITS, (begin, end))
    test = end - int(split.test_days * SECONDS_PER_DAY)
    validation = test - int(split.validation_days * SECONDS_PER_DAY)
    if validation <= begin:
        days = (end - begin) / SECONDS_PER_DAY
        raise ValueError(
            f"validation_days={split.validation_days}, test_days={split.test_days}: nothing is left to train on of the "
            f"{days:.2f} days that the views span; lower them."
        )
    periods = {"train": (begin, validation), "validation": (validation, test), "test": (test, end)}
    logs = {
        name: view_log(engine.keep(log.visits.filter((_.timestamp >= start) & (_.timestamp < stop))), log.notes, engine)
        for name, (start, stop) in periods.items()
    }
    for name, (start, stop) in periods.items():
        if stop > start and not logs[name].num_users:
            bounds = [datetime.fromtimestamp(second, UTC).isoformat() for second in (start, stop)]
            raise ValueError(
                f"{name}: there is no view from {bounds[0]} to {bounds[1]}; is a time of the log wrong? Else change "
                f"validation_days={split.validation_days} or test_days={split.test_days}."
            )
    return logs, periods


def load_split(directory: str | Path, name: str) -> NotesAndPairs:
    """Loads one split that `make_splits` wrote. The notes are read from disk when they are asked for.

    Args:
        directory: the `output_dir` of `make_splits`.
        name: "train", "validation" or "test".

    Raises:
        ValueError: another name; a file is not as it was written (DamagedError).
        FileNotFoundError: no such split in `directory`.
    """
    if name not in SPLITS:
        raise ValueError(f"name={name!r}: use one of {SPLITS}.")
    folder = Path(directory) / name
    if not (Path(directory) / "splits.json").is_file():
        raise FileNotFoundError(f"{directory}: no splits.json here; write the splits with python -m pairs.split.")
    _refuse_damaged(Path(directory), name)
    return NotesAndPairs(load_written_notes(folder / "notes.arrow"), load_pairs(folder / "pairs.parquet"))


def _refuse_damaged(directory: Path, name: str) -> None:
    """Raises DamagedError for the first file of a split that is not as it was written."""
    record = directory / "splits.json"
    try:
        checksums = json.loads(record.read_text(encoding="utf-8")).get("checksums")
    except (ValueError, AttributeError) as error:
        raise DamagedError(f"{record} is damaged ({error}): write the splits again.") from error
    if checksums is None:
        logger.warning("%s has no checksums, as it is of an earlier release: damage would go unseen.", record)
        return
    for file, checksum in checksums.items():
        if not file.startswith(f"{name}/"):
            continue
        if not (directory / file).is_file():
            raise FileNotFoundError(f"{directory / file} is missing: write the splits again.")
        if sha256(directory / file) != checksum:
            raise DamagedError(f"{directory / file} is damaged, by its checksum in {record}: write the splits again.")


@interruption_said("the splits are not whole; give the same command to begin again.")
def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = CommandParser(
        prog="python -m pairs.split",
        description="Split notes and views into train, validation and test, and build the related pairs of each.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--notes", required=True, help="table of notes: note_id, title, topics, content, image")
    parser.add_argument("--image-root", metavar="DIR", help=IMAGE_ROOT_HELP)
    parser.add_argument(
        "--views", required=True, help="log of views: a file, a pattern, a folder (also day=…/) or a URL such as s3://…"
    )
    parser.add_argument("--output", required=True, help="folder to write the splits into")
    add_options(parser, SplitOptions, "what is kept for validation and test")
    add_options(parser, PairOptions, "what makes two notes related")
    add_view_options(parser)
    add_engine_options(parser)
    args = parser.parse_args(argv)
    try:
        options, split = parsed_options(args, PairOptions), parsed_options(args, SplitOptions)
        with opened_engine(args) as engine:
            text = make_splits(
                load_notes(args.notes, args.image_root),
                args.views,
                options,
                split,
                args.output,
                view_options=parsed_view_options(args),
                engine=engine,
            )
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    record: dict[str, Any] = json.loads((Path(args.output) / "splits.json").read_text(encoding="utf-8"))
    sys.stdout.write(text + "\n")
    for name, count in record["counts"].items():
        sys.stdout.write(
            f"{name:<10} {count['notes']:>7} notes, {count['notes_with_pairs']:>7} of them with pairs,"
            f" {count['pairs']:>8} pairs\n"
        )
    for name, count in record.get("pairs_known_from_training", {}).items():
        sys.stdout.write(f"{count} pairs of {name} are known from training and left out\n")
    sys.stdout.write(f"{record['pairs_across_splits']} pairs cross the cut and are in no split: {args.output}\n")


if __name__ == "__main__":
    main()
