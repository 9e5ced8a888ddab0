"""What building related pairs sends between Spark's machines, by step: docs/SCALE.md extrapolates from it.

    python -m benchmarks.spark_shuffle --views 1e5 1e6 --plans plans

Runs on a local master, whose event log tells what every stage read, shuffled and wrote. No table is broadcast unless
asked for: at the size that matters none is small enough, and a broadcast would hide a shuffle.
"""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.pairs import whole_number
from benchmarks.view_log import LogShape, generate_log
from pairs.engines import connect
from pairs.query import PairOptions, count_pairs, name_pairs, rank_pairs
from pairs.views import read_views

STEPS = ("reading", "counting", "ranking", "writing")

# Sums over the tasks of a stage, as the event log calls them.
_METRICS = {
    "shuffle_bytes": "internal.metrics.shuffle.write.bytesWritten",
    "shuffle_rows": "internal.metrics.shuffle.write.recordsWritten",
    "stored_bytes": "internal.metrics.output.bytesWritten",
    "spilled_bytes": "internal.metrics.diskBytesSpilled",
    "task_ms": "internal.metrics.executorRunTime",
}


def run(log: Path, events: Path, options: PairOptions, cores: int, memory_gb: float, broadcast: bool) -> dict[str, int]:
    """Builds the pairs of a log on a local Spark that writes its event log.

    Args:
        log: Parquet file of views.
        events: folder for the event log.
        options: what makes two notes related.
        cores: threads of Spark.
        memory_gb: memory of its process, in 10^9 bytes.
        broadcast: whether small tables may be sent whole to every machine.

    Returns:
        encounters: pairs of notes that a user viewed, at any times; counted: rows that are ranked, both ways.
    """
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master(f"local[{cores}]").appName("notellm2-shuffle")
    settings = {
        "spark.driver.memory": f"{int(memory_gb * 1000)}m",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.eventLog.enabled": "true",
        "spark.eventLog.dir": events.as_uri(),
        "spark.eventLog.compress": "false",
        "spark.sql.shuffle.partitions": "8",
        "spark.sql.maxPlanStringLength": "1000000",
    }
    if not broadcast:
        settings["spark.sql.autoBroadcastJoinThreshold"] = "-1"
    for name, value in settings.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    describe = session.sparkContext.setJobDescription
    try:
        with connect("spark", spark_session=session) as engine, tempfile.TemporaryDirectory() as folder:
            describe("reading")
            views = read_views(engine, str(log)).log
            describe("counting")
            counted = count_pairs(views, options, engine)
            describe("ranking")
            ranked = rank_pairs(counted, views, options, engine)
            describe("writing")
            engine.write_folder(name_pairs(ranked, views), f"{folder}/pairs")
            describe("looking")
            rows = engine.fetch(counted.aggregate(rows=counted.count()))["rows"][0].as_py()
            return {"encounters": views.encounters, "counted": int(rows)}
    finally:
        session.stop()


def sum_by_step(lines: Iterable[str]) -> dict[str, dict[str, int]]:
    """The metrics of `_METRICS` of each step, from the lines of an event log."""
    step_of: dict[int, str] = {}
    sums: dict[str, dict[str, int]] = {step: dict.fromkeys(_METRICS, 0) for step in STEPS}
    for line in lines:
        event = json.loads(line)
        if event["Event"] == "SparkListenerJobStart":
            step = event["Properties"].get("spark.job.description", "")
            step_of |= {stage: step for stage in event["Stage IDs"]}
        elif event["Event"] == "SparkListenerStageCompleted":
            stage = event["Stage Info"]
            found = {entry["Name"]: entry["Value"] for entry in stage["Accumulables"]}
            step = step_of.get(stage["Stage ID"], "")
            if step in sums:
                for name, metric in _METRICS.items():
                    sums[step][name] += int(found.get(metric, 0))
    return sums


def final_plans(lines: Iterable[str]) -> list[tuple[str, str]]:
    """Step and physical plan of every query, as it was run in the end."""
    plans: dict[int, tuple[str, str]] = defaultdict(lambda: ("", ""))
    for line in lines:
        event: dict[str, Any] = json.loads(line)
        kind = event["Event"].rsplit(".", 1)[-1]
        if kind == "SparkListenerSQLExecutionStart":
            plans[event["executionId"]] = event.get("description") or "", event["physicalPlanDescription"]
        elif kind == "SparkListenerSQLAdaptiveExecutionUpdate":
            plans[event["executionId"]] = plans[event["executionId"]][0], event["physicalPlanDescription"]
    return [plans[number] for number in sorted(plans)]


def _lines_of(events: Path) -> list[str]:
    files = [
        path for path in sorted(events.rglob("*")) if path.is_file() and not path.name.startswith((".", "appstatus"))
    ]
    return [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]


def markdown_table(views: int, found: dict[str, int], sums: dict[str, dict[str, int]]) -> str:
    """A line for each step: bytes, also for each view and for each encounter."""
    heads = ["Step", "Shuffled (MB)", "Rows shuffled", "B a view", "B an encounter", "Stored (MB)", "Spilled (MB)"]
    heads.append("Task time (s)")
    lines = [
        f"{views:,} views, {found['encounters']:,} encounters, {found['counted']:,} counted pairs (both ways):",
        "",
    ]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    total = {name: sum(sums[step][name] for step in STEPS) for name in _METRICS}
    for step, row in [*sums.items(), ("all", total)]:
        shuffled = row["shuffle_bytes"]
        cells = [step, f"{shuffled / 1e6:.1f}", f"{row['shuffle_rows']:,}", f"{shuffled / views:.1f}"]
        cells += [f"{shuffled / found['encounters']:.2f}", f"{row['stored_bytes'] / 1e6:.1f}"]
        cells += [f"{row['spilled_bytes'] / 1e6:.1f}", f"{row['task_ms'] / 1e3:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.spark_shuffle",
        description="Bytes that Spark shuffles and stores, by step, from its event log.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--views", type=whole_number, nargs="+", default=[100_000], help="views of each log")
    parser.add_argument("--exponent", type=float, default=1.0, help="of the power law, see benchmarks.pairs")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other logs")
    parser.add_argument(
        "--data", default=str(Path(tempfile.gettempdir()) / "notellm2-benchmarks"), help="folder that keeps the logs"
    )
    parser.add_argument("--min-count", type=int, default=1, help="drop pairs that fewer users saw")
    parser.add_argument("--cores", type=int, default=2, help="threads of Spark")
    parser.add_argument("--memory-gb", type=float, default=2.0, help="memory of Spark's process, in 10^9 bytes")
    parser.add_argument("--broadcast", action="store_true", help="let Spark broadcast small tables")
    parser.add_argument("--plans", help="folder for the physical plans as they were run")
    args = parser.parse_args(argv)
    options = PairOptions(min_count=args.min_count)
    for views in args.views:
        log = generate_log(LogShape(views, args.exponent, args.seed), args.data)
        with tempfile.TemporaryDirectory() as folder:
            found = run(log, Path(folder), options, args.cores, args.memory_gb, args.broadcast)
            lines = _lines_of(Path(folder))
        sys.stdout.write(markdown_table(views, found, sum_by_step(lines)) + "\n\n")
        if args.plans:
            path = Path(args.plans) / f"plans-{views}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n\n".join(f"### {step}\n{plan}" for step, plan in final_plans(lines)), encoding="utf-8")


if __name__ == "__main__":
    main()
