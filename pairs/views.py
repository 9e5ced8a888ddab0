"""Views made good: bad rows found, counted by rule, and dropped or refused, the same way on every engine.

A row that is dropped is dropped by exactly one rule, the first of `RULES` that it breaks; one that is told of under
time_backwards, where that rule only counts, may be dropped by a later one. Nothing else is lost: views read = views
kept + the sum of what the rules dropped.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import ibis
import numpy as np
import pyarrow as pa
from datasets import Dataset
from ibis import _
from ibis.expr import types as ir

from pairs.engines import Engine
from pairs.files import to_arrow
from pairs.query import SECONDS_PER_DAY, ViewLog, view_log

Rule = Literal[
    "empty_user_id",
    "empty_note_id",
    "bad_timestamp",
    "timestamp_range",
    "unknown_note",
    "time_backwards",
    "duplicate_view",
    "bot",
    "user_cap",
]

# What breaks each rule, and what to do about it.
RULES: dict[Rule, tuple[str, str]] = {
    "empty_user_id": ("no user_id", "fill it in"),
    "empty_note_id": ("no note_id", "fill it in"),
    "bad_timestamp": ("a timestamp that cannot be read", "give whole seconds since 1970 or ISO 8601"),
    "timestamp_range": ("a time before 1970 or after 5000-01-01", "is the unit of time right?"),
    "unknown_note": ("a note that the notes lack", "add the note, or leave the notes out"),
    "time_backwards": ("an earlier time than the row of the same user before it", "sort the log by time"),
    "duplicate_view": ("the user, note and second of another row", "remove it"),
    "bot": ("a user with more views in a day than people have", "see max_user_views_per_day"),
    "user_cap": ("a user with more views than wanted, of which the latest are kept", "see max_user_views"),
}

TimeUnit = Literal["s", "ms", "us", "ns"]
_PER_SECOND: dict[TimeUnit, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}

MAX_SECONDS = 95_617_584_000  # 5000-01-01

# The end is \z, as a line break at the end of a text may be before what Java takes for $.
_INTEGER = r"^[+-]?\d{1,18}(\.\d*)?\z"
_BELOW_INTEGER = r"^-\d+\.\d*[1-9]"
# ISO 8601, extended form: a date, or date and time with seconds, a fraction and a zone as one likes.
_ISO = (
    r"^\d{4}-\d{2}-\d{2}"
    r"([T ]\d{2}:\d{2}(:\d{2}([.,]\d+)?)?( ?([Zz]|[+-]\d{2}(:?\d{2})?))?)?\z"
)


@dataclass(frozen=True)
class ViewOptions:
    """Where a log has its views, and which of them count. Each field's metadata says what it is."""

    user_column: str = field(default="user_id", metadata={"help": "column of the user's id"})
    note_column: str = field(default="note_id", metadata={"help": "column of the note's id"})
    time_column: str = field(
        default="timestamp",
        metadata={"help": "column of the time: integers since 1970, ISO 8601 texts or timestamps; without a zone: UTC"},
    )
    time_unit: TimeUnit = field(default="s", metadata={"help": "unit of times that are integers"})
    max_user_views: int | None = field(
        default=5000,
        metadata={
            "help": "keep so many views of each user, the latest (rule user_cap), as the work grows with their square"
        },
    )
    max_user_views_per_day: int | None = field(
        default=None,
        metadata={"help": "who viewed more in any day (UTC) is a bot, all of whose views are dropped (rule bot)"},
    )
    drop_time_backwards: bool = field(
        default=False,
        metadata={
            "help": "drop rows that are earlier than the one of the same user before them (rule time_backwards); "
            "without it they are counted and kept, as the order of rows means nothing in most logs"
        },
    )
    refuse: tuple[Rule, ...] = field(
        default=(),
        metadata={"help": "stop with an error, which names file and row, where one of these rules is broken"},
    )

    def __post_init__(self) -> None:
        if self.time_unit not in get_args(TimeUnit):
            raise ValueError(f"time_unit={self.time_unit!r}: use one of {get_args(TimeUnit)}.")
        for name in ("max_user_views", "max_user_views_per_day"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name}={number}: give 1 or more.")
        for rule in self.refuse:
            if rule not in RULES:
                raise ValueError(f"refuse={rule!r}: use some of {', '.join(RULES)}.")

    @property
    def columns(self) -> tuple[str, str, str]:
        """How the log calls user_id, note_id and timestamp."""
        return self.user_column, self.note_column, self.time_column


