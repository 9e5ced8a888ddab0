"""The same job on several systems: read a log of views, build related pairs, write them as Parquet.

Pairs are seen within seven days in either order, each user counts once for a pair, and of every note the ten best stay;
see `pairs.query` for the scores. What Polars and pandas run is how one would write it there for data that fits in
memory; ids become numbers in the order of the ids, which is both faster and breaks ties as this package does.

    python -m benchmarks.pair_systems --system polars --views views.parquet --output DIR --stages stages.json

is what `benchmarks.pairs` starts in a process of its own. A module is imported where it is used: the others' memory and
start are not what is measured.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

System = Literal["duckdb", "spark", "polars", "pandas"]
JobScore = Literal["count", "inverse_activity", "cosine", "lift"]

WINDOW_DAYS = 7
TOP_K = 10

_WINDOW_SECONDS = WINDOW_DAYS * 86_400
_WHOLE = 2**32  # fractions are summed as integers, or their sum would depend on the order of rows


@dataclass(frozen=True)
class Job:
    """What to do.

    Attributes:
        views: a Parquet file: user_id, note_id (string), timestamp (int64, seconds).
        output: a new folder of Parquet files: note_id, related_note_id (string), score (float64), rank (from 1).
        score: how a pair scores.
        min_count: users who must have seen a pair.
        memory_gb: memory that the engine may take (duckdb, spark), in 10^9 bytes.
        cores: processor cores to use.
        temp_dir: for intermediate tables.
    """

    views: str
    output: str
    score: JobScore
    min_count: int
    memory_gb: float
    cores: int
    temp_dir: str


class Stages:
    """Seconds between the ends of the named stages of a job."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        """Says that `name` is what was done since the last stage ended."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def run_package(engine_name: Literal["duckdb", "spark"], job: Job) -> dict[str, float]:
    """This package, on one of its engines. Returns the seconds of each stage."""
    from pairs.engines import connect
    from pairs.query import PairOptions, count_pairs, name_pairs, rank_pairs
    from pairs.views import read_views

    options = PairOptions(window_days=WINDOW_DAYS, top_k=TOP_K, score=job.score, min_count=job.min_count)
    master = f"local[{job.cores}]" if engine_name == "spark" else None
    with connect(engine_name, memory_gb=job.memory_gb, temp_dir=job.temp_dir, spark_master=master) as engine:
        stages = Stages()
        log = read_views(engine, job.views).log
        stages.end("reading")
        counted = count_pairs(log, options, engine)
        stages.end("counting")
        ranked = rank_pairs(counted, log, options, engine)
        stages.end("ranking")
        engine.write_folder(name_pairs(ranked, log), job.output)
        stages.end("writing")
    return stages.seconds


def run_polars(job: Job) -> dict[str, float]:
    """Polars, lazy and streaming where it can. Returns the seconds of each stage."""
    import polars as pl

    stages = Stages()
    raw = pl.scan_parquet(job.views).select("user_id", "note_id", "timestamp").unique()
    notes = raw.select("note_id").unique().sort("note_id").with_row_index("note").collect(engine="streaming")
    people = raw.select("user_id").unique().with_row_index("person").collect(engine="streaming")
    numbered = raw.join(notes.lazy(), on="note_id").join(people.lazy(), on="user_id")
    views = numbered.select("person", "note", "timestamp").collect(engine="streaming").lazy()
    viewed = views.select("person", "note").unique()
    activity = viewed.group_by("person").agg(activity=pl.len())
    users = viewed.group_by("note").agg(users=pl.len())
    stages.end("reading")

    seen = (
        views.join(views, on="person", suffix="_b")
        .filter(pl.col("note") < pl.col("note_b"))
        .filter((pl.col("timestamp") - pl.col("timestamp_b")).abs() <= _WINDOW_SECONDS)
        .select("person", "note", related="note_b")
        .unique()
    )
    aggregates = {"count": pl.len().cast(pl.Int64)}
    if job.score == "inverse_activity":
        weights = activity.select("person", weight=(_WHOLE / pl.col("activity")).floor().cast(pl.Int64))
        seen, aggregates["weight"] = seen.join(weights, on="person"), pl.col("weight").sum()
    counted = seen.group_by("note", "related").agg(**aggregates).filter(pl.col("count") >= job.min_count)
    one_way = counted.collect(engine="streaming").lazy()
    stages.end("counting")

    pairs = pl.concat([one_way, one_way.rename({"note": "related", "related": "note"})], how="diagonal")
    if job.score in ("cosine", "lift"):
        pairs = pairs.join(users.rename({"users": "users_a"}), on="note")
        pairs = pairs.join(users.rename({"note": "related", "users": "users_b"}), on="related")
    count, users_a, users_b = pl.col("count").cast(pl.Float64), pl.col("users_a"), pl.col("users_b")
    score = {
        "count": count,
        "inverse_activity": pl.col("weight") / _WHOLE,
        "cosine": count / (users_a.cast(pl.Int64) * users_b.cast(pl.Int64)).sqrt(),
        "lift": count * people.height / (users_a.cast(pl.Float64) * users_b.cast(pl.Float64)),
    }[job.score]
    best = (
        pairs.select("note", "related", "count", score=score)
        .sort("note", "score", "count", "related", descending=[False, True, True, False])
        .with_columns(rank=pl.int_range(1, pl.len() + 1).over("note"))
        .filter(pl.col("rank") <= TOP_K)
        .collect(engine="streaming")
    )
    stages.end("ranking")
    related = notes.rename({"note": "related", "note_id": "related_note_id"})
    named = best.join(notes, on="note").join(related, on="related")
    named = named.sort("note", "rank").select("note_id", "related_note_id", "score", "rank")
    Path(job.output).mkdir(parents=True)
    named.write_parquet(Path(job.output) / "part-0.parquet")
    stages.end("writing")
    return stages.seconds


