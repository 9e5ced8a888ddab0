"""Bad rows: each rule finds what it says, counts it once and names its file and row; times are read to the second."""

import csv
from datetime import UTC, date, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairs.engines import connect
from pairs.views import MAX_SECONDS, RULES, ViewOptions, broken_rules_text, list_offenders, read_views
from tests.pairs.reference import random_views, reference_views

DAY = 86_400

# Texts of times and the seconds that they stand for: several for one second, others for none.
TIMES = {
    "86400": DAY,
    "1970-01-02": DAY,
    "1970-01-02T01:00+01:00": DAY,
    "86400.9": DAY,
    "86401": DAY + 1,
    "1970-01-02 00:00:30": DAY + 30,
    "172799": 2 * DAY - 1,
    "172800": 2 * DAY,
    "2024-02-29T12:00:00Z": 1_709_208_000,
    "0": 0,
    str(MAX_SECONDS): MAX_SECONDS,
    str(MAX_SECONDS + 1): MAX_SECONDS + 1,
    "-1": -1,
    "2023-02-29": None,
    "soon": None,
    "": None,
    None: None,
}


@pytest.fixture(scope="module")
def engine():
    with connect(memory_gb=1) as opened:
        yield opened


def as_table(rows, time_type=None):
    user, note, time = zip(*rows, strict=True)
    return pa.table({"user_id": pa.array(user), "note_id": pa.array(note), "timestamp": pa.array(time, time_type)})


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("user_id", "note_id", "timestamp"), *rows])


def left_in(engine, views, users):
    """The views that are left, as (user, note, second); `users`: those with a good row."""
    named = views.log.visits.join(views.log.notes, "note").select("person", "note_id", "timestamp")
    names = sorted(users)  # the numbers of people are in this order
    rows = engine.fetch(named).to_pylist()
    left = {(names[row["person"]], row["note_id"], row["timestamp"]) for row in rows}
    assert len(left) == len(rows) == views.kept
    return left


def offenders_of(engine, views):
    """For each rule that was broken, the places of the rows."""
    found = {}
    for row in engine.fetch(list_offenders(views)).to_pylist():
        found.setdefault(row["rule"], []).append(row["row"] - 1)
    return found


@st.composite
def dirty_logs(draw):
    users = st.sampled_from(("u9", "u10", "ü", "u9", "u10", "", None))
    notes = st.sampled_from(("n2", "n10", "\uff61", "\U0001f600", "n2", "", None))
    good_times = [time for time, second in TIMES.items() if second is not None and 0 <= second <= MAX_SECONDS]
    times = st.sampled_from((*TIMES, *good_times, *good_times))
    size = draw(st.integers(1, 40))
    rows = draw(st.lists(st.tuples(users, notes, times), min_size=size, max_size=size))
    options = ViewOptions(
        max_user_views=draw(st.sampled_from((None, 5000, 1, 3))),
        max_user_views_per_day=draw(st.sampled_from((None, 2, 4))),
        drop_time_backwards=draw(st.booleans()),
    )
    return rows, options, draw(st.none() | st.sets(st.sampled_from(("n2", "n10", "\U0001f600", "never viewed"))))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(dirty_logs())
def test_rules_equal_plain_python(engine, case):
    rows, options, note_ids = case
    left, broken = reference_views(rows, TIMES, options, note_ids)
    table = as_table(rows, pa.string())
    if not left:
        with pytest.raises(ValueError, match=f"views: no view is left of {len(rows)} rows"):
            read_views(engine, table, options, note_ids)
        return
    views = read_views(engine, table, options, note_ids)
    assert views.rows == len(rows)
    assert views.broken == {rule: len(broken.get(rule, ())) for rule in RULES}
    assert offenders_of(engine, views) == broken
    dropped = sum(views.broken.values()) - (0 if options.drop_time_backwards else views.broken["time_backwards"])
    assert views.kept + dropped == views.rows
    good = reference_views(rows, TIMES, ViewOptions(max_user_views=None), note_ids)[0]
    assert left_in(engine, views, {user for user, _, _ in good}) == left


def test_each_rule_shows_in_the_reference():
    """Negative control: without a rule the reference says something else."""
    rows = [(user, note, str(time)) for user, note, time in random_views(1)]
    seconds = {time: int(time) for _, _, time in rows}
    left, broken = reference_views(rows, seconds, ViewOptions())
    for options in ({"max_user_views": 3}, {"max_user_views_per_day": 2}, {"drop_time_backwards": True}):
        assert reference_views(rows, seconds, ViewOptions(**options)) != (left, broken)
    assert reference_views(rows, seconds, ViewOptions(), {rows[0][1]}) != (left, broken)