class ReadViews(NamedTuple):
    """Views as they were read.

    Attributes:
        log: the good ones.
        rows: how many rows there were.
        kept: how many of them are in `log`.
        broken: for each of `RULES` how many rows broke it. They were dropped, but those of time_backwards only if
            `ViewOptions.drop_time_backwards` says so.
        offenders: for each of `RULES` these rows: user_id, note_id, timestamp (string, as they were read), file
            (string), block, position. Not computed; `list_offenders` makes one table of them.
        raw: all rows: file, block, position, and more.
        first: time of the first view in `log`, seconds since 1970 (UTC).
        last: that of the last one.
    """

    log: ViewLog
    rows: int
    kept: int
    broken: dict[Rule, int]
    offenders: dict[Rule, ir.Table]
    raw: ir.Table
    first: int
    last: int


def read_views(
    engine: Engine,
    source: str | Path | Dataset | pa.Table,
    options: ViewOptions | None = None,
    note_ids: Iterable[str] | None = None,
) -> ReadViews:
    """Reads a log of views and sorts out its bad rows.

    Args:
        engine: what reads and computes.
        source: a path or URL, as `Engine.read` takes it, or a table in memory.
        options: where the log has its views, and which of them count; None: the defaults.
        note_ids: the notes that there are; views of others are dropped (rule unknown_note). None: all that were viewed.

    Raises:
        FileNotFoundError: nothing is at `source`.
        ValueError: `source` cannot be read, a rule of `options.refuse` is broken, or no view is left.
    """
    options = options or ViewOptions()
    raw = _open(engine, source, options)
    time = (
        raw.timestamp.cast("timestamp") if raw.timestamp.type().is_timestamp() else raw.timestamp
    )  # engines show zones
    parsed = raw.mutate(seconds=_seconds(raw.timestamp, options.time_unit), timestamp=time.cast("string"))
    if note_ids is None:
        known, judged = None, parsed.mutate(rule=_rule_of(parsed, ibis.literal(True)))
    else:
        ids = pa.array(sorted(set(note_ids)), pa.string())
        known = engine.from_arrow(pa.table({"known_id": ids}))
        parsed = parsed.left_join(known, parsed.note_id == known.known_id)
        judged = parsed.mutate(rule=_rule_of(parsed, parsed.known_id.notnull())).drop("known_id")
    if raw.timestamp.type().is_string():
        judged = engine.keep(judged)  # texts are parsed once, not in every query
    by_rule = _column_pairs(engine, judged.group_by("rule").aggregate(rows=_.count()))
    rows = sum(by_rule.values())
    good = judged.filter(_.rule.isnull()).drop("rule")
    offenders: dict[Rule, ir.Table] = {rule: judged.filter(_.rule == rule).select(_PLACE) for rule in RULES}
    broken: dict[Rule, int] = {rule: by_rule.get(rule, 0) for rule in RULES}
    _refuse(engine, raw, options, broken, offenders)

    notes = good.select("note_id").distinct() if known is None else known.select(note_id="known_id")
    notes = engine.number(notes, "note_id", "note")
    people = engine.number(good.select("user_id").distinct(), "user_id", "person")
    files = engine.number(good.select("file").distinct(), "file", "file_number")
    # From here on, only numbers: what breaks a rule is known by its place, and read again if somebody asks for it.
    place = ["file_number", "block", "position"]
    numbered = good.join(notes, "note_id").join(people, "user_id").join(files, "file")
    numbered = engine.keep(numbered.select("person", "note", *place, timestamp="seconds"))
    if engine.count(numbered) != by_rule.get(None, 0):
        raise ValueError(f"{_name_of(source)}: changed while it was read; read it again when nobody writes to it.")

    def rows_at(places: ir.Table) -> ir.Table:
        wanted = places.join(files, "file_number").select("file", "block", "position")
        return good.semi_join(wanted, ["file", "block", "position"]).select(_PLACE)

    in_order = numbered.mutate(before=_.timestamp.lag().over(group_by="person", order_by=place))
    backwards = in_order.filter(_.timestamp < _.before)
    broken["time_backwards"] = engine.count(backwards)
    offenders["time_backwards"] = rows_at(backwards)
    if options.drop_time_backwards:
        numbered = in_order.filter(~(_.timestamp < _.before).fill_null(False)).drop("before")

    visits = engine.keep(numbered.select("person", "note", "timestamp").distinct())
    kept = engine.count(visits)
    dropped = broken["time_backwards"] if options.drop_time_backwards else 0
    broken["duplicate_view"] = by_rule.get(None, 0) - dropped - kept
    copies = numbered.mutate(copy=ibis.row_number().over(group_by=["person", "note", "timestamp"], order_by=place))
    offenders["duplicate_view"] = rows_at(copies.filter(_["copy"] > 0))
    originals = copies.filter(_["copy"] == 0)

    if options.max_user_views_per_day is not None:
        days = visits.group_by("person", day=(_.timestamp - _.timestamp % SECONDS_PER_DAY)).aggregate(views=_.count())
        bots = engine.keep(days.filter(_.views > options.max_user_views_per_day).select("person").distinct())
        visits = engine.keep(visits.anti_join(bots, "person"))
        left = engine.count(visits)
        broken["bot"], kept = kept - left, left
        offenders["bot"] = rows_at(originals.semi_join(bots, "person"))
        originals = originals.anti_join(bots, "person")
    if options.max_user_views is not None:
        totals = visits.group_by("person").aggregate(views=_.count())
        eager = engine.keep(totals.filter(_.views > options.max_user_views).select("person"))
        if engine.count(eager):
            latest_first = ibis.row_number().over(
                group_by="person", order_by=[ibis.desc("timestamp"), ibis.desc("note")]
            )
            latest = visits.semi_join(eager, "person").mutate(age=latest_first).filter(_.age < options.max_user_views)
            visits = engine.keep(visits.anti_join(eager, "person").union(latest.drop("age")))
            left = engine.count(visits)
            broken["user_cap"], kept = kept - left, left
            offenders["user_cap"] = rows_at(originals.anti_join(visits, ["person", "note", "timestamp"]))
    _refuse(engine, raw, options, broken, offenders)
    if not kept:
        found = ", ".join(f"{count} {rule}" for rule, count in broken.items() if count) or "it is empty"
        raise ValueError(f"{_name_of(source)}: no view is left of {rows} rows ({found}): see the log and the options.")
    log = view_log(visits, notes, engine)
    first, last = (
        engine.fetch(visits.aggregate(first=_.timestamp.min(), last=_.timestamp.max())).to_pylist()[0].values()
    )
    return ReadViews(log, rows, kept, broken, offenders, raw, first, last)


