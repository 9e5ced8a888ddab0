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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeGuard

import jinja2
import numpy as np
import torch

from evaluation.sheet import Pictures, SheetQuery, field_text, note_label, say_found, say_related

if TYPE_CHECKING:  # matplotlib is an extra
    import matplotlib.figure

Cell = str | float | None
"""A cell of a `Table`: an integer is shown as it is, `Percent`, `AtMost` and `Rounded` as they say, any other number
with four decimals, None and what is not finite as "-"."""

_VERSIONED = ("torch", "transformers", "sentence-transformers", "datasets", "bm25s")
_MISSING = "-"


class Percent(float):
    """A share, shown as a signed percentage that no line break parts from its sign (U+00A0 stands before it).

    >>> str(Percent(-0.8056)).split()
    ['−80.6', '%']
    """

    def __str__(self) -> str:
        return f"{100 * self:+z.1f}\u00a0%".replace("-", "−")


class AtMost(float):
    """A number of which a bound is known, and shown, alone.

    >>> str(AtMost(0.001)).split()
    ['≤', '0.0010']
    """

    def __str__(self) -> str:
        return f"≤\u00a0{decimal(self)}"


class Rounded(float):
    """A number of any size, shown with three significant digits.

    >>> str(Rounded(134.515)), str(Rounded(0.04567)), str(Rounded(2134.0))
    ('135', '0.0457', '2130')
    """

    def __str__(self) -> str:
        return np.format_float_positional(float(f"{self:.3g}"), trim="-")


class Cost(TypedDict, total=False):
    """What a row is and what it costs, as far as that is known.

    Keys:
        made_of: what encodes, by the names of folders or Hub ids.
        dimensions: of a note's vector; missing where there is none, as scores are computed from words or views.
        parameters: of all models that were loaded for the row, trained heads included.
        cpu_seconds: of this process on all processors, to encode all notes once, images decoded; where there is no
            vector, to index them. Loading, training and ranking are not in it.
        seconds: the same by the clock, in place of `cpu_seconds` where there is a GPU.
        notes: how many were to be encoded, queries and pool.
        shared_with: rows for which these notes were encoded, whose seconds are in this row's, too.
        left_out: what did not run within these seconds, as its output was kept from before.
    """

    made_of: str
    dimensions: int
    parameters: int
    cpu_seconds: float
    seconds: float
    notes: int
    shared_with: list[str]
    left_out: str


def short_name(name_or_path: str) -> str:
    """A model's name as tables show it: a Hub id whole, of a path its last part.

    >>> short_name("org/model"), short_name("/models/llm/"), short_name("runs/mine/backbones/llm")
    ('org/model', 'llm', 'llm')
    """
    path = Path(name_or_path)
    return path.name if path.is_dir() or path.is_absolute() or len(path.parts) > 2 else name_or_path


def decimal(number: float, digits: int = 4) -> str:
    """A number with so many decimals, as all tables show it: a minus sign as long as a plus, and none before a zero.

    >>> decimal(-0.25), decimal(-0.00001), decimal(3.25, 1)
    ('−0.2500', '0.0000', '3.2')
    """
    return f"{number:z.{digits}f}".replace("-", "−")


@dataclass
class ReportRow:
    """One line of the main table.

    Args:
        system: the row's name: a model's, or a baseline's.
        modality: what the system sees of a note: "both", "text", "image", or "-" for a system that sees nothing.
        metrics: metric name to value in [0, 1]; the first row of a report names the columns, others may lack some.
        details: whatever else is worth keeping in the JSON, as the number of notes that were blank.
        is_bound: the row is a computed expectation, as of chance or of perfect knowledge, not a system: it is never
            marked as the best of a column.
        intervals: metric name to the (low, high) ends of its 95 % bootstrap interval, for any of `metrics`.
        cost: what the system is and costs, in a table of its own.
    """

    system: str
    modality: str
    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    is_bound: bool = False
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)


@dataclass
class Table:
    """A further table of a section.

    Args:
        columns: C names; the first column names the rows.
        rows: lines of C cells each.
        caption: what the table shows, in a few words.
        note: what a reader must know to read it, below the table.
        best_of: columns whose highest number is marked, unless it is 0 or all are equal.

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

    @property
    def has_best(self) -> bool:
        """Whether any cell is marked."""
        return any(cell.is_best for line in self.lines for cell in line.cells)


def markdown_table(rows: Sequence[ReportRow]) -> str:
    """The rows as a Markdown table, the best value of each column in bold unless it is 0 or all are equal, intervals in
    brackets.

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