GOOD = [("u", "a", "100"), ("v", "a", "100"), ("u", "b", "200")]
# For each rule a row that breaks it after those of GOOD, and what is needed to break it.
BREAKS = {
    "empty_user_id": (("", "a", "300"), {}),
    "empty_note_id": (("u", "", "300"), {}),
    "bad_timestamp": (("u", "a", "yesterday"), {}),
    "timestamp_range": (("u", "a", "1700000000000"), {}),
    "unknown_note": (("u", "unheard of", "300"), {}),
    "duplicate_view": (("u", "b", "1970-01-01T00:03:20Z"), {}),
    "time_backwards": (("u", "c", "50"), {"drop_time_backwards": True}),
    "bot": (("w", "c", "300"), {"max_user_views_per_day": 3}),
    "user_cap": (("w", "a", "300"), {"max_user_views": 3}),
}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("rule", RULES)
def test_a_refused_row_is_named(engine, tmp_path, rule, kind):
    """It is the third row of the second file of a folder."""
    bad, options = BREAKS[rule]
    later = [("w", note, str(400 + place)) for place, note in enumerate("abc")] if rule in ("bot", "user_cap") else []
    files = {"day=1/a": GOOD, "day=2/b": [("x", "a", "100"), ("x", "b", "200"), bad, *later]}
    for name, rows in files.items():
        path = tmp_path / f"{name}.{kind}"
        path.parent.mkdir()
        write_csv(path, rows) if kind == "csv" else pq.write_table(as_table(rows), path)
    (tmp_path / "_SUCCESS").touch()

    options = {"max_user_views": None, **options}
    notes = list("abc") if rule == "unknown_note" else None
    others = tuple(set(RULES) - {rule})  # negative control
    views = read_views(engine, tmp_path, ViewOptions(**options, refuse=others), notes)
    assert views.broken == {name: 0 for name in RULES} | {rule: 4 if rule == "bot" else 1}
    assert f" dropped by {rule}: {RULES[rule][0]}" in broken_rules_text(views, ViewOptions(**options))
    with pytest.raises(ValueError) as caught:
        read_views(
            engine, str(tmp_path), ViewOptions(**options, refuse=(rule,) if kind == "csv" else tuple(RULES)), notes
        )
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/day=2/b.{kind}, row 3: {rule}: {RULES[rule][0]}: ")
    assert "\n" not in message
    assert message.endswith(f"{RULES[rule][1]}, or do not refuse {rule}.")
    assert bad[2] in message


def test_the_first_rule_that_a_row_breaks_counts(engine):
    rows = [("", "", "soon"), ("u", "", "soon"), ("u", "x", "soon"), ("u", "x", "-5"), ("u", "x", "5"), ("u", "a", "5")]
    views = read_views(engine, as_table(rows), note_ids=["a"])
    expected = ("empty_user_id", "empty_note_id", "bad_timestamp", "timestamp_range", "unknown_note")
    assert [rule for rule, count in views.broken.items() if count] == list(expected)
    assert offenders_of(engine, views) == {rule: [place] for place, rule in enumerate(expected)}


def test_notes_that_nobody_viewed_have_no_users(engine):
    views = read_views(engine, as_table(GOOD), note_ids=["b", "a", "z"])
    notes = engine.fetch(views.log.notes.order_by("note")).to_pydict()
    assert notes == {"note": [0, 1, 2], "note_id": ["a", "b", "z"], "users": [2, 1, 0]}
    assert (views.log.num_users, views.log.encounters) == (2, 1)


def test_the_latest_views_stay_and_of_one_second_those_of_the_last_ids(engine):
    rows = [("u", note, str(time)) for note, time in (("n9", 7), ("n10", 7), ("a", 7), ("z", 6), ("z", 8))]
    views = read_views(engine, as_table(rows), ViewOptions(max_user_views=2))
    assert left_in(engine, views, {"u"}) == {("u", "z", 8), ("u", "n9", 7)}


