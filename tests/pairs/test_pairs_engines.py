"""DuckDB and Spark give the same tables, from every kind of file, and refuse the same faults; no test is skipped."""

import builtins
import gzip
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from pyspark.sql import SparkSession

from pairs import engines
from pairs.build import main
from pairs.engines import SparkEngine, connect
from pairs.query import SECONDS_PER_DAY, PairOptions, Score, related_pairs
from pairs.split import SplitOptions, load_split, make_splits
from pairs.tables import load_pairs
from pairs.views import ViewOptions, list_offenders, read_views
from tests.pairs.reference import NOTES, as_rows, random_views, reference_pairs

COLUMNS = ("user_id", "note_id", "timestamp")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def duckdb_engine():
    with connect(memory_gb=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def session():
    builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    builder = builder.config("spark.driver.host", "127.0.0.1").config("spark.driver.bindAddress", "127.0.0.1")
    builder = builder.config("spark.sql.shuffle.partitions", "2").config("spark.ui.showConsoleProgress", "false")
    # To optimize and compile what runs on a few rows takes longer than to run it.
    builder = builder.config("spark.driver.extraJavaOptions", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
    builder = builder.config("spark.sql.codegen.wholeStage", "false").config("spark.sql.adaptive.enabled", "false")
    builder = builder.config("spark.sql.codegen.factoryMode", "NO_CODEGEN").config("spark.driver.memory", "1g")
    builder = builder.config("spark.sql.session.timeZone", "America/New_York")  # must not change an answer
    opened = builder.getOrCreate()
    yield opened
    opened.stop()


@pytest.fixture(scope="module")
def spark_engine(session):
    with connect("spark", spark_session=session) as opened:
        yield opened


def as_table(rows):
    return pa.table(dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True)))


# Pairs


@pytest.fixture(scope="module")
def both(duckdb_engine, spark_engine):
    """The views of one log on both engines."""
    rows = random_views(11, views=120, users=9, notes=9)
    return rows, [(engine, read_views(engine, as_table(rows)).log) for engine in (duckdb_engine, spark_engine)]


@pytest.mark.parametrize("score", get_args(Score))
def test_both_engines_give_identical_pairs(both, score):
    rows, logs = both
    options = {
        "count": PairOptions(window_days=1, direction="forward", min_count=2),
        "inverse_activity": PairOptions(window_days=0.5, max_as_related=3),
        "cosine": PairOptions(window_days=1, top_k=3, min_score=0.2, max_score=0.9),
        "lift": PairOptions(window_days=1, direction="forward", min_note_users=3),
        "swing": PairOptions(window_days=1, max_swing_users=4),
    }[score]
    options = replace(options, score=score)
    eligible = NOTES[:8] if score in ("cosine", "swing") else None
    tables = []
    for engine, log in logs:
        wanted = None
        if eligible is not None:
            known = engine.from_arrow(pa.table({"note_id": list(eligible)}))
            wanted = log.notes.semi_join(known, "note_id").select("note")
        tables.append(engine.fetch(related_pairs(log, options, engine, wanted)))
    assert tables[0].equals(tables[1])
    assert as_rows(tables[1].to_pydict()) == reference_pairs(rows, options, eligible)
    assert tables[0].num_rows > 10
    assert not tables[0].equals(tables[1].set_column(2, "score", pc.add(tables[1]["score"], 1e-9)))  # negative control


# Files