def cost_table(rows: Sequence[ReportRow]) -> Table | None:
    """What each system is and costs; None if no row says so. Rows that say nothing, as bounds, are left out."""
    known = [row for row in rows if row.cost]
    if not known:
        return None
    lines: list[list[Cell]] = []
    for row in known:
        cost = row.cost
        parameters = Rounded(cost["parameters"] / 1e6) if "parameters" in cost else None
        seconds = _seconds_cell(cost.get("cpu_seconds", cost.get("seconds")))
        if "left_out" in cost:
            seconds = f"{seconds} without {cost['left_out']}"
        made_of = cost.get("made_of") or None
        lines.append([row.system, row.modality, cost.get("dimensions"), parameters, seconds, made_of])
    return Table(
        ["system", "modality", "dimensions", "million parameters", "seconds", "made of"],
        lines,
        caption="What each system is and costs",
        note=_say_costs([row for row in known if {"cpu_seconds", "seconds"} & row.cost.keys()]),
    )


def _seconds_cell(seconds: float | None) -> Cell:
    if seconds is None:
        return None
    return Rounded(seconds) if seconds >= 0.001 else "<0.001"


def _say_costs(timed: Sequence[ReportRow]) -> str:
    """The note of `cost_table`, of the rows with seconds."""
    said = (
        "Dimensions: of a note's vector; - where scores are computed from words or views. Parameters: of all that is "
        "loaded for the row. "
    )
    if not timed:
        return said.rstrip()
    clock = "of this process on all processors, whatever else is at work on the machine"
    if any("seconds" in row.cost for row in timed):
        clock = "by the clock, with a GPU; other work on the machine is in them as far as it slows this down"
    notes = ", ".join(map(str, sorted({row.cost["notes"] for row in timed if "notes" in row.cost})))
    said += (
        f"Seconds: {clock}. Measured once, to encode all {notes + ' ' if notes else ''}notes, queries and pool, with "
        "their images, except for what is left out; to index them where there is no vector. A note that has nothing "
        "of the modality is not encoded. Loading models, training and ranking are not in them."
    )
    for row in timed:
        if shared := row.cost.get("shared_with"):
            said += (
                f" {row.system} was not encoded again: it shares what {' and '.join(shared)} measured, and its seconds "
                "have it, too."
            )
    return said


def text_table(rows: Sequence[ReportRow]) -> str:
    """The rows as aligned plain text, the best value of each column marked with a star unless it is 0 or all are equal,
    without intervals. A last line says what a star is, if there is one.
    """
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
    if grid.has_best:
        lines.append("* best of the column")
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
    found = [{name: value for name, value in row.metrics.items() if _is_number(value)} for row in rows]
    systems = [metrics for row, metrics in zip(rows, found, strict=True) if not row.is_bound]
    best = {name: _best([metrics[name] for metrics in systems if name in metrics]) for name in names}
    largest = {name: max(metrics.get(name, 0.0) for metrics in found) for name in names}
    lines = []
    for row, metrics in zip(rows, found, strict=True):
        cells = [_GridCell(row.system), _GridCell(row.modality)]
        for name in names:
            value = metrics.get(name)
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
    grid = _Grid(["system", "modality", *names], lines)
    notes = ["The best system of each column is bold."] if grid.has_best else []
    if bounds := list(dict.fromkeys(row.system for row in rows if row.is_bound)):
        notes.append(
            f"{', '.join(bounds)}: computed as an expectation, no system and no bound; on few queries luck may pass or "
            "miss it."
        )
    if any(row.intervals for row in rows):
        notes.append("With a value: the ends of its 95\u00a0% bootstrap interval.")
    return grid._replace(note=" ".join(notes))


def _table_grid(table: Table) -> _Grid:
    best = {}
    for place, name in enumerate(table.columns):
        numbers = [cell for cell in (row[place] for row in table.rows) if _is_number(cell)]
        if name in table.best_of:
            best[place] = _best(numbers)
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


def _best(numbers: Sequence[float]) -> float:
    """The highest, which is marked; NaN, which no number is close to, where that is 0 or all are equal."""
    best = max(numbers, default=0.0)
    return math.nan if best == 0 or math.isclose(best, min(numbers)) else best


def _is_number(cell: Any) -> TypeGuard[float]:
    return isinstance(cell, Real) and math.isfinite(cell)


def _shown(cell: Any) -> str:
    if isinstance(cell, Real) and not _is_number(cell) or cell is None:
        return _MISSING
    if isinstance(cell, Integral):
        return str(cell).replace("-", "−")
    is_plain = isinstance(cell, Real) and not isinstance(cell, Percent | AtMost | Rounded)
    return decimal(float(cell)) if is_plain else str(cell)


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
    one_line = re.sub(r"[^\S\u00a0]+", " ", text).strip()  # no-break spaces stay
    return re.sub(r"([\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w))", r"\\\1", one_line)


