"""The benchmark of pairs: its logs are what they claim to be, systems agree, and one that does not is caught."""

import json
import math
import sys
from pathlib import Path

import duckdb
import pytest

from benchmarks import pair_systems, spark_shuffle
from benchmarks import pairs as benchmark
from benchmarks.measure import Limits, Usage, measure
from benchmarks.view_log import DAYS, START, LogShape, generate_log

SYSTEMS = ("duckdb", "polars", "pandas")  # Spark equals DuckDB in tests/pairs


def rows_of(path):
    return duckdb.sql(f"SELECT user_id, note_id, timestamp FROM read_parquet('{path}')").fetchall()


def views_by_rank(path):
    """Views of the most viewed note, of the next, and so on."""
    query = f"SELECT count(*) FROM read_parquet('{path}') GROUP BY note_id ORDER BY 1 DESC"
    return [row[0] for row in duckdb.sql(query).fetchall()]


def test_same_shape_and_seed_give_the_same_log(tmp_path):
    first = rows_of(generate_log(LogShape(30_000), tmp_path / "a"))
    assert first == rows_of(generate_log(LogShape(30_000), tmp_path / "b"))
    assert first != rows_of(generate_log(LogShape(30_000, seed=1), tmp_path / "a"))


def test_a_log_is_written_once(tmp_path):
    path = generate_log(LogShape(1_000), tmp_path)
    path.write_bytes(b"as it was")
    assert generate_log(LogShape(1_000), tmp_path).read_bytes() == b"as it was"
    assert list(tmp_path.iterdir()) == [path]


def test_every_user_has_fifty_views_over_four_weeks_and_the_log_is_sorted(tmp_path):
    rows = rows_of(generate_log(LogShape(100_000), tmp_path))
    per_user = {}
    for user, _, time in rows:
        per_user.setdefault(user, []).append((time - START) / 86_400)
    assert len(per_user) == 2_000 and {len(days) for days in per_user.values()} == {50}
    assert len({note for _, note, _ in rows}) <= 1_000
    times = [time for *_, time in rows]
    assert times == sorted(times) and times[0] == START and START < times[-1] < START + DAYS * 86_400
    # Independent times: of a user's 50 views a week has 12.5 on average, with the binomial's deviation.
    of_week = [sum(day < 7 for day in days) for days in per_user.values()]
    mean = sum(of_week) / len(of_week)
    deviation = math.sqrt(sum((count - mean) ** 2 for count in of_week) / len(of_week))
    assert mean == pytest.approx(12.5, abs=0.3) and deviation == pytest.approx(math.sqrt(50 / 4 * 3 / 4), rel=0.1)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_popularity_is_a_power_law(tmp_path, exponent):
    shape = LogShape(200_000, exponent)
    views = views_by_rank(generate_log(shape, tmp_path))
    # Ranks 4 to 63, in bins that double, where bins hold enough views and p(r) is nearly r^-exponent.
    slope = math.log2(sum(views[31:63]) / sum(views[3:7])) / 3 - 1
    assert slope == pytest.approx(-exponent, abs=0.1)


def test_the_most_viewed_note_has_the_share_that_the_formula_says(tmp_path):
    shape = LogShape(200_000)
    share = views_by_rank(generate_log(shape, tmp_path))[0] / shape.views
    assert share == pytest.approx(math.log(2) / math.log(shape.notes + 1), rel=0.03)


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="views=1010: give a multiple of 100"):
        LogShape(1010)
    with pytest.raises(ValueError, match="exponent=-1"):
        LogShape(1000, exponent=-1.0)


def run_job(system, log, folder, **settings):
    output = folder / system
    given = {"score": "count", "min_count": 1, "memory_gb": 0.5, "cores": 1, "temp_dir": str(folder)} | settings
    stages = pair_systems.RUNNERS[system](pair_systems.Job(views=str(log), output=str(output), **given))
    assert list(stages) == ["reading", "counting", "ranking", "writing"]
    return output