def dirty_rows(seed, count=40):
    """A log with rows that break every rule about rows; times are ISO 8601 with zones, or integers, as texts."""
    rng = random.Random(seed)
    rows = []
    for place in range(count):
        second = 1_700_000_000 + rng.randrange(-3, 9) * 7_000
        zone = rng.choice(("Z", "+00:00", "+05:30", "-0800"))
        offset = {"+05:30": 19_800, "-0800": -28_800}.get(zone, 0)
        iso = datetime.fromtimestamp(second + offset, UTC).strftime("%Y-%m-%dT%H:%M:%S") + zone
        user, note = (
            rng.choice(("u1", "u2", "u10", "Zoë", "\uff61")),
            rng.choice(("7", "07", "10", "笔 记", "\U0001f600")),
        )
        rows.append((user, note, iso if place % 2 else str(second)))
    rows[3] = rows[2]
    rows[5:10] = [("", "7", "1"), ("u1", "", "2"), ("u1", "7", "soon"), ("u2", "7", "-9"), ("u1", "unheard of", "5")]
    return rows


def write_log(folder, name, kind, rows):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        pq.write_table(as_table(rows), path, row_group_size=7)
        return
    if kind == "csv":
        sink = pa.BufferOutputStream()
        pa_csv.write_csv(as_table(rows), sink)
        data = sink.getvalue().to_pybytes()
    else:
        data = "".join(json.dumps(dict(zip(COLUMNS, row, strict=True))) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


LOGS = {
    "csv": ("csv", ["views.csv"], "views.csv"),
    "csv, several": ("csv", ["some 1+2.csv", "some é.csv.gz", "other.txt"], "some*"),
    "jsonl, several": ("jsonl", ["in/a.jsonl.gz", "in/b.ndjson"], "in"),
    "parquet, partitioned": ("parquet", ["v/day=2024-01-01/part-0.parquet", "v/day=2024-01-02/part-0.parquet"], "v"),
}


@pytest.mark.parametrize("case", LOGS)
def test_both_engines_read_alike(duckdb_engine, spark_engine, tmp_path, case):
    kind, names, pattern = LOGS[case]
    rows = dirty_rows(2, 40 * len(names))
    for place, name in enumerate(names):
        write_log(tmp_path, name, kind, rows[place * 40 :][:40])
    if (tmp_path / pattern).is_dir():
        (tmp_path / pattern / "_SUCCESS").touch()
        (tmp_path / pattern / "_temporary").mkdir()
        (tmp_path / pattern / "_temporary" / "half").write_text("?")
    capped = {"max_user_views": 4, "max_user_views_per_day": 5} if case == "csv" else {}  # each takes Spark a while
    options = ViewOptions(**capped)
    notes = ["7", "07", "10", "笔 记", "\U0001f600"]
    found = [read_found(engine, tmp_path / pattern, options, notes) for engine in (duckdb_engine, spark_engine)]
    assert found[0] == found[1]
    rows_of, broken, offenders, visits = found[0]
    assert rows_of == 40 * sum(not name.endswith(".txt") for name in names)
    assert {rule for rule in broken if not broken[rule]} == (set() if capped else {"bot", "user_cap"})
    assert {row["file"] for row in offenders} == {str(tmp_path / name) for name in names if not name.endswith(".txt")}
    # Negative control, and what the rows say is what was written.
    assert found[0] != read_found(duckdb_engine, tmp_path / pattern, replace(options, max_user_views=3), notes)
    for row in offenders:
        place = 40 * [str(tmp_path / name) for name in names].index(row["file"]) + row["row"] - 1
        assert tuple(row[name] or "" for name in COLUMNS) == rows[place]


def read_found(engine, path, options=None, notes=None):
    views = read_views(engine, path, options, notes)
    named = views.log.visits.join(views.log.notes, "note").select("note_id", "timestamp")
    visits = sorted(map(tuple, (row.values() for row in engine.fetch(named).to_pylist())))
    return views.rows, views.broken, engine.fetch(list_offenders(views)).to_pylist(), visits


def test_rows_of_a_text_that_spark_divides_stay_in_order(session, spark_engine, tmp_path):
    rows = [("u", f"n{place:03}", str(place)) for place in range(200)]
    for name in ("b.csv", "a.csv"):
        write_log(tmp_path, name, "csv", rows)
    session.conf.set("spark.sql.files.maxPartitionBytes", "500b")
    table = spark_engine.read(str(tmp_path), COLUMNS)
    session.conf.unset("spark.sql.files.maxPartitionBytes")
    found = spark_engine.fetch(table.order_by("file", "block", "position")).to_pydict()
    assert found["note_id"] == [note for _, note, _ in rows] * 2
    assert len(set(found["block"])) > 3
    assert found["position"] != sorted(found["position"])  # negative control: alone it does not tell


SECONDS = [1_700_000_000, 1_700_000_001, 1_700_000_000, 0, 5]
NATIVE = [datetime.fromtimestamp(second, UTC).replace(microsecond=250_000) for second in SECONDS]
TYPES = {
    "int64": (pa.array([10, 9, 10, 8, 10]), pa.array(SECONDS, pa.int64())),
    "int32": (pa.array([10, 9, 10, 8, 10], pa.int32()), pa.array(SECONDS, pa.int32())),
    "timestamp": (
        pa.array(list("abaca")),
        pa.array([time.replace(tzinfo=None) for time in NATIVE], pa.timestamp("us")),
    ),
    "timestamp with zone": (pa.array(list("abaca")), pa.array(NATIVE, pa.timestamp("ms", "Asia/Kolkata"))),
}


@pytest.mark.parametrize("case", TYPES)
def test_both_engines_read_types_of_parquet_alike(duckdb_engine, spark_engine, tmp_path, case):
    ids, times = TYPES[case]
    table = pa.table({"who": ids, "note": ids, "at": times, "notellm2": pa.array([None] * 5, pa.float64())})
    pq.write_table(table, tmp_path / "views.parquet")
    options = ViewOptions(user_column="who", note_column="note", time_column="at")
    found = [read_found(engine, tmp_path / "views.parquet", options) for engine in (duckdb_engine, spark_engine)]
    assert found[0] == found[1]
    names = map(str, ids.to_pylist())
    assert found[0][3] == sorted(set(zip(names, SECONDS, strict=True)))
    assert found[0][1]["time_backwards"] == found[0][1]["duplicate_view"] == 1


def test_a_partition_may_be_the_time(duckdb_engine, spark_engine, tmp_path):
    for day in ("2024-01-01", "2024-01-02"):
        write_log(tmp_path, f"day={day}/a.csv", "csv", [("u", "a", "x"), ("u", day[-1], "x")])
    options = ViewOptions(time_column="day")
    found = [read_found(engine, tmp_path, options) for engine in (duckdb_engine, spark_engine)]
    first = 1_704_067_200
    assert found[0] == found[1]
    assert found[0][3] == [("1", first), ("2", first + 86_400), ("a", first), ("a", first + 86_400)]


def test_duckdb_reads_and_writes_what_fsspec_reaches(duckdb_engine, tmp_path):
    rows = random_views(2)
    write_log(tmp_path, "views.csv", "csv", rows)
    filesystem = fsspec.filesystem("memory")
    for day in (1, 2):
        filesystem.pipe(f"/engines/day={day}/views.csv", (tmp_path / "views.csv").read_bytes())
    views = read_views(duckdb_engine, "memory://engines/day=*/views.csv")
    assert views.rows == 2 * len(rows)
    offenders = duckdb_engine.fetch(list_offenders(views)).to_pylist()
    assert {row["file"] for row in offenders} == {f"memory:///engines/day={day}/views.csv" for day in (1, 2)}
    pairs = related_pairs(views.log, PairOptions(), duckdb_engine)
    duckdb_engine.write_folder(pairs, "memory://engines/pairs")
    with filesystem.open("/engines/pairs/part-0.parquet") as file:
        assert as_rows(pq.read_table(file).to_pydict()) == reference_pairs(rows, PairOptions())
    with pytest.raises(ValueError, match="memory://engines/pairs: is there already; remove it"):
        duckdb_engine.write_folder(pairs, "memory://engines/pairs")


def test_csv_of_other_programs(duckdb_engine, tmp_path):
    """A byte order mark, line ends of Windows, an index without a name, texts in quotes, lines of comment signs."""
    lines = [
        "\ufeff,user_id,note_id,more,timestamp,more",
        '0,"u","a ""b"", c",,5,',
        "1,#u,  a ,x,6,y",
        "",
        '2,u,"\nb",,7,',
    ]
    text = "\r\n".join(lines) + "\r\n"
    (tmp_path / "views.csv").write_text(text, encoding="utf-8", newline="")
    _, _, _, visits = read_found(duckdb_engine, tmp_path / "views.csv")
    assert visits == [("\nb", 7), ("  a ", 6), ('a "b", c', 5)]


# Faults

HEADER = "user_id,note_id,timestamp\n"
ROW = '{"user_id": "u", "note_id": "a", "timestamp": 1}\n'
# Files, what is read of them, and a pattern of the error.
FAULTS = {
    "unknown suffix": ({"views.txt": "x"}, "views.txt", "views.txt is of an unknown kind; give files in .csv"),
    "mixed kinds": ({"in/a.csv": HEADER, "in/b.jsonl": "{}"}, "in", r"holds files of several kinds \(csv, jsonl\)"),
    "missing column": ({"a.csv": "user,note_id,timestamp\nu,n,1\n"}, "a.csv", r"no column 'user_id', only \['user', "),
    "no header": ({"a.csv": "u,a,1\nu,b,2\n"}, "a.csv", r"no column 'user_id', only \['u', 'a', '1'\]; say which"),
    "short row": ({"a.csv": HEADER + "u,a,1\n", "b.csv": HEADER + "u,a,1\nx,y\n"}, "?.csv", "b.csv.*x,y|x,y.*b.csv"),
    "long row": ({"a.csv": HEADER + "u,a,1\nx,y,2,3\n"}, "a.csv", "(row 2|Line: 3).*x,y,2,3"),
    "open quote": ({"a.csv": HEADER + 'u,a,1\nu,"b,3\n'}, "a.csv", '(row 2|Line: 3).*u,"b,3'),
    "other header": ({"in/a.csv": HEADER, "in/b.csv": "note_id,user_id,timestamp\na,u,2\n"}, "in", "header"),
    "broken JSON": ({"a.jsonl": ROW + "{bad\n{}\n"}, "a.jsonl", "(row|line) [23]"),
    "no object": ({"a.jsonl": ROW + "5\n"}, "a.jsonl", "(row|line) 2.*5"),
    "no Parquet": ({"a.parquet": "user_id"}, "a.parquet", r"not readable \(.*repair or convert it"),
    "empty folder": ({"in/_SUCCESS": ""}, "in", "no such file or folder, or nothing in it; give files in .csv"),
    "no such file": ({}, "views.csv", "no such file or folder, or nothing in it; give files in .csv"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_named_in_one_line(duckdb_engine, spark_engine, tmp_path, case):
    files, pattern, message = FAULTS[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for engine in (duckdb_engine, spark_engine):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            read_views(engine, tmp_path / pattern)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(tmp_path / pattern))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user_id", [1.5], r"column 'user_id' is double; give texts or integers"),
        ("note_id", [["n"]], r"column 'note_id' is .*; give texts or integers"),
        ("timestamp", [1.5], r"column 'timestamp' is double; give integers, ISO 8601 texts or timestamps"),
        (
            "timestamp",
            None,
            r"no column 'timestamp', only \['user_id', 'note_id'\]; say which one it is with an option",
        ),
    ],
)
def test_columns_of_other_types_are_refused(duckdb_engine, spark_engine, tmp_path, column, values, message):
    columns = {"user_id": ["u"], "note_id": ["n"], "timestamp": [1], column: values}
    path = tmp_path / "views.parquet"
    pq.write_table(pa.table({name: value for name, value in columns.items() if value is not None}), path)
    for engine in (duckdb_engine, spark_engine):
        with pytest.raises(ValueError, match=f"(?i){path}: {message}"):
            read_views(engine, path)


def test_urls_that_nothing_reads(duckdb_engine, spark_engine):
    with pytest.raises(ValueError, match="teleport://views.csv: no file system for this URL"):
        read_views(duckdb_engine, "teleport://views.csv")
    with pytest.raises(ValueError, match='teleport://views.csv: not readable .*No FileSystem for scheme "teleport"'):
        read_views(spark_engine, "teleport://views.csv")


def test_nanoseconds_are_refused_by_spark_alone(duckdb_engine, spark_engine, tmp_path):
    table = pa.table({"user_id": ["u"], "note_id": ["n"], "timestamp": pa.array([10**18], pa.timestamp("ns"))})
    pq.write_table(table, tmp_path / "views.parquet")
    assert read_found(duckdb_engine, tmp_path / "views.parquet")[3] == [("n", 10**9)]
    with pytest.raises(ValueError, match=r"views.parquet: not readable .*TIMESTAMP\(NANOS.*repair or convert it"):
        read_views(spark_engine, tmp_path / "views.parquet")


# Opening and closing


def test_a_session_is_left_as_it_was(session, tmp_path):
    def state():
        settings = {row.key: row.value for row in session.sql("SET").collect()}
        return settings, sorted(row.tableName for row in session.sql("SHOW TABLES").collect())

    before = state()
    with connect("spark", spark_session=session, temp_dir=str(tmp_path)) as engine:
        assert engine.session is session
        views = read_views(engine, as_table([("u", "a", 1), ("u", "b", 2)]))
        assert views.kept == 2
        assert session.conf.get("spark.sql.session.timeZone") == "UTC"
        assert state() != before  # negative control
        assert list(tmp_path.iterdir())
    assert state() == before
    assert not list(tmp_path.iterdir())
    assert session.range(3).count() == 3


def test_the_command_uses_the_open_session_and_lets_it_be(session, duckdb_engine, tmp_path):
    rows = random_views(4)
    write_log(tmp_path, "views.parquet", "parquet", rows)
    arguments = ["--views", str(tmp_path / "views.parquet"), "--engine", "spark", "--score", "swing"]
    main([*arguments, "--output", str(tmp_path / "pairs.parquet"), "--spark-master", "local[2]"])
    expected = reference_pairs(rows, PairOptions(score="swing"))
    assert as_rows(load_pairs(tmp_path / "pairs.parquet")) == expected
    main([*arguments, "--output", str(tmp_path / "pairs")])
    assert as_rows(pq.read_table(tmp_path / "pairs").to_pydict()) == expected
    assert session.range(3).count() == 3
    with pytest.raises(ValueError, match=r"spark_master='local\[7\]': a session on 'local\[2\]' is open"):
        connect("spark", spark_master="local[7]")


def test_folders_are_not_overwritten(spark_engine, tmp_path):
    table = spark_engine.from_arrow(pa.table({"x": [1]}))
    with pytest.raises(ValueError, match="is there already; remove it or give another path"):
        spark_engine.write_folder(table, str(tmp_path))


def test_nothing_of_duckdb_is_left(tmp_path):
    with connect(temp_dir=str(tmp_path)) as engine:
        read_views(engine, as_table([("u", "a", 1)]))
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_without_pyspark(monkeypatch, tmp_path, capsys):
    load = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyspark"):
            raise ImportError(f"No module named {name!r}")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ImportError, match=r"engine='spark' needs PySpark 4 and Java 17: pip install 'notellm2\[spark\]'"
    ):
        SparkEngine(None, None, 1.0, None, False)
    with pytest.raises(SystemExit):
        main(["--views", "views.csv", "--output", str(tmp_path / "pairs.csv"), "--engine", "spark"])
    assert "error: engine='spark' needs PySpark 4 and Java 17" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "pandas"}, "engine='pandas': use one of"),
        ({"memory_gb": 0}, "memory_gb=0: give a number above 0"),
        ({"spark_master": "local"}, "spark_master='local' needs engine='spark'"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        connect(**arguments)


@pytest.mark.parametrize("case", ["short row", "broken JSON", "no such file"])
def test_the_command_tells_faults_in_one_line(tmp_path, capsys, case):
    files, pattern, message = FAULTS[case]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as caught:
        main(["--views", str(tmp_path / pattern), "--output", str(tmp_path / "pairs.csv")])
    assert caught.value.code == 2
    assert f"error: {tmp_path / pattern}" in capsys.readouterr().err.splitlines()[-1]
    assert not Path(tmp_path / "pairs.csv").exists()


def test_engines_have_no_public_name_that_all_forgets():
    public = {name for name, value in vars(engines).items() if getattr(value, "__module__", None) == engines.__name__}
    assert {name for name in public if name[0] != "_"} <= set(engines.__all__)


def many_views(seed, users, notes, views):
    """A log of 20 days that is large enough to be divided."""
    rng = random.Random(seed)
    return [
        (f"u{rng.randrange(users)}", f"n{int(notes * rng.random() ** 2)}", str(rng.randrange(20 * SECONDS_PER_DAY)))
        for _ in range(views)
    ]


def test_a_session_of_its_own_as_the_command_opens_it(tmp_path):
    """In a process of its own, with Spark's defaults: several partitions, adaptive plans, numbers with gaps."""
    rows = many_views(3, users=60, notes=40, views=1500)
    pq.write_table(as_table(rows), tmp_path / "views.parquet")
    tables = []
    for name, options in (("duckdb", []), ("spark", ["--spark-master", "local[2]", "--memory-gb", "1"])):
        command = [sys.executable, "-m", "pairs.build", "--views", str(tmp_path / "views.parquet"), "--engine", name]
        command += ["--output", str(tmp_path / f"{name}.parquet"), "--score", "lift", "--max-as-related", "7", *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        tables.append(pq.read_table(tmp_path / f"{name}.parquet"))
    assert tables[0].equals(tables[1]) and len(tables[0]) > 100
    # Spark 4.0 and 4.1 leave a folder of their own where they are started.
    left = {path.name for path in tmp_path.iterdir()} - {"artifacts"}
    assert left == {"views.parquet", "duckdb.parquet", "spark.parquet"}


def test_both_engines_split_alike(tmp_path, duckdb_engine, spark_engine):
    views = as_table(many_views(4, users=30, notes=20, views=600))
    notes = Dataset.from_dict({"note_id": sorted(set(views["note_id"].to_pylist()))})
    split = SplitOptions(by="time", test_days=6, validation_days=4)
    for name, engine in (("duckdb", duckdb_engine), ("spark", spark_engine)):
        make_splits(notes, views, PairOptions(score="cosine"), split, tmp_path / name, engine=engine)
    records = [(tmp_path / name / "splits.json").read_text() for name in ("duckdb", "spark")]
    assert records[0] == records[1]
    for part in ("train", "validation", "test"):
        pairs = [load_split(tmp_path / name, part).pairs[:] for name in ("duckdb", "spark")]
        assert pairs[0] == pairs[1] and pairs[0]["note_id"]


def test_a_cluster_needs_a_folder_that_all_machines_reach(session, monkeypatch):
    monkeypatch.setattr(type(session.conf), "get", lambda self, name, default=None: "spark://host:7077")
    for temp_dir in (None, "/tmp/pairs", "file:///tmp/pairs"):
        with pytest.raises(ValueError, match="temp_dir=.*needs a folder that all its machines reach"):
            connect("spark", spark_session=session, temp_dir=temp_dir)
