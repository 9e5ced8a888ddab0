"""Related pairs from views: two notes that the same users view within a week are related (NoteLLM-2, data set).

The query, which DuckDB runs in this process, has five steps:

1. a view is (user, note, second); exact repetitions are dropped;
2. the views of each user are joined with themselves: a user saw (a, b) who viewed both within the window;
3. each user counts once for (a, b), however often they saw it;
4. a score is made of the count; low counts and low scores are dropped;
5. of every a the k best b are kept, best first.

    python -m pairs.build --views views.csv --output pairs.parquet --score cosine --min-count 2
"""

import argparse
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from pairs.files import to_arrow
from pairs.tables import load_notes, load_views, write_table

Direction = Literal["forward", "both"]
Score = Literal["count", "cosine"]

SECONDS_PER_DAY = 86_400

# What a user must have done with a and b. Both bounds are inclusive. Times are whole seconds: two views in one second
# have no known order, so "forward" counts them both ways.
_SEEN: dict[Direction, str] = {
    "forward": "b.timestamp - a.timestamp BETWEEN 0 AND $window",
    "both": "abs(b.timestamp - a.timestamp) <= $window",
}

# users_a and users_b are the distinct users who viewed a and b, at any time and with any other note.
_SCORE: dict[Score, str] = {
    "count": "count::DOUBLE",
    "cosine": "count / sqrt(users_a * users_b)",
}

# Ids become integers, notes in the order of their ids, because the self-join makes very many rows.
_QUERY = """
WITH notes AS (
    SELECT note_id, row_number() OVER (ORDER BY note_id) AS note, count(DISTINCT user_id) AS users
    FROM views GROUP BY note_id
),
users AS (SELECT user_id, row_number() OVER (ORDER BY user_id) AS person FROM views GROUP BY user_id),
viewed AS (
    SELECT DISTINCT person, note, timestamp
    FROM views JOIN notes USING (note_id) JOIN users USING (user_id) SEMI JOIN eligible USING (note_id)
),
seen AS (
    SELECT DISTINCT a.person, a.note AS a, b.note AS b
    FROM viewed a JOIN viewed b ON a.person = b.person AND a.note <> b.note AND {seen}
),
counted AS (SELECT a, b, count(*) AS count FROM seen GROUP BY a, b HAVING count(*) >= $min_count),
named AS (
    SELECT a.note_id, b.note_id AS related_note_id, count, a.users AS users_a, b.users AS users_b
    FROM counted JOIN notes a ON a.note = counted.a JOIN notes b ON b.note = counted.b
),
scored AS (SELECT note_id, related_note_id, count, {score} AS score FROM named),
ranked AS (
    SELECT *, row_number() OVER (PARTITION BY note_id ORDER BY score DESC, count DESC, related_note_id) AS rank
    FROM scored WHERE score >= $min_score
)
SELECT note_id, related_note_id, score, rank::INTEGER AS rank
FROM ranked WHERE rank <= $top_k ORDER BY note_id, rank
"""


@dataclass(frozen=True)
class PairOptions:
    """What makes two notes related.

    Attributes:
        window_days: a user must view both notes within this time, in days, bounds included.
        direction: "forward": (a, b) counts for a user who views b in the same second as a or later; "both": the order
            does not matter, and the counts are symmetric.
        score: "count": the number of distinct users (the paper's). "cosine": count / sqrt(users_a * users_b), Ochiai's
            coefficient, where users_x is the number of distinct users who viewed x; popular notes then do not win
            everywhere.
        min_score: pairs with a lower score are dropped.
        min_count: pairs seen by fewer distinct users are dropped.
        top_k: related notes kept of each note.
    """

    window_days: float = 7.0
    direction: Direction = "both"
    score: Score = "count"
    min_score: float = 0.0
    min_count: int = 1
    top_k: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.window_days < 100_000:  # also refuses nan
            raise ValueError(f"window_days={self.window_days}: give a number of days above 0 and below 100000.")
        for name, value, allowed in (("direction", self.direction, Direction), ("score", self.score, Score)):
            if value not in get_args(allowed):
                raise ValueError(f"{name}={value!r}: use one of {get_args(allowed)}.")
        if not self.min_score >= 0:
            raise ValueError(f"min_score={self.min_score}: give 0 or more.")
        for name, number in (("min_count", self.min_count), ("top_k", self.top_k)):
            if number < 1:
                raise ValueError(f"{name}={number}: give 1 or more.")