def test_rows_that_go_back_are_kept_unless_told(engine):
    rows = [("u", "a", "9"), ("v", "a", "1"), ("u", "b", "5"), ("u", "c", "6"), ("u", "d", "9")]
    kept, dropped = (
        read_views(engine, as_table(rows), ViewOptions(drop_time_backwards=drop)) for drop in (False, True)
    )
    assert (kept.kept, kept.broken["time_backwards"]) == (5, 1)
    assert (dropped.kept, dropped.broken["time_backwards"]) == (4, 1)
    assert "1 kept by time_backwards" in broken_rules_text(kept, ViewOptions())
    assert offenders_of(engine, kept) == offenders_of(engine, dropped) == {"time_backwards": [2]}


def test_nothing_broken_is_an_empty_table(engine):
    views = read_views(engine, as_table(GOOD))
    offenders = engine.fetch(list_offenders(views))
    assert offenders.num_rows == 0
    assert offenders.column_names == ["rule", "file", "row", "user_id", "note_id", "timestamp"]
    assert broken_rules_text(views, ViewOptions()).strip().startswith("3 rows read, 3 views kept, from ")
    assert len(broken_rules_text(views, ViewOptions()).splitlines()) == 1


@pytest.mark.parametrize(("rows", "found"), [([("u", "a", "soon")] * 2, "2 bad_timestamp"), ([], "it is empty")])
def test_no_view_left_is_an_error(engine, tmp_path, rows, found):
    write_csv(tmp_path / "views.csv", rows)
    with pytest.raises(ValueError, match=rf"views.csv: no view is left of {len(rows)} rows \({found}\): see the log"):
        read_views(engine, tmp_path / "views.csv")


# Times


def read_times(engine, times, time_type=None, **options):
    """The second that each time stands for; "range" where it is out of range, None where it is no time."""
    users = [f"{place:04}" for place in range(len(times))]
    rows = [("0000 good", "n", 0 if time_type is not None else "0")]
    if time_type is not None and pa.types.is_temporal(time_type):
        rows = [("0000 good", "n", None)]
    rows += [(user, "n", time) for user, time in zip(users, times, strict=True)]
    views = read_views(engine, as_table(rows, time_type), ViewOptions(**options))
    good = {row[0] for row in rows}
    answers = {}
    for row in engine.fetch(list_offenders(views)).to_pylist():
        good.discard(row["user_id"])
        answers[row["user_id"]] = {"timestamp_range": "range", "bad_timestamp": None}[row["rule"]]
    answers |= {user: second for user, _, second in left_in(engine, views, good)}
    return [answers[user] for user in users]