@pytest.mark.parametrize("score", ["count", "inverse_activity", "cosine", "lift"])
def test_systems_agree(tmp_path, score):
    log = generate_log(LogShape(3_000), tmp_path)
    outputs = [run_job(system, log, tmp_path, score=score, min_count=15) for system in SYSTEMS]
    assert benchmark.count_rows(outputs[0]) > 50
    for output in outputs[1:]:
        assert benchmark.count_different(output, outputs[0]) == 0


def test_what_differs_is_counted(tmp_path):
    log = generate_log(LogShape(3_000), tmp_path)
    expected = run_job("polars", log, tmp_path)
    total = benchmark.count_rows(expected)
    changes = {
        "score": ("SELECT * REPLACE (score * 1.001 AS score)", total),
        "related": ("SELECT * REPLACE (if(rank = 2, note_id, related_note_id) AS related_note_id)", None),
        "missing": ("SELECT * EXCLUDE n FROM (SELECT *, row_number() OVER () AS n", 1),
        "rounding": ("SELECT * REPLACE (score * (1 + 1e-15) AS score)", 0),
    }
    for name, (select, different) in changes.items():
        folder = tmp_path / name
        folder.mkdir()
        rest = ") WHERE n > 1" if name == "missing" else ""
        source = f"FROM read_parquet('{expected}/*.parquet')"
        duckdb.sql(f"COPY ({select} {source}{rest}) TO '{folder}/part-0.parquet' (FORMAT parquet)")
        found = benchmark.count_different(folder, expected)
        assert found == different if different is not None else found > 0, name
        assert benchmark.count_different(expected, folder) == found, name


def test_the_command_measures_and_prints(tmp_path, capsys):
    output = tmp_path / "runs.json"
    options = ["--views", "3e3", "--systems", "polars", "pandas", "--data", str(tmp_path / "data"), "--min-count", "2"]
    benchmark.main([*options, "--repeat", "2", "--temp-dir", str(tmp_path), "--output", str(output)])
    text = capsys.readouterr().out
    assert "| Views | System | Runs | Time (s)" in text
    assert "| 3,000 | polars | 2 | " in text and "| 3,000 | pandas | 2 | " in text and "counting" in text
    for fact in (
        "- command: ",
        "- commit: ",
        "- hardware: cpu ",
        " memory ",
        "- versions: ",
        " polars ",
        "- min_count: 2",
    ):
        assert fact in text
    content = json.loads(output.read_text())
    assert [run["system"] for run in content["runs"]] == ["polars", "pandas"] * 2  # they take turns
    assert all(run["usage"]["seconds"] > 0 and run["usage"]["peak_memory_gb"] > 0.02 for run in content["runs"])
    assert len({run["pairs"] for run in content["runs"]}) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("notellm2")] == []


def test_a_wrong_result_fails_the_benchmark(tmp_path, capsys, monkeypatch):
    run_system = benchmark.run_system

    def wrong_for_pandas(system, log, output, args, limits):
        if system == "pandas":
            args = benchmark.argparse.Namespace(**vars(args) | {"score": "cosine"})
        return run_system(system, log, output, args, limits)

    monkeypatch.setattr(benchmark, "run_system", wrong_for_pandas)
    options = ["--views", "3e3", "--systems", "polars", "pandas", "--data", str(tmp_path), "--temp-dir", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(options)
    assert stopped.value.code == 1
    assert "pandas and polars differ in " in capsys.readouterr().err


def run_python(code, tmp_path, **limits):
    given = {"memory_gb": 1.0, "seconds": 60.0} | limits
    return measure([sys.executable, "-c", code], tmp_path, Limits(**given))


def test_memory_and_disk_of_a_process_and_its_child_are_measured(tmp_path):
    child = "import time; x = b'x' * 60_000_000; time.sleep(3)"
    code = f"import subprocess, sys, time; x = b'x' * 80_000_000; subprocess.run([sys.executable, '-c', {child!r}])"
    code += "\nimport os; open(os.environ['TMPDIR'] + '/file', 'wb').write(b'x' * 5_000_000); time.sleep(3)"
    usage = run_python(code, tmp_path)
    assert usage.failure is None
    assert 0.14 < usage.peak_memory_gb < 0.25
    assert 0.005 <= usage.peak_disk_gb < 0.006
    assert usage.seconds > 2.5


def test_limits_end_a_process_and_its_children(tmp_path):
    mark = tmp_path / "child"
    child = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); x = b'x' * 300_000_000; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    usage = run_python(code, tmp_path, memory_gb=0.2)
    assert usage.failure == "out of memory (limit 0.2 GB)" and usage.seconds < 30
    gone = Path(f"/proc/{mark.read_text()}/status")
    assert not gone.exists() or "zombie" in gone.read_text()
    usage = run_python("import time; time.sleep(60)", tmp_path, seconds=1.0)
    assert usage.failure == "out of time (limit 1 s)" and usage.seconds < 30
    assert run_python("raise SystemError('broken')", tmp_path).failure == "failed (SystemError: broken)"