def broken_rules_text(views: ReadViews, options: ViewOptions) -> str:
    """What was read, kept and found, a line each; rules that nothing broke are left out."""
    days = [datetime.fromtimestamp(second, UTC).date() for second in (views.first, views.last)]
    lines = [f"{views.rows:>12,} rows read, {views.kept:,} views kept, from {days[0]} to {days[1]}"]
    for rule, count in views.broken.items():
        if count:
            kept = rule == "time_backwards" and not options.drop_time_backwards
            lines.append(f"{count:>12,} {'kept' if kept else 'dropped'} by {rule}: {RULES[rule][0]}")
    return "\n".join(lines)


def list_offenders(views: ReadViews) -> ir.Table:
    """All rows that broke a rule: rule, file, row (int64, from 1, header lines apart), user_id, note_id, timestamp."""
    tables = [table.mutate(rule=ibis.literal(rule)) for rule, table in views.offenders.items() if views.broken[rule]]
    if not tables:
        tables = [views.offenders["empty_user_id"].mutate(rule=ibis.literal("empty_user_id"))]
    offenders = ibis.union(*tables) if len(tables) > 1 else tables[0]
    place = ibis.row_number().over(group_by="file", order_by=["block", "position"])
    rows = views.raw.select("file", "block", "position", row=place + 1)
    offenders = offenders.join(rows, ["file", "block", "position"])
    return offenders.select("rule", "file", "row", "user_id", "note_id", "timestamp").order_by("file", "row", "rule")


