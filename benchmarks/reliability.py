"""How the package stands bad input, faults and attack: the figures of docs/THREATS.md.

    python -m benchmarks.reliability [--faults 48] [--texts 2000] [--images 2000] [--seed 0] [--time-limit-s 3600]
        [--output DIR]

Hostile texts and images are those of benchmarks/attacks.py, faults those of benchmarks/faults.py; of these, --faults is
the number of kill −9, and of full disks, killed workers, damaged files and second runs there are as many as
`benchmarks.faults.plan` says. The exit status is 1 if anything came out wrong, was lost or ended without a named error.
With --output, reliability.json and reliability.md are written there, and what went wrong is in the first.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from benchmarks.attacks import Tally, attack_images, attack_texts
from benchmarks.faults import SECONDS_AT_MOST, FaultBench, Outcome, can_mount, inject, plan
from evaluation.report import collect_facts
from pairs.disk import new_file

NAMES = {
    "kill": "kill −9",
    "disk": "full disk",
    "worker": "killed worker process",
    "damage": "damaged file",
    "twice": "second run at once",
}


@dataclass
class Row:
    """A line of the table.

    Attributes:
        what: kind of input or fault.
        tried, planned: how many were tried, of how many.
        wrong, lost, unnamed: results that are wrong, notes that are lost, exceptions without a name.
        largest_difference: of a number of an embedding that should be equal.
        worst_seconds: of one input, or of the restart after a fault.
        peak_megabytes: that the process which read the inputs ever had resident; 0 for faults, which hit others.
        faults: what was wrong, in words.
    """

    what: str
    planned: int
    tried: int = 0
    wrong: int = 0
    lost: int = 0
    unnamed: int = 0
    largest_difference: float = 0.0
    worst_seconds: float = 0.0
    peak_megabytes: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether all that must be 0 is."""
        return not (self.wrong or self.lost or self.unnamed)

    def add(self, outcome: Outcome) -> None:
        """One fault more."""
        self.tried += 1
        self.wrong += len(outcome.wrong)
        self.lost += outcome.lost
        self.unnamed += len(outcome.unnamed)
        self.largest_difference = max(self.largest_difference, outcome.largest_difference)
        self.worst_seconds = max(self.worst_seconds, outcome.seconds)
        if not outcome.is_good:
            self.faults.append(f"{outcome.job}, {outcome.what}: {[*outcome.wrong, *outcome.unnamed]}")


def row_of(what: str, planned: int, tally: Tally) -> Row:
    """The line of an attack."""
    names = ("wrong", "lost", "unnamed", "largest_difference", "worst_seconds", "peak_megabytes")
    return Row(what, planned, tally.inputs, faults=list(tally.faults), **{name: getattr(tally, name) for name in names})


def table(rows: Sequence[Row], facts: dict[str, Any], seed: int) -> str:
    """The figures as Markdown."""
    lines = [
        "| What | Tried | Wrong results | Lost notes | Unnamed exceptions | Largest difference | Slowest, s | "
        "Peak, MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        tried = f"{row.tried:,}" if row.tried == row.planned else f"{row.tried:,} of {row.planned:,}"
        lines.append(
            f"| {row.what} | {tried} | {row.wrong} | {row.lost} | {row.unnamed} | {row.largest_difference:.0e} | "
            f"{row.worst_seconds:.1f} | {f'{row.peak_megabytes:,.0f}' if row.peak_megabytes else ''} |"
        )
    disk = "a small tmpfs and a limit on file sizes" if can_mount() else "a limit on file sizes"
    lines.append(f"\nCommit {facts.get('commit')}, seed {seed}, {os.cpu_count()} processors; full disks by {disk}.")
    return "\n".join(lines) + "\n"


def measure(texts: int, images: int, faults: int, seed: int, time_limit: float, folder: Path) -> list[Row]:
    """Tries all of it, and shows how far it is.

    Args:
        texts, images, faults: how many; see the top of this file.
        seed: of all that is drawn.
        time_limit: seconds after which nothing more is begun.
        folder: for what is made meanwhile.
    """
    end = time.monotonic() + time_limit

    def left() -> float:
        return max(0.0, end - time.monotonic())

    bench = FaultBench(folder)
    rows: list[Row] = []
    if texts:
        sys.stderr.write(f"{texts:,} hostile texts\n")
        rows.append(row_of("hostile text", texts, attack_texts(bench.loaded, texts, seed, left())))
    if images:
        sys.stderr.write(f"{images:,} hostile images\n")
        (folder / "images").mkdir()
        tally = attack_images(bench.loaded, folder / "images", images, seed, left())
        rows.append(row_of("hostile image", images, tally))
    planned = plan(faults, seed)
    kinds = {kind: Row(name, sum(one[0] == kind for one in planned)) for kind, name in NAMES.items()}
    with tqdm(planned, desc="faults", unit="fault") as progress:
        for kind, job, number in progress:
            if left() <= 0:
                break
            progress.set_postfix_str(f"{kind} {job}")
            outcome = inject(bench, kind, job, number)
            kinds[kind].add(outcome)
            if not outcome.is_good:
                progress.write(str(outcome), file=sys.stderr)
    return [*rows, *(row for row in kinds.values() if row.planned)]


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability",
        description="Attack the package with bad input and faults, and count what goes wrong.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--faults", type=int, default=48, help="kill −9; other faults in proportion")
    parser.add_argument("--texts", type=int, default=2000, help="hostile texts")
    parser.add_argument("--images", type=int, default=2000, help="hostile images")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--time-limit-s", type=float, default=3600.0, help="nothing more is begun after that")
    parser.add_argument("--output", type=Path, help="folder for reliability.json and reliability.md")
    options = parser.parse_args(argv)
    for name in ("faults", "texts", "images"):
        if getattr(options, name) < 0:
            parser.error(f"--{name} {getattr(options, name)}: give 0 or more")
    if not 0 < options.time_limit_s:
        parser.error(f"--time-limit-s {options.time_limit_s}: give more than 0; a restart may take {SECONDS_AT_MOST} s")
    logging.disable(logging.WARNING)  # of what is damaged on purpose
    disable_progress_bar()
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory(prefix="notellm2-reliability-") as folder:
        rows = measure(options.texts, options.images, options.faults, options.seed, options.time_limit_s, Path(folder))
    facts = collect_facts(seed=options.seed)
    text = table(rows, facts, options.seed)
    sys.stdout.write(text)
    if options.output is not None:
        with new_file(options.output / "reliability.json") as file:
            file.write_text(json.dumps({"facts": facts, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
        with new_file(options.output / "reliability.md") as file:
            file.write_text(text, encoding="utf-8")
    if not all(row.is_good for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
