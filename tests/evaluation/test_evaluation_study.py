"""Studies: with a runner in the training's place, and once for real through the command."""

import json
import math
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from evaluation import study as module
from evaluation.study import (
    Measurement,
    Run,
    Study,
    collect,
    complete,
    draw_factor,
    plan_runs,
    read_study,
    run_in_own_process,
    select,
    state_of,
    study_tables,
    write_study,
)
from train.arguments import parse_arguments

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
FACTORS = {
    "batch": {"setting": "per_device_train_batch_size", "values": [16, 48, 256]},
    "variant": {"all": {}, "basic": {"prompt": "basic", "late_fusion": "none"}, "text": {"vision": ""}},
}


def write(folder: Path, **changed: Any) -> Path:
    """A study file and its base; `changed` entries are set over it, and None takes one out."""
    base = {"per_device_train_batch_size": 48, "vision_features": "store", "learning_rate": "2e-3", "output_dir": "no"}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    content = {"base": "base.yaml", "seeds": [0, 1, 2], "metric": "recall@10", "output_dir": str(folder / "out")}
    content |= {"settings": {"max_steps": 5}, "factors": FACTORS} | changed
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "mine.yaml"


def write_report(run: Run, recall: float) -> None:
    modalities = ["text"] if run.settings.get("vision") == "" else ["both", "text", "image"]
    chance = 10 / run.settings.get("num_simulated_notes", 40)
    rows = [
        {"system": "chance", "modality": "-", "metrics": {"recall@10": chance, "mrr": 0.1}},
        {"system": "bm25", "modality": "text", "metrics": {"recall@10": 0.99, "mrr": 0.9}},
    ]
    for part, modality in enumerate(modalities, start=1):
        metrics = {"recall@10": recall / part, "mrr": 0.5}
        rows.append({"system": "trained", "modality": modality, "metrics": metrics})
    (run.folder / "report").mkdir(exist_ok=True)
    facts = {"commit": "abc", "train_seconds": 1.0, "validation_recall@10": recall / 4}
    facts |= {"test_notes": 40, "test_queries": 30, "hardware": {"cpu": "Some CPU", "cores": 2}}
    report = {"facts": facts, "rows": rows}
    (run.folder / "report" / "report.json").write_text(json.dumps(report))


def write_checkpoint(run: Run, whole: bool = True) -> Path:
    folder = run.folder / "checkpoint-2"
    folder.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, folder / name)
    save_file({"weight": torch.rand(2)}, folder / "model.safetensors")
    if whole:
        (folder / "trainer_state.json").write_text("{}")
    return folder


class FakeTraining:
    """Writes weights and a report, and keeps what it was asked for."""

    def __init__(self, failing: Mapping[str, str] | None = None) -> None:
        self.calls: list[tuple[str, bool]] = []
        self.failing = failing or {}

    def __call__(self, run: Run, resume: bool) -> int:
        self.calls.append((run.name, resume))
        assert yaml.safe_load((run.folder / "config.yaml").read_text()) == run.settings
        if run.name in self.failing:
            run.log.write_text(self.failing[run.name])
            return 3
        (run.folder / "model.safetensors").write_text("weights")
        (run.folder / "backbones").mkdir(exist_ok=True)
        (run.folder / "settings.yaml").write_text("a: 1")
        recalls = {("batch=16", 0): 0.5, ("batch=16", 1): 0.6, ("batch=16", 2): 0.7}
        write_report(run, recalls.get((run.name.rsplit("-", 1)[0], run.settings["seed"]), 0.9))
        return 0


def distinct(study: Study) -> list[Run]:
    return list({trial.run.key: trial.run for trial in plan_runs(study)}.values())


def finish(study: Study, runner: Any) -> dict[str, str]:
    return complete(study, distinct(study), runner, lambda failures: None)