_PLACE = ["user_id", "note_id", "timestamp", "file", "block", "position"]


def _open(engine: Engine, source: str | Path | Dataset | pa.Table, options: ViewOptions) -> ir.Table:
    if isinstance(source, str | Path):
        return engine.read(str(source), options.columns)
    table = to_arrow(source) if isinstance(source, Dataset) else source
    for name in options.columns:
        if name not in table.column_names:
            raise ValueError(f"views: no column {name!r}, only {table.column_names}; say which one it is.")
        kind = table.schema.field(name).type
        is_time = name == options.time_column and pa.types.is_temporal(kind) and not pa.types.is_time(kind)
        if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind) or is_time):
            wanted = "integers, ISO 8601 texts or timestamps" if name == options.time_column else "texts or integers"
            raise ValueError(f"views: column {name!r} is {kind}; give {wanted}.")
    user, note, time = (table[name] for name in options.columns)
    if _is_text(time.type) or pa.types.is_null(time.type):
        time = time.cast(pa.string())
    count = len(table)
    return engine.from_arrow(
        pa.table(
            {
                "user_id": user.cast(pa.string()),
                "note_id": note.cast(pa.string()),
                "timestamp": time,
                "file": pa.array(["views"] * count, pa.string()),
                "block": pa.array(np.zeros(count, np.int64)),
                "position": pa.array(np.arange(count)),
            }
        )
    )


def _is_text(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)


def _name_of(source: str | Path | Dataset | pa.Table) -> str:
    return str(source) if isinstance(source, str | Path) else "views"


def _rule_of(parsed: ir.Table, is_known: ir.BooleanValue) -> ir.StringValue:
    """The first rule about the row alone that it breaks, or null."""
    return ibis.cases(
        (parsed.user_id.isnull() | (parsed.user_id == ""), "empty_user_id"),
        (parsed.note_id.isnull() | (parsed.note_id == ""), "empty_note_id"),
        (parsed.seconds.isnull(), "bad_timestamp"),
        (~parsed.seconds.between(0, MAX_SECONDS), "timestamp_range"),
        (~is_known, "unknown_note"),
    )


def _seconds(time: ir.Value, unit: TimeUnit) -> ir.IntegerValue:
    """Seconds since 1970 (UTC), rounded down; null where `time` is none."""
    if time.type().is_timestamp() or time.type().is_date():
        return time.cast("timestamp").truncate("s").epoch_seconds().cast("int64")
    if time.type().is_integer():
        return _in_seconds(time.cast("int64"), unit)
    whole = time.re_extract(r"^[+-]?\d{1,18}", 0).try_cast("int64")
    whole = whole - time.re_search(_BELOW_INTEGER).cast("int64")
    return ibis.cases(
        (time.re_search(_INTEGER), _in_seconds(whole, unit)),
        (time.re_search(_ISO), _iso_seconds(time)),
        else_=ibis.null("int64"),
    )


def _in_seconds(whole: ir.IntegerValue, unit: TimeUnit) -> ir.IntegerValue:
    per_second = _PER_SECOND[unit]
    if per_second == 1:
        return whole
    # Engines divide integers as floating-point numbers, which do not hold nanoseconds: the quotient is exact once the
    # remainder is gone and the rest rounded.
    divided = ((whole - whole % per_second) / per_second).round().cast("int64")
    return ibis.cases((whole < 0, -1), else_=divided)


