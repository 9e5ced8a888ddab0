"""The report: one row a system and modality, as Markdown, as JSON and as plain text for the terminal.

Rows come with the facts that a figure needs to be believed and repeated: the command, the commit, the time, the
hardware and the versions.
"""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_VERSIONED = ("torch", "transformers", "sentence-transformers", "datasets", "bm25s")


@dataclass
class ReportRow:
    """One line of the table.

    Args:
        system: the row's name: a model's, or a baseline's.
        modality: what the system sees of a note: "both", "text", "image", or "-" for a system that sees nothing.
        metrics: metric name to value in [0, 1]; the first row of a report names the columns, others may lack some.
        details: whatever else is worth keeping in the JSON, as the number of notes that were blank.
        is_bound: the row is a bound, not a system: it is never marked as the best of a column.
    """

    system: str
    modality: str
    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    is_bound: bool = False


def markdown_table(rows: Sequence[ReportRow]) -> str:
    """The rows as a Markdown table, the best value of each column in bold.

    >>> rows = [ReportRow("bm25", "text", {"mrr": 0.25}), ReportRow("chance", "-", {"mrr": 0.1})]
    >>> markdown_table(rows).splitlines()[2:]
    ['| bm25 | text | **0.2500** |', '| chance | - | 0.1000 |']
    """
    cells = _cells(rows, mark="**{}**", plain="{}")
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in cells]
    lines.insert(1, "|:--|:--|" + "--:|" * (len(cells[0]) - 2))
    return "\n".join(lines) + "\n"


def text_table(rows: Sequence[ReportRow]) -> str:
    """The rows as aligned plain text, the best value of each column marked with a star."""
    cells = _cells(rows, mark="{}*", plain="{} ")
    cells[0][2:] = [f"{name} " for name in cells[0][2:]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        lines.append("  ".join(left + right).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines) + "\n"


def _cells(rows: Sequence[ReportRow], mark: str, plain: str) -> list[list[str]]:
    """The header and the rows as strings, each metric's best value put into `mark`, the others into `plain`."""
    if not rows:
        raise ValueError("rows is empty: evaluate at least one model or baseline.")
    names = list(rows[0].metrics)
    for row in rows:
        if not set(row.metrics) <= set(names):
            raise ValueError(
                f"Row {row.system!r} ({row.modality}) has metrics {list(row.metrics)}, the first row {names}: "
                "evaluate all systems with the same ks."
            )
    best = {
        name: max((row.metrics[name] for row in rows if name in row.metrics and not row.is_bound), default=math.nan)
        for name in names
    }
    table = [["system", "modality", *names]]
    for row in rows:
        values = []
        for name in names:
            is_best = not row.is_bound and name in row.metrics and math.isclose(row.metrics[name], best[name])
            text = f"{row.metrics[name]:.4f}" if name in row.metrics else "-"
            values.append((mark if is_best else plain).format(text))
        table.append([row.system, row.modality, *values])
    return table


def collect_facts(**facts: Any) -> dict[str, Any]:
    """What one must know to repeat a measurement: command, commit, time (UTC), hardware, versions, and `facts`.

    The commit is null outside a git checkout, and ends in "-dirty" if files were changed since.
    """
    command = [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]
    return {
        "command": shlex.join(command),
        "commit": _git_commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": _hardware(),
        "versions": {"python": platform.python_version(), **_versions()},
        **facts,
    }


def write_report(directory: str | Path, rows: Sequence[ReportRow], facts: dict[str, Any]) -> None:
    """Write `report.md` and `report.json` into a folder, made if need be.

    Args:
        directory: the folder.
        rows: the lines of the table, in order.
        facts: what `collect_facts` returns; values that JSON can hold.

    Raises:
        ValueError: if there is no row, or if the rows' metrics differ.
    """
    table = markdown_table(rows)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    lines = [f"- {name}: {_flat(value)}" for name, value in facts.items()]
    (directory / "report.md").write_text("\n".join(["# Evaluation", "", table, *lines]) + "\n", encoding="utf-8")
    content = {"facts": facts, "rows": [asdict(row) for row in rows]}
    (directory / "report.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return f"`{value}`" if isinstance(value, str) else str(value)


def _git_commit() -> str | None:
    # "--exclude *" ignores tags, so that this is always a hash.
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _hardware() -> dict[str, Any]:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    hardware = {"cpu": model or platform.machine(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name()
    return hardware


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
