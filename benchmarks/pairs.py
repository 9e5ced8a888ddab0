"""Time and memory of building related pairs: this package on DuckDB and on Spark, next to Polars and pandas.

    python -m benchmarks.pairs --views 1e6 1e7 --systems duckdb spark polars pandas --repeat 3 --output pairs.json

Simulated logs (`benchmarks.view_log`) are written first, and kept for the next time. Every run has a process of its own
(`benchmarks.pair_systems`), systems take turns, and all must give the same pairs, or the benchmark fails. A system that
needs more memory or time than there is, is reported as such, and spared the larger logs.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import get_args

import duckdb
import psutil
from tqdm.auto import tqdm

from benchmarks.measure import Limits, Usage, facts_text, measure
from benchmarks.pair_systems import JobScore, System
from benchmarks.view_log import LogShape, generate_log
from evaluation.report import collect_facts

_ROOT = Path(__file__).resolve().parents[1]


class DifferentPairsError(Exception):
    """Two systems gave different pairs for the same views."""


@dataclass(frozen=True)
class Run:
    """One run of one system on one log.

    Attributes:
        system: what computed.
        views: rows of the log.
        usage: what it took, or why there is no result.
        stages: seconds of its stages; what is missing to `usage.seconds` is the start of the process and its end.
        pairs: rows of the result.
    """

    system: System
    views: int
    usage: Usage
    stages: dict[str, float]
    pairs: int | None


def count_different(output: Path, expected: Path) -> int:
    """Rows of two folders of pairs that differ: in the related note of a note and rank, or in the score.

    Scores may differ by 1e-12 of their value: systems are free to divide and to take roots in another order.
    """
    return _fetch_number(
        "SELECT count(*) FROM read_parquet(?) AS a FULL JOIN read_parquet(?) AS b USING (note_id, rank) WHERE "
        "a.related_note_id IS DISTINCT FROM b.related_note_id OR NOT abs(a.score - b.score) <= 1e-12 * b.score",
        [f"{output}/*.parquet", f"{expected}/*.parquet"],
    )


def count_rows(output: Path) -> int:
    """Rows of a folder of pairs."""
    return _fetch_number("SELECT count(*) FROM read_parquet(?)", [f"{output}/*.parquet"])


def _fetch_number(query: str, parameters: list[str]) -> int:
    with duckdb.connect() as db:
        [(number,)] = db.execute(query, parameters).fetchall()
    return int(number)


def run_system(
    system: System, log: Path, output: Path, args: argparse.Namespace, limits: Limits
) -> tuple[Usage, dict[str, float]]:
    """Runs one job in a new process, with a temporary folder that is gone afterwards.

    Args:
        system: what computes.
        log: Parquet file of views.
        output: new folder for the pairs.
        args: score, min_count, memory_gb, cores, temp_dir.
        limits: what ends it.

    Returns:
        What it took, and the seconds of its stages ({} where there is no result).
    """
    with tempfile.TemporaryDirectory(prefix="notellm2-benchmark-", dir=args.temp_dir) as folder:
        stages, temp_dir = Path(folder) / "stages.json", Path(folder) / "temporary"
        temp_dir.mkdir()
        command = [sys.executable, "-m", "benchmarks.pair_systems", "--system", system, "--views", str(log)]
        command += ["--output", str(output), "--stages", str(stages), "--temp-dir", str(temp_dir)]
        command += ["--score", args.score, "--min-count", str(args.min_count)]
        command += ["--memory-gb", str(args.memory_gb), "--cores", str(args.cores)]
        usage = measure(command, temp_dir, limits, cwd=_ROOT)
        return usage, {} if usage.failure else json.loads(stages.read_text(encoding="utf-8"))


def run_all(args: argparse.Namespace) -> list[Run]:
    """Runs every system on every log; `args` as from `main`'s options.

    Raises:
        DifferentPairsError: two systems, or two runs of one, do not agree.
    """
    limits = Limits(args.memory_limit_gb, args.time_limit_s)
    runs: list[Run] = []
    failed: dict[System, Run] = {}
    for views in sorted(args.views):
        log = generate_log(LogShape(views, args.exponent, args.seed), args.data)
        if args.generate_only:
            continue
        with tempfile.TemporaryDirectory(prefix="notellm2-benchmark-", dir=args.temp_dir) as folder:
            expected: tuple[System, Path] | None = None
            turns = [(repeat, system) for repeat in range(args.repeat) for system in args.systems]
            bar = tqdm(turns, desc=f"{views:,} views", unit="run")
            for repeat, system in bar:
                bar.set_postfix(system=system)
                if system in failed:
                    if failed[system].views < views and repeat == 0:
                        why = f"not tried: {failed[system].usage.failure} at {failed[system].views:,} views"
                        runs.append(Run(system, views, Usage(0.0, 0.0, 0.0, why), {}, None))
                    continue
                output = Path(folder) / f"{system}-{repeat}"
                usage, stages = run_system(system, log, output, args, limits)
                if usage.failure:
                    failed[system] = Run(system, views, usage, {}, None)
                    runs.append(failed[system])
                    continue
                runs.append(Run(system, views, usage, stages, count_rows(output)))
                if expected is None:
                    expected = system, output
                elif different := count_different(output, expected[1]):
                    raise DifferentPairsError(
                        f"{system} and {expected[0]} differ in {different:,} of the pairs of {views:,} views."
                    )
    return runs


def markdown_table(runs: Sequence[Run]) -> str:
    """A line for each log and system, with medians over its runs."""
    heads = ["Views", "System", "Runs", "Time (s)", "µs a view", "Peak memory (GB)", "Peak disk (GB)", "Pairs"]
    heads.append("Stages (s)")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for views, system in dict.fromkeys((run.views, run.system) for run in runs):
        same = [run for run in runs if (run.views, run.system) == (views, system)]
        failures = [run.usage.failure for run in same if run.usage.failure]
        cells = [f"{views:,}", system, str(len(same))]
        if failures:
            cells += [failures[0].replace("|", "\\|"), *[""] * (len(heads) - 4)]
        else:
            seconds = median(run.usage.seconds for run in same)
            cells += [f"{seconds:.1f}", f"{seconds / views * 1e6:.2f}"]
            cells.append(f"{median(run.usage.peak_memory_gb for run in same):.2f}")
            cells.append(f"{median(run.usage.peak_disk_gb for run in same):.2f}")
            stages = {name: median(run.stages[name] for run in same) for name in same[0].stages}
            rest = median(run.usage.seconds - sum(run.stages.values()) for run in same)
            cells.append(f"{same[0].pairs:,}")
            cells.append(", ".join(f"{name} {value:.1f}" for name, value in [("starting", rest), *stages.items()]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _collect_facts(args: argparse.Namespace) -> dict[str, object]:
    packages = {"duckdb": ("duckdb",), "spark": ("pyspark",), "polars": ("polars",), "pandas": ("pandas", "pyarrow")}
    facts = collect_facts(score=args.score, min_count=args.min_count, exponent=args.exponent, seed=args.seed)
    names = sorted({"ibis-framework", *(name for system in args.systems for name in packages[system])})
    facts["versions"] = {"python": facts["versions"]["python"], **{name: version(name) for name in names}}
    facts["hardware"]["memory"] = f"{psutil.virtual_memory().total / 1e9:.0f} GB"
    facts["limits"] = {
        "cores used": args.cores,
        "memory for the engine's tables": f"{args.memory_gb:g} GB",
        "memory of all processes": f"{args.memory_limit_gb:g} GB",
        "time": f"{args.time_limit_s:g} s",
    }
    return facts


def whole_number(text: str) -> int:
    """The type of an option that takes 1e6 for a million."""
    number = float(text)
    if number != int(number):
        raise argparse.ArgumentTypeError(f"{text}: give a whole number, such as 1e6.")
    return int(number)


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pairs",
        description="Time and memory of building related pairs from simulated views, on several systems.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    logs = parser.add_argument_group("simulated logs")
    logs.add_argument(
        "--views",
        type=whole_number,
        nargs="+",
        default=[1_000_000],
        help="views of each log, multiples of 100: 50 a user over four weeks, and a note for every 100",
    )
    logs.add_argument(
        "--exponent", type=float, default=1.0, help="of the power law: the note of rank r has r^-EXPONENT as many views"
    )
    logs.add_argument("--seed", type=int, default=0, help="another seed gives other logs")
    logs.add_argument(
        "--data", default=str(Path(tempfile.gettempdir()) / "notellm2-benchmarks"), help="folder that keeps the logs"
    )
    logs.add_argument("--generate-only", action="store_true", help="write the logs, and stop")
    job = parser.add_argument_group("the job")
    job.add_argument("--systems", nargs="+", choices=get_args(System), default=["duckdb"], help="what computes")
    job.add_argument("--score", choices=get_args(JobScore), default="count", help="how a pair scores, see pairs.build")
    job.add_argument("--min-count", type=int, default=1, help="drop pairs that fewer users saw")
    job.add_argument(
        "--memory-gb",
        type=float,
        default=4.0,
        help="memory for tables of duckdb and spark (10^9 bytes); others take all",
    )
    job.add_argument("--cores", type=int, default=2, help="processor cores that each system may use")
    job.add_argument("--temp-dir", help="for intermediate tables and results (default: this machine's)")
    measured = parser.add_argument_group("the measurement")
    measured.add_argument("--repeat", type=int, default=1, help="runs of each system, in turns; the table has medians")
    measured.add_argument(
        "--memory-limit-gb", type=float, default=16.0, help="stop a run that takes more, all its processes together"
    )
    measured.add_argument("--time-limit-s", type=float, default=3600.0, help="stop a run that takes longer")
    measured.add_argument("--output", help="JSON file to write: every run, and what one must know to repeat it")
    args = parser.parse_args(argv)
    args.systems = list(dict.fromkeys(args.systems))
    try:
        if args.repeat < 1:
            raise ValueError(f"repeat={args.repeat}: give 1 or more.")
        runs = run_all(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except DifferentPairsError as error:
        parser.exit(1, f"{error} Nothing was measured.\n")
    if args.generate_only:
        return
    facts = _collect_facts(args)
    if args.output:
        content = {"facts": facts, "runs": [asdict(run) for run in runs]}
        Path(args.output).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(f"{markdown_table(runs)}\n\n{facts_text(facts)}\n")


if __name__ == "__main__":
    main()