def _iso_seconds(time: ir.StringValue) -> ir.IntegerValue:
    """Seconds of a text that matches `_ISO`; null where there is no such day or time.

    Integer arithmetic on the digits, as engines differ in what they take for a time and in which zone.
    """

    def number(start: int, length: int = 2) -> ir.IntegerValue:
        return time.substr(start, length).try_cast("int64")

    def default(value: ir.IntegerValue) -> ir.IntegerValue:
        return value.fill_null(0)

    year, month, day = number(0, 4), number(5), number(8)
    has_seconds = time.substr(16, 1) == ":"
    hour, minute = default(number(11)), default(number(14))
    second = ibis.cases((has_seconds, default(number(17))), else_=0)
    has_offset = (time.length() > 10) & time.re_search(r"[+-]\d{2}(:?\d{2})?$")
    offset = time.substr(11).re_extract(r"[+-]\d{2}:?\d{0,2}$", 0)
    sign = ibis.cases((offset.substr(0, 1) == "-", -1), else_=1)
    offset_hour = default(offset.substr(1, 2).try_cast("int64"))
    offset_minute = default(offset.substr(3).replace(":", "").try_cast("int64"))
    shift = ibis.cases((has_offset, sign * (offset_hour * 3600 + offset_minute * 60)), else_=0)

    leap = (year % 4 == 0) & ((year % 100 != 0) | (year % 400 == 0))
    length = ibis.cases(((month == 2) & leap, 29), (month == 2, 28), (month.isin([4, 6, 9, 11]), 30), else_=31)
    # Days from 1970-01-01 in the Gregorian calendar, the year taken to begin in March.
    shifted = ibis.cases((month <= 2, year - 1), else_=year)
    from_march = ibis.cases((month <= 2, month + 9), else_=month - 3)

    def divided(value: ir.IntegerValue, by: int) -> ir.IntegerValue:
        return ((value - value % by) / by).round().cast("int64")

    days = (
        shifted * 365
        + divided(shifted, 4)
        - divided(shifted, 100)
        + divided(shifted, 400)
        + divided(from_march * 153 + 2, 5)
        + day
        - 719_469
    )
    exists = (
        (year >= 1)
        & month.between(1, 12)
        & (day >= 1)
        & (day <= length)
        & (hour <= 23)
        & (minute <= 59)
        & (second <= 59)
        & (offset_hour <= 23)
        & (offset_minute <= 59)
    )
    return ibis.cases(
        (exists, days * SECONDS_PER_DAY + hour * 3600 + minute * 60 + second - shift), else_=ibis.null("int64")
    )


def _column_pairs(engine: Engine, table: ir.Table) -> dict[str | None, int]:
    first, second = (column.to_pylist() for column in engine.fetch(table).columns)
    return dict(zip(first, second, strict=True))


def _refuse(
    engine: Engine,
    raw: ir.Table,
    options: ViewOptions,
    broken: Mapping[Rule, int],
    offenders: Mapping[Rule, ir.Table],
) -> None:
    """Raises where a rule of `options.refuse` is broken, naming the first row in the order of the files."""
    for rule in options.refuse:
        if not broken[rule]:
            continue
        first = engine.fetch(offenders[rule].order_by("file", "block", "position").limit(1)).to_pylist()[0]
        file, block, position = first["file"], first["block"], first["position"]
        earlier = (_.file == file) & ((_.block < block) | ((_.block == block) & (_.position < position)))
        row = engine.count(raw.filter(earlier)) + 1
        what, remedy = RULES[rule]
        shown = {name: first[name] for name in ("user_id", "note_id", "timestamp")}
        others = f" (and {broken[rule] - 1} more rows)" if broken[rule] > 1 else ""
        raise ValueError(f"{file}, row {row}: {rule}: {what}: {shown}{others}; {remedy}, or do not refuse {rule}.")
