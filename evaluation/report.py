"""The report of an evaluation: a page to look at, Markdown, JSON, and plain text for the terminal.

    DIR/report.html    tables, curves and the picture sheet in one file, which loads nothing from elsewhere
    DIR/report.md      the same without pictures of notes; curves are DIR/figures/*.png
    DIR/report.json    all figures

The main table has one row a system and modality. Rows come with the facts that a figure needs to be believed and
repeated: the command, the commit, the time, the hardware and the versions. The picture sheet shows what systems answer
to some notes, so that a person can look in place of read.
"""

import base64
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import jinja2
import numpy as np
import torch

from evaluation.sheet import Pictures, SheetQuery, field_text, note_label

if TYPE_CHECKING:  # matplotlib is an extra
    import matplotlib.figure

Cell = str | float | None
"""A cell of a `Table`: an integer is shown as it is, any other number with four decimals, None and NaN as "-"."""

_VERSIONED = ("torch", "transformers", "sentence-transformers", "datasets", "bm25s")
_MISSING = "-"


@dataclass
class ReportRow:
    """One line of the main table.

    Args:
        system: the row's name: a model's, or a baseline's.
        modality: what the system sees of a note: "both", "text", "image", or "-" for a system that sees nothing.
        metrics: metric name to value in [0, 1]; the first row of a report names the columns, others may lack some.
        details: whatever else is worth keeping in the JSON, as the number of notes that were blank.
        is_bound: the row is a bound, not a system: it is never marked as the best of a column.
        intervals: metric name to the (low, high) ends of its 95 % bootstrap interval, for any of `metrics`.
    """

    system: str
    modality: str
    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    is_bound: bool = False
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass
class Table:
    """A further table of a section.

    Args:
        columns: C names; the first column names the rows.
        rows: lines of C cells each.
        caption: what the table shows, in a few words.
        note: what a reader must know to read it, below the table.
        best_of: columns whose highest number is marked.

    Raises:
        ValueError: a line of another length than C, or `best_of` names no column.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    note: str = ""
    best_of: Sequence[str] = ()

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"rows[{number}] = {list(row)} has {len(row)} cells, expected {len(self.columns)}: one for each of "
                    f"{list(self.columns)}."
                )
        unknown = set(self.best_of) - set(self.columns)
        if unknown:
            raise ValueError(f"best_of names {sorted(unknown)}, which are not among columns={list(self.columns)}.")


@dataclass
class Figure:
    """A picture of a section, as a plot.

    Args:
        png: a PNG file's bytes.
        caption: what it shows.
        alt: what one would tell a person who cannot see it.

    Raises:
        ValueError: `png` is no PNG file, or `alt` is empty.
    """

    png: bytes
    caption: str
    alt: str

    def __post_init__(self) -> None:
        if not self.png.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError(f"png starts with {self.png[:8]!r}: pass the bytes of a PNG file.")
        if not self.alt.strip():
            raise ValueError(f"alt is empty: say what the figure {self.caption!r} shows.")

    @classmethod
    def from_matplotlib(cls, figure: "matplotlib.figure.Figure", caption: str, alt: str) -> "Figure":
        """Draw a matplotlib figure, at 192 pixels an inch, sharp also on dense screens."""
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=192)
        return cls(png.getvalue(), caption, alt)


@dataclass
class Section:
    """A part of the report after the main table, shown in the order of the fields.

    Args:
        title: its heading.
        text: paragraphs of plain text.
        tables: further tables.
        figures: plots.
        sheet: queries of a picture sheet, as `evaluation.sheet.picture_sheet` makes them.
    """

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    sheet: list[SheetQuery] = field(default_factory=list)


class _GridCell(NamedTuple):
    """A cell as it is shown. `share` is a metric's part of the largest one in its column, for a bar."""

    text: str
    is_number: bool = False
    is_best: bool = False
    interval: str = ""
    share: float | None = None


class _GridLine(NamedTuple):
    cells: list[_GridCell]
    is_bound: bool = False


class _Grid(NamedTuple):
    """What the three ways to write a table have in common."""

    columns: list[str]
    lines: list[_GridLine]
    caption: str = ""
    note: str = ""

    @property
    def is_number(self) -> list[bool]:
        """For each column, whether it holds numbers, which are aligned on the right."""
        return [any(line.cells[place].is_number for line in self.lines) for place in range(len(self.columns))]


def markdown_table(rows: Sequence[ReportRow]) -> str:
    """The rows as a Markdown table, the best value of each column in bold, intervals in brackets.

    >>> rows = [ReportRow("bm25", "text", {"mrr": 0.25}), ReportRow("chance", "-", {"mrr": 0.1})]
    >>> markdown_table(rows).splitlines()[2:]
    ['| bm25 | text | **0.2500** |', '| chance | - | 0.1000 |']
    """
    return _markdown_grid(_main_grid(rows))


def table_markdown(table: Table) -> str:
    """A further table as Markdown.

    >>> table_markdown(Table(["steps", "mrr"], [["few", 0.25]])).splitlines()[2:]
    ['| few | 0.2500 |']
    """
    return _markdown_grid(_table_grid(table))