def test_equal_settings_are_one_run(tmp_path: Path):
    study = read_study(write(tmp_path))
    trials = plan_runs(study)
    assert len(trials) == 6 * 3 and len(distinct(study)) == 5 * 3
    keys = {(trial.factor, trial.value, trial.seed): trial.run.key for trial in trials}
    assert keys["batch", "48", 1] == keys["variant", "all", 1]
    assert keys["batch", "48", 1] not in (keys["batch", "48", 0], keys["batch", "16", 1], keys["variant", "basic", 1])
    run = trials[0].run
    assert run.name == "batch=16-seed0" and run.folder.parent == tmp_path / "out" / "runs"
    assert run.settings["output_dir"] == str(run.folder) and run.settings["max_steps"] == 5
    assert {run.settings["vision_features_dir"] for run in distinct(study)} == {str(tmp_path / "out/vision_features")}
    assert {trial.run.key for trial in plan_runs(study, 2)}.isdisjoint(keys.values())  # two processes train otherwise


def test_settings_that_mean_the_same_have_one_key(tmp_path: Path):
    """The base's 2e-3 is a string in YAML; defaults said aloud, another folder and another name change nothing."""
    values = {
        "a": {},
        "b": {"learning_rate": 0.002},
        "c": {"prompt": "micl", "seed": None},
        "d": {"learning_rate": 0.003},
    }
    del values["c"]["seed"]
    study = read_study(write(tmp_path, factors={"same": values}, seeds=[0]))
    keys = [trial.run.key for trial in plan_runs(study)]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    (tmp_path / "b").mkdir()
    other = read_study(write(tmp_path / "b", factors={"other": values}, seeds=[0]))
    assert [trial.run.key for trial in plan_runs(other)] == keys


def test_finished_runs_are_not_run_again_whatever_they_are_called(tmp_path: Path):
    first = FakeTraining()
    study = read_study(write(tmp_path))
    assert finish(study, first) == {} and len(first.calls) == 15
    again = FakeTraining()
    finish(study, again)
    renamed = read_study(write(tmp_path, factors={"variant": FACTORS["variant"], "size": FACTORS["batch"]}))
    finish(renamed, again)
    assert again.calls == []
    longer = read_study(write(tmp_path, settings={"max_steps": 6}, seeds=[0]))
    finish(longer, again)
    assert len(again.calls) == 5


def test_a_killed_run_goes_on_and_one_without_a_whole_checkpoint_starts_anew(tmp_path: Path):
    study = read_study(write(tmp_path, factors={"batch": FACTORS["batch"]}, seeds=[0]))
    killed, cut, done = distinct(study)
    kept, removed = write_checkpoint(killed), write_checkpoint(cut, whole=False)
    done.folder.mkdir(parents=True)
    write_report(done, 0.5)
    (done.folder / "report" / "report.json").write_text('{"rows": [')  # killed while writing
    assert [state_of(run) for run in (killed, cut, done)] == ["resume", "start", "start"]
    training = FakeTraining()
    finish(study, training)
    assert training.calls == [(killed.name, True), (cut.name, False), (done.name, False)]
    assert kept.exists() and not removed.exists()
    assert {state_of(run) for run in (killed, cut, done)} == {"finished"}


def test_a_failed_run_is_told_of_and_does_not_stop_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    study = read_study(write(tmp_path, factors={"batch": FACTORS["batch"]}, seeds=[0, 1]))
    log = "\n".join(f"line {number}" for number in range(100))
    training = FakeTraining({"batch=48-seed0": log})
    seen: list[int] = []
    caplog.set_level("INFO")
    failures = complete(study, distinct(study), training, lambda so_far: seen.append(len(so_far)))
    assert len(training.calls) == 6 and seen == [0, 0, 1, 1, 1, 1]
    failed = distinct(study)[2]
    assert list(failures) == [failed.key] and "exit status 3" in failures[failed.key]
    assert "line 99" in failures[failed.key] and "line 9\n" not in failures[failed.key]
    for text in ("Run 3 of 6: batch=48-seed0", "left)", "line 99"):
        assert text in caplog.text
    write_study(study, plan_runs(study), failures)
    written = (tmp_path / "out" / "study.md").read_text()
    assert "5 of 6 finished" in written and "batch=48-seed0: failed" in written and "    line 99" in written
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    assert [run["state"] for run in record["runs"]].count("failed") == 1
    tables = study_tables(study, collect(plan_runs(study)))
    assert tables["batch"].rows[1] == ["48 (base)", "1 of 2", 0.225, 0.9, 0.45, pytest.approx(0.3)]
    retry = FakeTraining()
    assert finish(study, retry) == {} and retry.calls == [("batch=48-seed0", False)]