def test_a_system_that_failed_is_reported_and_spared_larger_logs(tmp_path, monkeypatch):
    tried = []

    def out_of_memory(system, log, output, args, limits):
        tried.append(log.name)
        return Usage(3.0, 9.0, 0.0, "out of memory (limit 8 GB)"), {}

    monkeypatch.setattr(benchmark, "run_system", out_of_memory)
    args = benchmark.argparse.Namespace(
        views=[2_000, 1_000], systems=["pandas"], repeat=3, exponent=1.0, seed=0, data=str(tmp_path), temp_dir=None,
        memory_limit_gb=8.0, time_limit_s=60.0, generate_only=False,
    )  # fmt: skip
    table = benchmark.markdown_table(benchmark.run_all(args))
    assert tried == ["views-1000-exponent-1-seed-0.parquet"]
    assert "| 1,000 | pandas | 1 | out of memory (limit 8 GB) |" in table
    assert "| 2,000 | pandas | 1 | not tried: out of memory (limit 8 GB) at 1,000 views |" in table


def test_options_that_cannot_be_are_refused(capsys):
    for options, message in (
        (["--views", "1.5"], "give a whole number"),
        (["--views", "10"], "views=10: give a multiple of 100"),
        (["--repeat", "0"], "repeat=0: give 1 or more"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main(options)
        assert message in capsys.readouterr().err


def event(name, **content):
    return json.dumps({"Event": name, **content})


def stage(number, **metrics):
    found = [{"Name": f"internal.metrics.{name.replace('_', '.')}", "Value": value} for name, value in metrics.items()]
    return event("SparkListenerStageCompleted", **{"Stage Info": {"Stage ID": number, "Accumulables": found}})


def job(step, *stages):
    return event("SparkListenerJobStart", **{"Stage IDs": stages, "Properties": {"spark.job.description": step}})


def test_shuffled_bytes_are_summed_by_step():
    lines = [job("counting", 0, 1), stage(0, shuffle_write_bytesWritten=100), stage(1, output_bytesWritten=7)]
    lines += [job("ranking", 2), stage(2, shuffle_write_bytesWritten=40), job("looking", 3)]
    lines += [stage(3, shuffle_write_bytesWritten=999)]
    sums = spark_shuffle.sum_by_step(lines)
    assert sums["counting"]["shuffle_bytes"] == 100 and sums["counting"]["stored_bytes"] == 7
    assert sums["ranking"]["shuffle_bytes"] == 40 and sums["reading"]["shuffle_bytes"] == 0
    table = spark_shuffle.markdown_table(20, {"encounters": 10, "counted": 4}, sums)
    assert "| all | 0.0 | 0 | 7.0 | 14.00 |" in table


def test_the_plan_that_was_run_replaces_the_one_planned():
    start, update = "org.apache.spark.SparkListenerSQLExecutionStart", "x.SparkListenerSQLAdaptiveExecutionUpdate"
    lines = [event(start, executionId=3, description="counting", physicalPlanDescription="planned")]
    lines.append(event(update, executionId=3, physicalPlanDescription="run"))
    assert spark_shuffle.final_plans(lines) == [("counting", "run")]