def text_table(rows: Sequence[ReportRow]) -> str:
    """The rows as aligned plain text, the best value of each column marked with a star, without intervals."""
    grid = _main_grid(rows)
    header = grid.columns[:2] + [f"{name} " for name in grid.columns[2:]]
    table = [header]
    for line in grid.lines:
        values = [f"{cell.text}*" if cell.is_best else f"{cell.text} " for cell in line.cells[2:]]
        table.append([cell.text for cell in line.cells[:2]] + values)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for texts in table:
        left = [text.ljust(width) for text, width in zip(texts[:2], widths[:2], strict=True)]
        right = [text.rjust(width) for text, width in zip(texts[2:], widths[2:], strict=True)]
        lines.append("  ".join(left + right).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines) + "\n"


def _main_grid(rows: Sequence[ReportRow]) -> _Grid:
    if not rows:
        raise ValueError("rows is empty: evaluate at least one model or baseline.")
    names = list(rows[0].metrics)
    for row in rows:
        if not set(row.metrics) <= set(names):
            raise ValueError(
                f"Row {row.system!r} ({row.modality}) has metrics {list(row.metrics)}, the first row {names}: "
                "evaluate all systems with the same ks."
            )
        if not set(row.intervals) <= set(row.metrics):
            raise ValueError(
                f"Row {row.system!r} ({row.modality}) has intervals of {list(row.intervals)}, metrics "
                f"{list(row.metrics)}: give intervals of its metrics only."
            )
    best = {
        name: max((row.metrics[name] for row in rows if name in row.metrics and not row.is_bound), default=math.nan)
        for name in names
    }
    largest = {name: max(row.metrics.get(name, 0.0) for row in rows) for name in names}
    lines = []
    for row in rows:
        cells = [_GridCell(row.system), _GridCell(row.modality)]
        for name in names:
            value = row.metrics.get(name)
            low, high = row.intervals.get(name, (None, None))
            cells.append(
                _GridCell(
                    _shown(value),
                    is_number=True,
                    is_best=value is not None and not row.is_bound and math.isclose(value, best[name]),
                    interval="" if low is None else f"{_shown(low)}, {_shown(high)}",
                    share=value / largest[name] if value is not None and largest[name] > 0 else None,
                )
            )
        lines.append(_GridLine(cells, row.is_bound))
    note = "The best system of each column is bold."
    if any(row.intervals for row in rows):
        note += " With a value: the ends of its 95 % bootstrap interval."
    return _Grid(["system", "modality", *names], lines, note=note)


def _table_grid(table: Table) -> _Grid:
    best = {}
    for place, name in enumerate(table.columns):
        numbers = [cell for cell in (row[place] for row in table.rows) if _is_number(cell)]
        if name in table.best_of and numbers:
            best[place] = max(numbers)
    lines = [
        _GridLine(
            [
                _GridCell(
                    _shown(cell),
                    is_number=_is_number(cell),
                    is_best=place in best and _is_number(cell) and math.isclose(cell, best[place]),
                )
                for place, cell in enumerate(row)
            ]
        )
        for row in table.rows
    ]
    return _Grid(list(table.columns), lines, table.caption, table.note)


def _is_number(cell: Any) -> TypeGuard[float]:
    return isinstance(cell, Real) and not math.isnan(cell)


def _shown(cell: Any) -> str:
    if isinstance(cell, Real) and not _is_number(cell) or cell is None:
        return _MISSING
    return f"{float(cell):.4f}" if isinstance(cell, Real) and not isinstance(cell, Integral) else str(cell)


def _markdown_grid(grid: _Grid) -> str:
    lines = [[_markdown_text(name) for name in grid.columns]]
    for line in grid.lines:
        texts = []
        for cell in line.cells:
            text = _markdown_text(cell.text)
            texts.append((f"**{text}**" if cell.is_best else text) + (f" ({cell.interval})" if cell.interval else ""))
        lines.append(texts)
    written = [f"| {' | '.join(texts)} |" for texts in lines]
    written.insert(1, f"|{'|'.join('--:' if right else ':--' for right in grid.is_number)}|")
    return "\n".join(written) + "\n"