def seconds_of(text):
    """What Python makes of a text, by its rules and ours: no zone is UTC, fractions are cut off."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    time = time if time.tzinfo else time.replace(tzinfo=UTC)
    second = (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)
    return second if 0 <= second <= MAX_SECONDS else "range"


DAYS = [f"{year:04}-{month:02}-{day:02}" for year in (1970, 2000, 2023, 2024, 2100) for month in range(14) for day in
        (0, 1, 28, 29, 30, 31, 32)]  # fmt: skip
CLOCKS = ["00:00", "23:59:59", "24:00", "24:00:00", "12:60", "12:00:60", "23:59:59.999999", "12:34:56,5", "07:00:00.1"]
ZONES = ["", "Z", "+00:00", "-00:01", "+05:30", "-0330", "+14:00", "+09", "+23:59", "+24:00"]


def test_iso_8601_is_read_as_python_does(engine):
    texts = [
        *DAYS,
        "0000-01-01",
        "0001-01-01",
        "9999-12-31",
        "1969-12-31T23:59:59.9",
        "5000-01-01",
        "5000-01-01T00:00:01",
    ]
    texts += [f"2024-02-29{gap}{clock}{zone}" for clock in CLOCKS for zone in ZONES for gap in "T "]
    texts += ["1970-01-01T00:59+01:00", "1970-01-01T01:00+01:00", "1969-12-31T23:00-01:00"]
    found = dict(zip(texts, read_times(engine, texts), strict=True))
    assert found == {text: seconds_of(text) for text in texts}
    assert {"range", None, 0, 1_709_164_800} <= set(found.values())


NO_TIMES = ["", " ", "2024-01", "2024-1-1", "01.01.2024", "2024-01-01T", "2024-01-01T10", "2024-W01-1", "5 ", "1e9",
            "2024-01-01T10:00:", "2024-01-01T10:00 UTC", "2024-01-01t10:00", " 2024-01-01", "2024-01-01\n", "5\n",
            "0x1", "1_000", "nan", "٣", "１２", "--5", "9" * 19, "2024-01-01T10:00:00.", "2024-01-01T10:00Zulu",
            "2024-01-01T10:00-12:60"]  # fmt: skip


def test_no_times(engine):
    assert read_times(engine, NO_TIMES) == [None] * len(NO_TIMES)


def test_integers_as_texts(engine):
    found = {"0": 0, "-0": 0, "+7": 7, "007": 7, "7.": 7, "7.999": 7, "-0.5": "range", "-1": "range", "9" * 18: "range"}
    found |= {str(MAX_SECONDS): MAX_SECONDS, str(MAX_SECONDS + 1): "range", f"{MAX_SECONDS}.5": MAX_SECONDS}
    assert read_times(engine, list(found)) == list(found.values())
    assert read_times(engine, ["1999", "-1", "-0.5", "2000.5", "1999-01-01"], time_unit="ms") == [
        1, "range", "range", 2, 915_148_800]  # fmt: skip


@pytest.mark.parametrize(("unit", "per_second"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
@pytest.mark.parametrize("as_text", [False, True])
def test_units_are_exact_beyond_what_floats_hold(engine, unit, per_second, as_text):
    seconds = (0, 1, 1_700_000_000, 9_007_199, 9_007_200, 9_223_372_035)
    times = [second * per_second + more for second in seconds for more in (0, per_second - 1)]
    assert unit != "ns" or max(times) > 2**53
    expected = [second for second in seconds for _ in range(2)] + ["range"]
    times = [*times, -1]
    found = read_times(
        engine, list(map(str, times)) if as_text else times, None if as_text else pa.int64(), time_unit=unit
    )
    if as_text and unit == "ns":  # more digits than a text may have
        expected = [None if len(str(time)) > 18 else second for time, second in zip(times, expected, strict=True)]
    assert found == expected


def test_integers_at_the_edges(engine):
    times = [0, MAX_SECONDS, MAX_SECONDS + 1, -1, 2**63 - 1, -(2**63), None]
    expected = [0, MAX_SECONDS, "range", "range", "range", "range", None]
    assert read_times(engine, times, pa.int64()) == expected


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Kolkata"])
def test_native_timestamps(engine, unit, zone):
    times = [datetime(1970, 1, 1, tzinfo=UTC), datetime(2024, 2, 29, 23, 59, 59, tzinfo=UTC), None]
    expected = [0, 1_709_251_199, None]
    if unit != "s":
        times += [datetime(2024, 2, 29, 23, 59, 59, 999_000, UTC), datetime(1969, 12, 31, 23, 59, 59, 999_000, UTC)]
        expected += [1_709_251_199, "range"]
    if zone is None:
        times = [time and time.replace(tzinfo=None) for time in times]
    assert read_times(engine, times, pa.timestamp(unit, zone)) == expected


def test_days(engine):
    assert read_times(engine, [date(1970, 1, 2), date(2024, 2, 29)], pa.date32()) == [DAY, 1_709_164_800]


# Tables in memory


def test_ids_may_be_integers_and_columns_may_have_other_names(engine):
    table = pa.table({"who": [10, 9], "what": pa.array(["a", "b"]).dictionary_encode(), "when": [1, 2], "more": [0, 0]})
    options = ViewOptions(user_column="who", note_column="what", time_column="when")
    assert left_in(engine, read_views(engine, table, options), {"9", "10"}) == {("10", "a", 1), ("9", "b", 2)}


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user_id", [1.5], "views: column 'user_id' is double; give texts or integers"),
        ("note_id", [b"n"], "views: column 'note_id' is binary; give texts or integers"),
        ("timestamp", [1.5], "views: column 'timestamp' is double; give integers, ISO 8601 texts or timestamps"),
        ("timestamp", None, r"views: no column 'timestamp', only \['user_id', 'note_id'\]; say which"),
    ],
)
def test_tables_of_other_kinds_are_refused(engine, column, values, message):
    columns = {"user_id": ["u"], "note_id": ["n"], "timestamp": [1], column: values}
    with pytest.raises(ValueError, match=message):
        read_views(engine, pa.table({name: value for name, value in columns.items() if value is not None}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("time_unit", "min"), ("max_user_views", 0), ("max_user_views_per_day", 0), ("refuse", ("late",))],
)
def test_bad_options_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"{field}=.*: (give|use) "):
        ViewOptions(**{field: value})