def test_tables_have_the_mean_and_the_interval_over_seeds(tmp_path: Path):
    study = read_study(write(tmp_path))
    finish(study, FakeTraining())
    measurements = collect(plan_runs(study))
    tables = study_tables(study, measurements)
    # 0.5, 0.6, 0.7: s = 0.1 and t(0.975, 2) = 4.302653, so 4.302653 · 0.1 / √3 = 0.248414; halves and thirds of it.
    assert tables["batch"].columns == ["batch", "seeds", "validation", "both", "text", "image"]
    expected = ["16", "3 of 3", "0.1500 ± 0.0621", "0.6000 ± 0.2484", "0.3000 ± 0.1242", "0.2000 ± 0.0828"]
    assert tables["batch"].rows[0] == expected
    assert [row[0] for row in tables["batch"].rows] == ["16", "48 (base)", "256", "chance", "bm25"]
    assert [row[0] for row in tables["variant"].rows] == ["all (base)", "basic", "text", "chance", "bm25"]
    assert tables["variant"].rows[0][1:] == tables["batch"].rows[1][1:]  # one run tells about both
    assert tables["variant"].rows[2] == ["text", "3 of 3", "0.2250 ± 0.0000", None, "0.9000 ± 0.0000", None]
    assert {m.metric for m in measurements} == {"recall@10", "mrr"}
    write_study(study, plan_runs(study), {})
    record = json.loads((tmp_path / "out" / "study.json").read_text())
    first = next(one for one in record["measurements"] if one["system"] == "trained")
    assert first["by_seed"] == {"0": 0.5, "1": 0.6, "2": 0.7}
    assert first["half_width"] == pytest.approx(0.248414, abs=1e-6)
    for name in ("batch.png", "variant.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
        assert name in (tmp_path / "out" / "study.md").read_text()


def test_tables_and_figures_have_what_knows_nothing_and_what_is_cheap(tmp_path: Path):
    factors = FACTORS | {"notes": {"setting": "num_simulated_notes", "values": [100, 200]}}
    study = read_study(write(tmp_path, factors=factors, seeds=[0, 1]))
    finish(study, FakeTraining())
    measurements = collect(plan_runs(study))
    tables = study_tables(study, measurements)
    lines = [["chance", None, None, 0.25, 0.25, 0.25], ["bm25", None, None, None, 0.99, None]]
    assert tables["batch"].rows[3:] == tables["variant"].rows[3:] == lines
    assert [row[0] for row in tables["notes"].rows] == ["100", "200"]  # chance is another for each
    write_study(study, plan_runs(study), {})
    written = (tmp_path / "out" / "study.md").read_text()
    assert written.count("| chance |") == 2 and "Its runs have different test notes" in written.partition("## notes")[2]
    for line in ("`{max_steps: 5}`", "test notes: 40, of which 30 are queries\n", "hardware: Some CPU, 2 cores\n"):
        assert line in written
    for factor, is_drawn in (("batch", True), ("variant", True), ("notes", False)):
        (axes,) = draw_factor(study, factor, measurements).axes
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert [line.get_ydata()[0] for line in dashed] == [0.25] * is_drawn
        assert ("test notes, chance" in axes.get_legend_handles_labels()[1]) == is_drawn


def test_perfect_knowledge_is_said_to_be_an_expectation(tmp_path: Path):
    study = read_study(write(tmp_path, factors={"batch": FACTORS["batch"]}, seeds=[0]))
    finish(study, FakeTraining())
    known = collect(plan_runs(study))
    perfect = [Measurement("batch", value, module.PERFECT, "both", "recall@10", {0: 0.95}) for value in ("16", "48")]
    said = "Perfect knowledge is an expectation and no bound"
    assert said in study_tables(study, known + perfect)["batch"].note
    assert said not in study_tables(study, known)["batch"].note
    write_study(study, plan_runs(study), {})
    assert said in (tmp_path / "out" / "study.md").read_text()


def test_a_metric_that_is_no_number_is_missing(tmp_path: Path):
    """A report has null for it; JSON knows no NaN."""
    study = read_study(write(tmp_path, factors={"batch": FACTORS["batch"]}, seeds=[0, 1]))
    finish(study, FakeTraining())
    run = distinct(study)[0]
    write_report(run, math.nan)
    path = run.folder / "report" / "report.json"
    path.write_text(path.read_text().replace("NaN", "null"))
    write_study(study, plan_runs(study), {})
    rows = study_tables(study, collect(plan_runs(study)))["batch"].rows
    assert rows[0] == ["16", "1 of 2", 0.15, 0.6, 0.3, pytest.approx(0.2)]
    assert rows[1][1] == "2 of 2"  # control
    study.settings["learning_rate"] = math.inf

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    write_study(study, plan_runs(study), {})
    record = json.loads((tmp_path / "out" / "study.json").read_text(), parse_constant=refuse)
    assert record["settings"]["learning_rate"] is None


def test_one_seed_has_no_interval_and_it_is_said(tmp_path: Path):
    assert Measurement("f", "v", "trained", "both", "mrr", {7: 0.25}).half_width is None
    study = read_study(write(tmp_path, seeds=[0]))
    finish(study, FakeTraining())
    write_study(study, plan_runs(study), {})
    written = (tmp_path / "out" / "study.md").read_text()
    assert "One seed: there is no interval" in written and "±" not in written
    for factor in FACTORS:
        (axes,) = draw_factor(study, factor, collect(plan_runs(study))).axes
        assert axes.containers and not has_caps(axes)


def has_caps(axes: Any) -> bool:
    """Whether any end of an error bar is drawn."""
    caps = [cap for container in axes.containers for cap in container.lines[1]]
    return any(np.isfinite(cap.get_ydata(orig=False)).any() for cap in caps)


def test_figures_have_numbers_on_an_axis_and_labels_side_by_side(tmp_path: Path):
    study = read_study(write(tmp_path))
    finish(study, FakeTraining())
    measurements = collect(plan_runs(study))
    (numbers,) = draw_factor(study, "batch", measurements).axes
    assert numbers.get_xscale() == "log" and list(numbers.get_xticks()) == [16, 48, 256]
    labels_of_lines = ["validation notes", "test notes, both", "test notes, text", "test notes, image"]
    assert [container.get_label() for container in numbers.containers] == labels_of_lines
    assert has_caps(numbers)
    line, _, bars = numbers.containers[1].lines
    assert line.get_xydata().tolist() == [[16, pytest.approx(0.6)], [48, 0.9], [256, 0.9]]
    low, high = bars[0].get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(0.248414, abs=1e-6)
    (labels,) = draw_factor(study, "variant", measurements).axes
    assert labels.get_xscale() == "linear"
    assert [text.get_text() for text in labels.get_xticklabels()] == ["all", "basic", "text"]
    assert labels.containers[0].lines[0].get_linestyle() == "None" != line.get_linestyle()
    across = [container.lines[0].get_xdata()[0] for container in labels.containers]
    assert 0 < np.ptp(across) < 0.1 * np.ptp(labels.get_xlim())  # one value's points
    narrow = read_study(write(tmp_path, factors={"batch": {"setting": "lora_rank", "values": [1, 2, 10]}}))
    assert draw_factor(narrow, "batch", []).axes[0].get_xscale() == "linear"


@pytest.mark.parametrize("factor", ["batch", "variant"])
def test_values_that_are_not_run_have_their_place_within_the_frame(factor: str, tmp_path: Path):
    study = read_study(write(tmp_path, seeds=[0]))
    complete(study, distinct(study)[:1] + distinct(study)[3:4], FakeTraining(), lambda failures: None)
    (axes,) = draw_factor(study, factor, collect(plan_runs(study))).axes
    low, high = axes.get_xlim()
    assert len(axes.get_xticks()) == 3 and all(low < tick < high for tick in axes.get_xticks())


def test_weights_may_be_dropped(tmp_path: Path):
    study = read_study(write(tmp_path, seeds=[0], keep_checkpoints=False))
    failing = "batch=16-seed0"
    finish(study, FakeTraining({failing: "out of memory"}))
    failed, *others = distinct(study)
    write_checkpoint(failed)
    finish(study, FakeTraining({failing: "out of memory"}))
    assert (failed.folder / "checkpoint-2").exists()  # it is to go on from there
    for run in others:
        assert {path.name for path in run.folder.iterdir()} == {"config.yaml", "settings.yaml", "report"}
    kept = read_study(write(tmp_path, seeds=[5]))
    finish(kept, FakeTraining())
    assert all((run.folder / "model.safetensors").exists() for run in distinct(kept))


def test_only_a_factor_or_a_value(tmp_path: Path):
    trials = plan_runs(read_study(write(tmp_path)))
    assert {trial.factor for trial in select(trials, "batch")} == {"batch"} and len(select(trials, "batch")) == 9
    assert {trial.value for trial in select(trials, "batch", "16")} == {"16"}
    with pytest.raises(ValueError, match="'nothing' is no factor.*'batch', 'variant'"):
        select(trials, "nothing")
    with pytest.raises(ValueError, match="none of its values.*'16', '48', '256'"):
        select(trials, "batch", "17")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base": "nowhere.yaml"}, "nowhere.yaml does not exist"),
        ({"metric": None}, "lacks 'metric'"),
        ({"seed": 3}, "sets 'seed', which no study has"),
        ({"seeds": []}, r"seeds=\[\]"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"settings": {"output_dir": "x"}}, "settings sets 'output_dir'"),
        ({"factors": {}}, "factors={}"),
        ({"factors": {"f": {"a": {"seed": 1}}}}, "factor 'f', a sets 'seed'"),
        ({"factors": {"f": {"setting": "seed", "values": [1]}}}, "sets 'seed'"),
        ({"factors": {"f": {"setting": "lora_rank", "values": 3}}}, "values=3"),
        ({"factors": {"f": {"setting": "lora_rank", "values": [3, 3]}}}, "two values of the same label"),
        ({"factors": {"f": {"a": 3}}}, "as a mapping, not 3"),
        ({"factors": {"f g": {"a": {}}, "f/g": {"a": {}}}}, "the same files"),
    ],
)
def test_what_is_wrong_in_a_study_is_named(changed: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        read_study(write(tmp_path, **changed))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"batch_size": 3}, "'batch_size' is no option"), ({"prompt": "mcil"}, "--prompt: invalid choice: 'mcil'")],
)
def test_settings_are_checked_before_anything_runs(
    settings: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        module.main([str(write(tmp_path, factors={"f": {"good": {}, "bad": settings}}))])
    assert message in (said := capsys.readouterr().err) and "factor 'f', value 'bad'" in said
    assert not (tmp_path / "out").exists()


def test_a_metric_that_no_report_has_is_named(tmp_path: Path):
    study = read_study(write(tmp_path, seeds=[0], metric="recall@11"))
    finish(study, FakeTraining())
    with pytest.raises(ValueError, match=r"metric='recall@11' is in no report: choose one of \['recall@10', 'mrr'\]"):
        write_study(study, plan_runs(study), {})


def test_two_studies_do_not_share_a_folder_at_once(tmp_path: Path):
    path = write(tmp_path, seeds=[0])
    with module._alone_in(tmp_path / "out"), pytest.raises(SystemExit, match="another study"):
        module.main([str(path)])


def test_an_interrupted_study_ends_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The process that trains is a child of the launcher, and must end with it."""
    (tmp_path / "train").mkdir()
    script = """
        import pathlib, signal, sys, time
        folder = pathlib.Path(sys.argv[1]).parent
        def end(*_):
            (folder / "ended").touch()
            sys.exit(1)
        signal.signal(signal.SIGTERM, end)
        (folder / "began").touch()
        time.sleep(60)
    """
    (tmp_path / "train" / "run.py").write_text("if True:\n" + script)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    run = Run("any", tmp_path, {}, "0" * 8)
    (tmp_path / "config.yaml").touch()

    def interrupt(number: int, frame: Any) -> None:
        if (tmp_path / "began").exists():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_in_own_process(run, resume=False)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    deadline = time.monotonic() + 20
    while not (tmp_path / "ended").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_says_how_to_go_on(
    number: signal.Signals,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    training = FakeTraining()
    # A shell's background command starts with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(run: Run, resume: bool, held: Any) -> int:
        if len(training.calls) == 2:
            os.kill(os.getpid(), number)
            time.sleep(20)
        return training(run, resume)

    monkeypatch.setattr(module, "run_in_own_process", interrupted)
    path = str(write(tmp_path, seeds=[0]))
    try:
        with pytest.raises(SystemExit) as stopped:
            module.main([path])
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == status
    assert caplog.messages[-1] == "Interrupted; 2 of 5 runs are finished; give the same command to go on."
    monkeypatch.setattr(module, "run_in_own_process", lambda run, resume, held: training(run, resume))
    module.main([path])
    assert len(training.calls) == 5


def test_help_explains_the_study_file(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    lines = [line.partition("#") for line in capsys.readouterr().out.splitlines()]
    comments = {text.partition(":")[0].strip(): comment for text, _, comment in lines if comment}
    assert set(comments) >= module._REQUIRED | module._OPTIONAL
    assert "relative to this file" in comments["base"]
    assert "relative to the current folder" in comments["output_dir"]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_package_plans_runs_that_training_accepts(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    study = read_study(path)
    trials = plan_runs(study)
    assert len({trial.value for trial in trials}) > 2 and study.output_dir == Path("runs/studies") / path.stem
    for run in {trial.run.key: trial.run for trial in trials if trial.seed == study.seeds[0]}.values():
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(run.settings))
        composition, data, training = parse_arguments([str(tmp_path / "config.yaml")])
        assert training.seed == study.seeds[0] and training.output_dir == str(run.folder)
        # Only the simulated world brings an LLM of its own: whoever gives notes names one.
        is_simulated = data.notes is None and data.splits is None
        assert is_simulated or composition.llm or composition.model or composition.multimodal_llm
    for table in study_tables(study, []).values():
        assert sum(str(row[0]).endswith("(base)") for row in table.rows) == 1


def test_the_command_trains_for_real(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    fast = {"num_simulated_notes": 192, "max_steps": 1, "eval_steps": 1, "save_steps": 1, "warmup_steps": 0}
    fast |= {"qformer_layers": 1, "num_visual_tokens": 2, "per_device_train_batch_size": 4}
    fast |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "eval_untrained": False}
    path = write(
        tmp_path,
        base=str(ROOT / "configs" / "simulated.yaml"),
        settings=fast,
        seeds=[3],
        factors={"variant": {"NoteLLM-2": {}, "text": {"vision": ""}}},
        keep_checkpoints=False,
    )
    module.main([str(path), "--dry-run"])
    planned = capsys.readouterr().out
    assert planned.count("start") == 2 and planned.endswith("2 runs\n") and not (tmp_path / "out").exists()
    caplog.set_level("INFO")
    module.main([str(path)])
    shown = capsys.readouterr().out
    assert "Run 2 of 2: variant=text-seed3" in caplog.text and "| NoteLLM-2 (base) | 1 of 1 | 0." in shown
    study = read_study(path)
    measurements = collect(plan_runs(study))
    found = {(m.value, m.modality) for m in measurements if m.system == "trained"}
    whole = {("NoteLLM-2", kind) for kind in ("validation", "both", "text", "image")}
    assert found == whole | {("text", "validation"), ("text", "text")}
    assert {m.system for m in measurements} == {"trained", *module.REFERENCES}
    assert all(line in shown for line in ("| chance | - | - | 0.", "| bm25 | - | - | - | 0.", "| perfect knowledge |"))
    assert re.search(r"test notes: \d+, of which \d+ are queries", (tmp_path / "out" / "study.md").read_text())
    for run in distinct(study):
        assert yaml.safe_load((run.folder / "settings.yaml").read_text())["training"]["seed"] == 3
        assert not list(run.folder.glob("**/*.safetensors"))
    assert list((tmp_path / "out" / "vision_features").glob("*/part-*"))
    module.main([str(path)])
    assert "2 of 2 runs are finished" in caplog.text and capsys.readouterr().out == shown