def build_pairs(
    views: Dataset,
    options: PairOptions,
    note_ids: Collection[str] | None = None,
    *,
    memory_gb: float = 4.0,
) -> Dataset:
    """Builds related pairs.

    Args:
        views: a table as from `pairs.tables.load_views`.
        options: what makes two notes related.
        note_ids: only pairs of these notes are built, and their top k is chosen among them; how many users viewed a
            note is still counted over all views. None: all notes that were viewed.
        memory_gb: memory the query may take, in 10^9 bytes; what does not fit is spilled to temporary files.

    Returns:
        note_id (string), related_note_id (string), score (float64), rank (int32, from 1), sorted by note_id and rank.
        Equal scores are ranked by count, then by related_note_id, so that the same views give the same table.

    Raises:
        ValueError: memory_gb is not above 0.
    """
    if not memory_gb > 0:
        raise ValueError(f"memory_gb={memory_gb}: give a number above 0.")
    table = to_arrow(views)
    eligible = pc.unique(table["note_id"]) if note_ids is None else pa.array(sorted(set(note_ids)), pa.string())
    with tempfile.TemporaryDirectory(prefix="notellm2-pairs-") as spill:
        settings: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": f"{memory_gb}GB",
            "temp_directory": spill,
        }
        with duckdb.connect(config=settings) as connection:
            connection.register("views", table)
            connection.register("eligible", pa.table({"note_id": eligible}))
            pairs = connection.sql(
                _QUERY.format(seen=_SEEN[options.direction], score=_SCORE[options.score]),
                params={
                    "window": int(options.window_days * SECONDS_PER_DAY),
                    "min_count": options.min_count,
                    "min_score": options.min_score,
                    "top_k": options.top_k,
                },
            ).to_arrow_table()
    return Dataset(pairs)


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds one option for every field of `PairOptions`, and `--memory-gb`."""
    group = parser.add_argument_group("what makes two notes related")
    default = PairOptions()
    group.add_argument(
        "--window-days", type=float, default=default.window_days, help="a user views both notes within these days"
    )
    group.add_argument(
        "--direction",
        choices=get_args(Direction),
        default=default.direction,
        help="forward: the related note is viewed after the note (or in the same second); both: in any order",
    )
    group.add_argument(
        "--score",
        choices=get_args(Score),
        default=default.score,
        help="count: distinct users; cosine: count / sqrt(users of the one * users of the other)",
    )
    group.add_argument("--min-score", type=float, default=default.min_score, help="drop pairs that score lower")
    group.add_argument("--min-count", type=int, default=default.min_count, help="drop pairs that fewer users saw")
    group.add_argument("--top-k", type=int, default=default.top_k, help="related notes to keep of each note")
    group.add_argument("--memory-gb", type=float, default=4.0, help="memory for the query; the rest spills to disk")


def pair_options(args: argparse.Namespace) -> PairOptions:
    """The `PairOptions` that the options of `add_pair_arguments` say."""
    names: dict[str, Any] = vars(args)
    return PairOptions(**{name: names[name] for name in PairOptions.__dataclass_fields__})


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = argparse.ArgumentParser(
        prog="python -m pairs.build",
        description="Build related pairs from views.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--views", required=True, help="table of views: user_id, note_id, timestamp")
    parser.add_argument("--notes", help="table of notes: build pairs of these only (default: of all notes viewed)")
    parser.add_argument("--output", required=True, help="pairs to write: .parquet, .csv or .jsonl")
    add_pair_arguments(parser)
    args = parser.parse_args(argv)
    try:
        options = pair_options(args)
        views = load_views(args.views)
        note_ids = load_notes(args.notes)["note_id"] if args.notes else None
        pairs = build_pairs(views, options, note_ids, memory_gb=args.memory_gb)
        write_table(pairs, args.output)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    users, notes = (len(pc.unique(to_arrow(views)[name])) for name in ("user_id", "note_id"))
    with_pairs = len(pc.unique(to_arrow(pairs)["note_id"]))
    sys.stdout.write(
        f"{len(views)} views of {notes} notes by {users} users ─► {len(pairs)} pairs of {with_pairs} notes"
        f" ({len(pairs) / max(with_pairs, 1):.2f} a note) in {args.output}\n"
    )


if __name__ == "__main__":
    main()