def _markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: one line, without markup, links or HTML of its own."""
    return re.sub(r"([\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


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


def write_report(
    directory: str | Path, rows: Sequence[ReportRow], facts: dict[str, Any], sections: Sequence[Section] = ()
) -> None:
    """Write `report.html`, `report.md`, `report.json` and `figures/` into a folder, made if need be.

    A picture that cannot be read is logged, and shown as missing.

    Args:
        directory: the folder.
        rows: the lines of the main table, in order.
        facts: what `collect_facts` returns; values that JSON can hold.
        sections: what comes after the main table.

    Raises:
        ValueError: if there is no row, or if the rows' metrics differ.
    """
    grid = _main_grid(rows)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    figures = [figure for section in sections for figure in section.figures]
    files = {id(figure): f"figures/figure-{number}.png" for number, figure in enumerate(figures, start=1)}
    for figure in figures:
        path = directory / files[id(figure)]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(figure.png)
    content = {
        "facts": facts,
        "rows": [asdict(row) for row in rows],
        "sections": [_section_json(section, files) for section in sections],
    }
    _write_text(directory / "report.json", json.dumps(content, indent=2, ensure_ascii=False, default=_plain_number))
    _write_text(directory / "report.md", _markdown_report(grid, facts, sections, files))
    _write_text(directory / "report.html", _html_report(grid, facts, sections))


def _write_text(path: Path, text: str) -> None:
    # Half a surrogate pair, which JSON and Python can hold, is no UTF-8; \ud800 is JSON's own way to write it.
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8", errors="backslashreplace")


def _plain_number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} ({type(value).__name__}) is not JSON: give strings, numbers, lists and dicts.")


def _section_json(section: Section, files: Mapping[int, str]) -> dict[str, Any]:
    return {
        "title": section.title,
        "text": section.text,
        "tables": [
            {
                "caption": table.caption,
                "columns": list(table.columns),
                "rows": [
                    [cell if isinstance(cell, str) or _is_number(cell) else None for cell in row] for row in table.rows
                ],
                "note": table.note,
            }
            for table in section.tables
        ],
        "figures": [
            {"file": files[id(figure)], "caption": figure.caption, "alt": figure.alt} for figure in section.figures
        ],
        "sheet": [
            {
                "note_id": query.note.get("note_id"),
                "num_related": query.num_related,
                "answers": {
                    name: [
                        {
                            "note_id": answer.note.get("note_id"),
                            "score": answer.score if math.isfinite(answer.score) else None,
                            "is_related": answer.is_related,
                        }
                        for answer in answers
                    ]
                    for name, answers in query.answers.items()
                },
            }
            for query in section.sheet
        ],
    }


def _markdown_report(
    grid: _Grid, facts: Mapping[str, Any], sections: Sequence[Section], files: Mapping[int, str]
) -> str:
    parts = ["# Evaluation", _markdown_grid(grid).rstrip("\n"), grid.note]
    for place, section in enumerate(sections, start=1):
        parts += [f"## {_markdown_text(section.title)}", *map(_markdown_text, section.text)]
        for table in map(_table_grid, section.tables):
            parts += [f"**{_markdown_text(table.caption)}**"] if table.caption else []
            parts += [_markdown_grid(table).rstrip("\n"), _markdown_text(table.note)]
        for figure in section.figures:
            parts += [f"![{_markdown_text(figure.alt)}]({files[id(figure)]})", _markdown_text(figure.caption)]
        if section.sheet:
            parts.append(f"With pictures: [report.html](report.html#section-{place})")
        for query in section.sheet:
            parts.append(_markdown_query(query))
    lines = [f"- {name}: {f'`{fact}`' if isinstance(fact, str) else _flat(fact)}" for name, fact in facts.items()]
    parts += ["## How it was measured", "\n".join(lines)]
    return "\n\n".join(part for part in parts if part)


def _markdown_query(query: SheetQuery) -> str:
    title, content = note_label(query.note), field_text(query.note, "content", 160)
    said = f": {_markdown_text(content)}" if content and field_text(query.note, "title") else ""
    lines = [f"**{_markdown_text(title)}**{said} ({query.num_related} related)", ""]
    for system, answers in query.answers.items():
        signs = ["✓" if answer.is_related else "✗" for answer in answers]
        names = [f"{_markdown_text(note_label(answer.note))} {answer.score:.3f}" for answer in answers]
        found = "; ".join(f"{sign} {name}" for sign, name in zip(signs, names, strict=True))
        lines.append(f"- {_markdown_text(system)}: {found}")
    return "\n".join(lines)


def _html_report(grid: _Grid, facts: Mapping[str, Any], sections: Sequence[Section]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = Pictures()
    for section in sections:
        for query in section.sheet:
            for note in (query.note, *query.related, *(one.note for found in query.answers.values() for one in found)):
                pictures.add(note)
    return environment.get_template("report.html.jinja").render(
        grid=grid,
        facts=facts,
        lede=_lede(facts),
        sections=sections,
        pictures=pictures,
        table_grid=_table_grid,
        field_text=field_text,
        note_label=note_label,
        data_uri=_data_uri,
        flat=_flat,
    )


def _lede(facts: Mapping[str, Any]) -> str:
    """The facts that a reader wants first, as far as there are any."""
    parts = [f"{facts[name]} {name}" for name in ("notes", "queries") if name in facts]
    parts += [str(facts["time"])[:10]] if facts.get("time") else []
    parts += [f"commit {str(facts['commit'])[:12]}"] if facts.get("commit") else []
    return " · ".join(parts)


def _data_uri(file: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def _flat(value: Any) -> str:
    return ", ".join(f"{name} {item}" for name, item in value.items()) if isinstance(value, dict) else str(value)


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