def run_pandas(job: Job) -> dict[str, float]:
    """pandas. Returns the seconds of each stage."""
    import pandas as pd

    stages = Stages()
    views = pd.read_parquet(job.views, columns=["user_id", "note_id", "timestamp"]).drop_duplicates()
    notes, note_ids = pd.factorize(views["note_id"], sort=True)
    people, user_ids = pd.factorize(views["user_id"])
    views = pd.DataFrame({"person": people, "note": notes, "timestamp": views["timestamp"].to_numpy()})
    views = views.astype({"person": "int32", "note": "int32"})
    viewed = views[["person", "note"]].drop_duplicates()
    stages.end("reading")

    seen = views.merge(views, on="person", suffixes=("", "_b"))
    seen = seen[seen["note"] < seen["note_b"]]
    seen = seen[(seen["timestamp"] - seen["timestamp_b"]).abs() <= _WINDOW_SECONDS]
    seen = seen[["person", "note", "note_b"]].rename(columns={"note_b": "related"}).drop_duplicates()
    seen["weight"] = _WHOLE // seen["person"].map(viewed["person"].value_counts())
    counted = seen.groupby(["note", "related"], sort=False, as_index=False).agg(
        count=("weight", "size"), weight=("weight", "sum")
    )
    counted = counted[counted["count"] >= job.min_count]
    stages.end("counting")

    pairs = pd.concat([counted, counted.rename(columns={"note": "related", "related": "note"})], ignore_index=True)
    users = viewed["note"].value_counts()
    users_a, users_b = pairs["note"].map(users), pairs["related"].map(users)
    if job.score == "count":
        pairs["score"] = pairs["count"].astype("float64")
    elif job.score == "inverse_activity":
        pairs["score"] = pairs["weight"] / _WHOLE
    elif job.score == "cosine":
        pairs["score"] = pairs["count"] / (users_a * users_b) ** 0.5
    else:
        pairs["score"] = pairs["count"] * float(len(user_ids)) / (users_a.astype("float64") * users_b)
    best = pairs.sort_values(["note", "score", "count", "related"], ascending=[True, False, False, True])
    best = best.groupby("note", sort=False).head(TOP_K)
    best = best.assign(rank=best.groupby("note").cumcount() + 1)
    stages.end("ranking")
    named = pd.DataFrame(
        {
            "note_id": note_ids[best["note"]],
            "related_note_id": note_ids[best["related"]],
            "score": best["score"].to_numpy(),
            "rank": best["rank"].to_numpy(),
        }
    )
    Path(job.output).mkdir(parents=True)
    named.to_parquet(Path(job.output) / "part-0.parquet", index=False)
    stages.end("writing")
    return stages.seconds


RUNNERS: dict[System, Callable[[Job], dict[str, float]]] = {
    "duckdb": lambda job: run_package("duckdb", job),
    "spark": lambda job: run_package("spark", job),
    "polars": run_polars,
    "pandas": run_pandas,
}


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pair_systems", description="One job on one system.")
    parser.add_argument("--system", choices=get_args(System), required=True, help="what computes")
    parser.add_argument("--views", required=True, help="Parquet file of views")
    parser.add_argument("--output", required=True, help="new folder for the pairs")
    parser.add_argument("--stages", required=True, help="JSON file to write: seconds of each stage")
    parser.add_argument("--score", choices=get_args(JobScore), default="count", help="how a pair scores")
    parser.add_argument("--min-count", type=int, default=1, help="drop pairs that fewer users saw")
    parser.add_argument("--memory-gb", type=float, default=4.0, help="memory for tables (duckdb, spark)")
    parser.add_argument("--cores", type=int, default=2, help="processor cores to use")
    parser.add_argument("--temp-dir", required=True, help="for intermediate tables")
    args = parser.parse_args(argv)
    if hasattr(os, "sched_setaffinity"):  # holds for all threads and children to come, Spark's Java among them
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    job = Job(args.views, args.output, args.score, args.min_count, args.memory_gb, args.cores, args.temp_dir)
    seconds = RUNNERS[args.system](job)
    Path(args.stages).write_text(json.dumps(seconds), encoding="utf-8")


if __name__ == "__main__":
    main()