def collect_facts(**facts: Any) -> dict[str, Any]:
    """What one must know to repeat a measurement: command, commit, time (UTC), hardware with its load average of one
    minute, versions, and `facts`.

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
    text = json_text(content)
    costs = cost_table(rows)
    results = [grid] if costs is None else [grid, _table_grid(costs)]
    _write_text(directory / "report.json", text)
    _write_text(directory / "report.md", _markdown_report(results, facts, sections, files))
    _write_text(directory / "report.html", _html_report(results, facts, sections))


def _write_text(path: Path, text: str) -> None:
    # Half a surrogate pair, which JSON and Python can hold, is no UTF-8; \ud800 is JSON's own way to write it.
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8", errors="backslashreplace")


def json_text(content: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Content as JSON for people and strict readers: indented, null for NaN and infinity.

    Args:
        content: mappings, sequences, strings and numbers, also NumPy's.
        default: makes of another value one that JSON can hold.

    Raises:
        TypeError: another value, without `default`.

    >>> json_text({"mrr": math.nan}).split()
    ['{', '"mrr":', 'null', '}']
    """
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, default=default or _plain_number, allow_nan=False)


def _finite(value: Any) -> Any:
    """The same with null for NaN and infinity, which JSON does not know."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, Real) and not _is_number(value) else value


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
                "rows": table.rows,
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
                "num_known": query.num_known,
                "answers": {
                    name: [
                        {
                            "note_id": answer.note.get("note_id"),
                            "score": answer.score,
                            "is_related": answer.is_related,
                            "is_known": answer.is_known,
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
    results: Sequence[_Grid], facts: Mapping[str, Any], sections: Sequence[Section], files: Mapping[int, str]
) -> str:
    parts = ["# Evaluation"]
    for grid in results:
        parts += _markdown_parts(grid)
    for place, section in enumerate(sections, start=1):
        parts += [f"## {_markdown_text(section.title)}", *map(_markdown_text, section.text)]
        for grid in map(_table_grid, section.tables):
            parts += _markdown_parts(grid)
        for figure in section.figures:
            parts += [f"![{_markdown_text(figure.alt)}]({files[id(figure)]})", _markdown_text(figure.caption)]
        if section.sheet:
            known = "(✓) related to it, but not asked for; " if any(query.num_known for query in section.sheet) else ""
            parts.append(f"✓ related to the query; {known}✗ not among its related notes.")
            parts.append(f"With pictures: [report.html](report.html#section-{place})")
        for query in section.sheet:
            parts.append(_markdown_query(query))
    lines = [f"- {name}: {f'`{fact}`' if isinstance(fact, str) else _flat(fact)}" for name, fact in facts.items()]
    parts += ["## How it was measured", "\n".join(lines)]
    return "\n\n".join(part for part in parts if part)


def _markdown_parts(grid: _Grid) -> list[str]:
    """Caption, table and note."""
    caption = [f"**{_markdown_text(grid.caption)}**"] if grid.caption else []
    return [*caption, _markdown_grid(grid).rstrip("\n"), _markdown_text(grid.note)]


def _markdown_query(query: SheetQuery) -> str:
    title, content = note_label(query.note), field_text(query.note, "content", 160)
    said = f": {_markdown_text(content)}" if content and field_text(query.note, "title") else ""
    lines = [f"**{_markdown_text(title)}**{said} ({say_related(query)})", ""]
    for system, answers in query.answers.items():
        names = [f"{_markdown_text(note_label(answer.note))} {decimal(answer.score, 3)}" for answer in answers]
        found = "; ".join(f"{answer.sign} {name}" for answer, name in zip(answers, names, strict=True))
        lines.append(f"- {_markdown_text(system)}: {found}")
    return "\n".join(lines)


def html_environment(folder: Path) -> jinja2.Environment:
    """What renders the pages of this package from the templates of a folder: all that they are given is escaped, and a
    name that they are not given is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _html_report(results: Sequence[_Grid], facts: Mapping[str, Any], sections: Sequence[Section]) -> str:
    pictures = Pictures()
    for section in sections:
        for query in section.sheet:
            for note in (query.note, *query.related, *(one.note for found in query.answers.values() for one in found)):
                pictures.add(note)
    return (
        html_environment(Path(__file__).parent)
        .get_template("report.html.jinja")
        .render(
            results=results,
            facts=facts,
            lede=_lede(facts),
            sections=sections,
            pictures=pictures,
            table_grid=_table_grid,
            field_text=field_text,
            note_label=note_label,
            say_found=say_found,
            say_related=say_related,
            decimal=decimal,
            data_uri=_data_uri,
            flat=_flat,
        )
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
    hardware: dict[str, Any] = {"cpu": model or platform.machine(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name()
    if hasattr(os, "getloadavg"):  # not on Windows
        hardware["load"] = round(os.getloadavg()[0], 1)
    return hardware


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
