"""Related pairs from views: two notes that the same users view within a week are related (NoteLLM-2, data set).

    python -m pairs.build --views views.csv --output pairs.parquet --score cosine --min-count 2
    python -m pairs.build --views s3a://logs/views --output s3a://logs/pairs --engine spark --temp-dir hdfs:///tmp

`pairs.views` says which views count, `pairs.query` what makes two notes related, `pairs.engines` where it is computed.
"""

import argparse
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

import pyarrow as pa
from datasets import Dataset
from ibis import _

from pairs.command import CommandParser, interruption_said
from pairs.disk import alone_at
from pairs.engines import Engine, EngineName, connect
from pairs.files import refuse_unwritable
from pairs.options import add_options, parsed_options
from pairs.query import PairOptions, count_pairs, name_pairs, rank_pairs, related_pairs
from pairs.tables import ANYWHERE, load_notes, write_table
from pairs.views import RULES, ViewOptions, broken_rules_text, list_offenders, read_views


def build_pairs(
    views: str | Path | Dataset | pa.Table,
    options: PairOptions,
    note_ids: Iterable[str] | None = None,
    *,
    view_options: ViewOptions | None = None,
    engine: Engine | None = None,
) -> Dataset:
    """Builds related pairs into memory.

    Args:
        views: a path or URL, or a table in memory, with a user's id, a note's id and a time in each row.
        options: what makes two notes related.
        note_ids: only pairs of these notes are built, and their top k is chosen among them; how many users viewed a
            note and how many notes a user viewed is still counted over all views. None: all notes that were viewed.
        view_options: where `views` has them, and which of them count; None: the defaults.
        engine: what computes; None: DuckDB with its defaults.

    Returns:
        note_id (string), related_note_id (string), score (float64), rank (int32, from 1), sorted by note_id and rank.
        Equal scores are ranked by count, then by related_note_id, so that the same views give the same table.

    Raises:
        FileNotFoundError: nothing is at `views`.
        ValueError: see `pairs.views.read_views`.
    """
    if engine is None:
        with connect() as engine:
            return build_pairs(views, options, note_ids, view_options=view_options, engine=engine)
    log = read_views(engine, views, view_options).log
    eligible = None
    if note_ids is not None:
        wanted = engine.from_arrow(pa.table({"note_id": pa.array(sorted(set(note_ids)), pa.string())}))
        eligible = log.notes.semi_join(wanted, "note_id").select("note")
    return Dataset(engine.fetch(related_pairs(log, options, engine, eligible)))


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `opened_engine` reads."""
    group = parser.add_argument_group("where it is computed")
    group.add_argument("--engine", choices=get_args(EngineName), default="duckdb", help="duckdb: in this process")
    group.add_argument("--spark-master", help="where Spark runs, such as local[8] or yarn (default: as configured)")
    group.add_argument(
        "--memory-gb", type=float, default=4.0, help="memory for tables; what is beyond goes to disk (not on a cluster)"
    )
    group.add_argument(
        "--temp-dir", help="for intermediate tables (default: this machine's; a cluster needs one that all reach)"
    )


def opened_engine(args: argparse.Namespace) -> Engine:
    """The engine that the options of `add_engine_options` say; errors as in `pairs.engines.connect`."""
    return connect(
        args.engine,
        memory_gb=args.memory_gb,
        temp_dir=args.temp_dir,
        spark_master=args.spark_master,
        show_progress=True,
    )


def add_view_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `parsed_view_options` reads."""
    add_options(parser, ViewOptions, "which views count")
    parser.add_argument("--strict", action="store_true", help=f"refuse all bad rows: --refuse {' '.join(RULES)}")


def parsed_view_options(args: argparse.Namespace) -> ViewOptions:
    """The `ViewOptions` that the options of `add_view_options` say."""
    if args.strict:
        args.refuse = tuple(RULES)
    return parsed_options(args, ViewOptions)


@interruption_said("the pairs were not written; give the same command to begin again.")
def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = CommandParser(
        prog="python -m pairs.build",
        description="Build related pairs from views.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--views", required=True, help="log of views: a file, a pattern, a folder (also day=…/) or a URL such as s3://…"
    )
    parser.add_argument("--notes", help="table of notes: build pairs of these only, views of others being unknown_note")
    parser.add_argument(
        "--output", required=True, help="pairs to write: .parquet, .csv or .jsonl, or a new folder of Parquet files"
    )
    parser.add_argument("--offenders", help="write the rows that broke a rule here, with file and row (.parquet, …)")
    add_options(parser, PairOptions, "what makes two notes related")
    add_view_options(parser)
    add_engine_options(parser)
    args = parser.parse_args(argv)
    in_one_file = bool(Path(args.output).suffix)
    try:
        options, view_options = parsed_options(args, PairOptions), parsed_view_options(args)
        note_ids = load_notes(args.notes, ANYWHERE)["note_id"] if args.notes else None
        # Before the work, not after it.
        for path in [args.output] * in_one_file + [args.offenders] * bool(args.offenders):
            refuse_unwritable(path)
        # DuckDB has a folder for itself while it writes it, and so has an object store.
        place = alone_at(args.output) if in_one_file else nullcontext()
        with place, opened_engine(args) as engine:
            if not in_one_file:
                engine.refuse_existing(args.output)
            views = read_views(engine, args.views, view_options, note_ids)
            sys.stdout.write(broken_rules_text(views, view_options) + "\n")
            if args.offenders:
                write_table(Dataset(engine.fetch(list_offenders(views))), args.offenders)
            ranked = rank_pairs(count_pairs(views.log, options, engine), views.log, options, engine)
            pairs = name_pairs(ranked, views.log)
            if in_one_file:
                write_table(Dataset(engine.fetch(pairs)), args.output)
            else:
                engine.write_folder(pairs, args.output)
            viewed = views.log.notes.filter(_.users > 0)
            notes, rows, with_pairs = (engine.count(table) for table in (viewed, ranked, ranked.filter(_.rank == 1)))
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    sys.stdout.write(
        f"{views.kept:,} views of {notes:,} notes by {views.log.num_users:,} users ─► {rows:,} pairs of "
        f"{with_pairs:,} notes ({rows / max(with_pairs, 1):.2f} a note) in {args.output}\n"
    )


if __name__ == "__main__":
    main()
