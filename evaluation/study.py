"""Studies: vary one setting of training at a time, or leave parts of the model out, with several seeds.

    python -m evaluation.study configs/studies/simulated_ablation.yaml [--only FACTOR [VALUE]] [--dry-run]

A study file names a training config, and factors whose values are settings over it:

    base: ../simulated.yaml            # relative to this file; paths inside it are relative to the current folder
    settings: {eval_untrained: false}  # optional: over the base, of all runs; options of train/run.py
    seeds: [0, 1, 2]                   # of train/run.py: what training draws; composition_seed and split_seed stay
    metric: recall@10                  # of tables and figures; study.json has all
    output_dir: runs/studies/mine      # relative to the current folder
    keep_checkpoints: false            # optional: of a finished run only settings, report and logs stay
    factors:                           # one at a time is varied
      batch size: {setting: per_device_train_batch_size, values: [16, 48]}
      variant:                         # or each value by a name of yours, with its settings
        NoteLLM-2: {}                  # as the base
        basic: {prompt: basic, late_fusion: none}

Every value and seed is one run of train/run.py in a process of its own. Runs of the same settings are one run. What is
finished is not run again, and what was killed goes on from its last checkpoint. In `output_dir`:

    study.md, study.json, FACTOR.png   after every run
    runs/FACTOR=VALUE-seed0-KEY/       config.yaml, run.log and the run's own files; KEY is a hash of its settings
"""

import argparse
import fcntl
import functools
import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml
from scipy import stats
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from evaluation.modality import MODALITIES
from evaluation.report import Cell, Figure, Section, Table, collect_facts, json_text, table_markdown
from pairs.command import CommandParser
from train.arguments import changed_settings
from train.checkpoints import newest_whole_checkpoint

if TYPE_CHECKING:  # matplotlib is an extra
    import matplotlib.figure

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
CONFIDENCE = 0.95
TAIL_LINES = 30  # about half of them may be of accelerate launch

TRAINED = "trained"
"""The system of a run's report that a study is about."""
PERFECT = "perfect knowledge"
REFERENCES = ("chance", "bm25", PERFECT)
"""Systems of a run's report that no setting of training changes, unless it changes the test notes."""
VALIDATION = "validation"
"""In a modality's place: the whole validation notes, by which a setting is to be chosen."""
SHOWN = (VALIDATION, *MODALITIES)

_OF_PERFECT = f"{PERFECT.capitalize()} is an expectation and no bound: on few queries luck may pass or miss it."
_REQUIRED = {"base", "seeds", "metric", "output_dir", "factors"}
_OPTIONAL = {"settings", "keep_checkpoints"}
_RUN_FACTS = ("commit", "time", "hardware", "test_notes", "test_queries", "steps", "train_seconds")
_OWNED = ("seed", "output_dir", "resume_from_checkpoint")  # by the study
_KEPT = {"config.yaml", "settings.yaml", "run.log", "report", "runs", "trainer_state.json"}  # runs: TensorBoard's


class StudyError(ValueError):
    """The study cannot go on; the message says what to do, and the command prints no more than that."""


@dataclass(frozen=True)
class Study:
    """A study file.

    Attributes:
        name: of the file, without its ending.
        base: the training config.
        common: what the study sets over the base for all runs.
        settings: all of the base, and `common` over it.
        seeds: of the runs of one value.
        metric: that tables and figures show, as `evaluation.metrics.metric_names` names it.
        output_dir: folder of runs and results.
        keep_checkpoints: whether finished runs keep their weights and data.
        factors: factor ─► label of a value ─► its settings.
    """

    name: str
    base: Path
    common: dict[str, Any]
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    metric: str
    output_dir: Path
    keep_checkpoints: bool
    factors: dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: factor, value and seed that it was first needed for.
        folder: its output_dir.
        settings: its config.yaml.
        key: 8 hexadecimal digits of BLAKE2b over the settings that differ from their defaults and the number of
            processes, but for folders, which change no result.
        num_processes: that train it together.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    key: str
    num_processes: int = 1

    @property
    def log(self) -> Path:
        """What the run says, of all attempts."""
        return self.folder / "run.log"


@dataclass(frozen=True)
class Trial:
    """A factor's value and a seed, and the run that tells about it, which other trials may share."""

    factor: str
    value: str
    seed: int
    run: Run


@dataclass(frozen=True)
class Measurement:
    """One metric of one system of a run's report, for one value of a factor.

    Attributes:
        factor, value: which.
        system: `TRAINED`, "untrained" or one of `REFERENCES`.
        modality: what it sees of a test note: both, text, image or, in the case of chance, "-"; or `VALIDATION`.
        metric: its name.
        by_seed: seed ─► the metric, in [0, 1], of the runs that are finished; at least one.
    """

    factor: str
    value: str
    system: str
    modality: str
    metric: str
    by_seed: dict[int, float]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return float(np.mean(list(self.by_seed.values())))

    @property
    def half_width(self) -> float | None:
        """Half the 95 % interval of the mean: t(0.975, n − 1) · s / √n with Student's t; None for n = 1 seed."""
        number = len(self.by_seed)
        if number < 2:
            return None
        deviation = np.std(list(self.by_seed.values()), ddof=1)
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, number - 1) * deviation / math.sqrt(number))


# The plan


def read_study(path: str | Path) -> Study:
    """Read a study file.

    Raises:
        ValueError: the file, its base or one of their entries cannot be used; the message names it.
    """
    path = Path(path)
    content = _read_mapping(path)
    if missing := sorted(_REQUIRED.difference(content)):
        raise ValueError(f"{path} lacks {missing[0]!r}: a study needs {', '.join(sorted(_REQUIRED))}.")
    if unknown := sorted(set(content).difference(_REQUIRED, _OPTIONAL)):
        names = ", ".join(sorted(_REQUIRED | _OPTIONAL))
        raise ValueError(f"{path} sets {unknown[0]!r}, which no study has: choose of {names}.")
    seeds, base = content["seeds"], Path(os.path.normpath(path.parent / content["base"]))
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
        raise ValueError(f"{path}: seeds={seeds!r}: give a list of integers, such as [0, 1, 2].")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{path}: seeds={seeds!r} names a seed twice, which tells nothing new: name each once.")
    common = _checked(content.get("settings") or {}, f"{path}: settings")
    if not isinstance(content["factors"], dict) or not content["factors"]:
        raise ValueError(f"{path}: factors={content['factors']!r}: give a mapping of names to values.")
    factors = {str(name): _values(given, f"{path}: factor {name!r}") for name, given in content["factors"].items()}
    if len({_slug(name) for name in factors}) < len(factors):
        raise ValueError(f"{path}: two factors of {list(factors)} would have the same files: name them otherwise.")
    settings = _read_mapping(base) | common
    if settings.get("resume_from_checkpoint") is not None:
        raise ValueError(f"{base} sets resume_from_checkpoint, which is for the study to say: remove it.")
    return Study(
        name=path.stem,
        base=base,
        common=common,
        settings=settings,
        seeds=tuple(seeds),
        metric=str(content["metric"]),
        output_dir=Path(content["output_dir"]),
        keep_checkpoints=bool(content.get("keep_checkpoints", True)),
        factors=factors,
    )


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a YAML file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold lines of the form `name: value`.")
    return content


def _values(given: Any, where: str) -> dict[str, dict[str, Any]]:
    """A factor's values by label, from its long or its short form."""
    if not isinstance(given, dict) or not given:
        raise ValueError(f"{where}: give labels with settings, or {{setting: NAME, values: […]}}, not {given!r}.")
    pairs = list(given.items())
    if set(given) == {"setting", "values"}:
        if not isinstance(given["values"], list) or not given["values"]:
            raise ValueError(f"{where}: values={given['values']!r}: give a list.")
        pairs = [(value, {given["setting"]: value}) for value in given["values"]]
    values = {_label(label): _checked(settings or {}, f"{where}, {label}") for label, settings in pairs}
    if len(values) < len(pairs):
        raise ValueError(f"{where} has two values of the same label in {[_label(label) for label, _ in pairs]}.")
    return values


def _label(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _checked(settings: Any, where: str) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: give settings of train/run.py as a mapping, not {settings!r}.")
    for name in _OWNED:
        if name in settings:
            raise ValueError(f"{where} sets {name!r}, which is for the study to say: remove it.")
    return settings


def plan_runs(study: Study, num_processes: int = 1) -> list[Trial]:
    """What is to be run: each factor's values, and the seeds of each. Trials of the same settings share a run.

    Args:
        study: what `read_study` gives.
        num_processes: that train each run together.

    Raises:
        ValueError: a setting that train/run.py does not have, or a value that it cannot take.
    """
    runs: dict[str, Run] = {}
    trials = []
    for factor, values in study.factors.items():
        for value, settings in values.items():
            for seed in study.seeds:
                try:
                    run = _run(study, f"{factor}={value}-seed{seed}", study.settings | settings, seed, num_processes)
                except ValueError as error:
                    raise ValueError(f"factor {factor!r}, value {value!r}: {error}") from error
                trials.append(Trial(factor, value, seed, runs.setdefault(run.key, run)))
    return trials


def _run(study: Study, name: str, settings: Mapping[str, Any], seed: int, num_processes: int) -> Run:
    settings = {**settings, "seed": seed}
    if settings.get("vision_features") == "store" and settings.get("vision_features_dir") is None:
        settings["vision_features_dir"] = str(study.output_dir / "vision_features")
    changed = changed_settings(settings)
    for folder in ("output_dir", "vision_features_dir"):
        changed.pop(folder, None)
    identity = json.dumps([changed, num_processes], sort_keys=True, default=str)
    key = hashlib.blake2b(identity.encode(), digest_size=4).hexdigest()
    # Found by its key: another order of factors, or another name of one, costs nothing.
    found = sorted((study.output_dir / "runs").glob(f"*-{key}"))
    folder_of_run = found[0] if found else study.output_dir / "runs" / f"{_slug(name)}-{key}"
    settings["output_dir"] = str(folder_of_run)
    return Run(name, folder_of_run, settings, key, num_processes)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", name)[:80]


def select(trials: Sequence[Trial], factor: str, value: str | None = None) -> list[Trial]:
    """The trials of one factor, or of one of its values.

    Raises:
        ValueError: there is no such factor or value; the message names those that there are.
    """
    factors = list(dict.fromkeys(trial.factor for trial in trials))
    if factor not in factors:
        raise ValueError(f"--only {factor!r} is no factor of the study: choose one of {factors}.")
    of_factor = [trial for trial in trials if trial.factor == factor]
    values = list(dict.fromkeys(trial.value for trial in of_factor))
    if value is not None and value not in values:
        raise ValueError(f"--only {factor!r} {value!r} is none of its values: choose one of {values}.")
    return [trial for trial in of_factor if value in (None, trial.value)]


# The runs

Runner = Callable[[Run, bool], int]
"""(run, whether to go on from its last checkpoint) ─► exit status, with what it says in `run.log`."""


def run_in_own_process(run: Run, resume: bool, held: Sequence[int] = ()) -> int:
    """Train with `accelerate launch train/run.py`; where this process is interrupted, the processes started are ended.

    Args:
        run: its `config.yaml` must be there.
        resume: go on from the last whole checkpoint.
        held: file descriptors that the process keeps open as long as it lives.
    """
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(run.num_processes)]
    command = [*launch, str(ROOT / "train" / "run.py"), str(run.folder / "config.yaml")]
    command += ["--resume_from_checkpoint", "last"] if resume else []
    # The same checkout, whichever one is installed.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with run.log.open("a", encoding="utf-8") as log:
        # In a session of its own, so that all its processes can be ended together.
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True, pass_fds=held
        )
        try:
            return process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise


def report_of(run: Run) -> dict[str, Any] | None:
    """The run's report.json, or None where it is not there, is cut off, or has no trained model in it."""
    try:
        report: dict[str, Any] = json.loads((run.folder / "report" / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if any(row["system"] == TRAINED for row in report["rows"]) else None


def state_of(run: Run) -> Literal["finished", "resume", "start"]:
    """What is left to do: nothing, to go on from a whole checkpoint, or all of it."""
    if report_of(run) is not None:
        return "finished"
    return "start" if newest_whole_checkpoint(run.folder, run.num_processes) is None else "resume"


def complete(
    study: Study, runs: Sequence[Run], runner: Runner, after_run: Callable[[dict[str, str]], object]
) -> dict[str, str]:
    """Run what is not finished, one after the other. One that fails does not keep the others from running.

    Args:
        study: whose runs they are.
        runs: distinct ones.
        runner: runs one of them.
        after_run: called with the failures so far after every run.

    Returns:
        The failures: key of a run ─► exit status and the end of its log.
    """
    failures: dict[str, str] = {}
    states = {run.key: state_of(run) for run in runs}
    waiting = [run for run in runs if states[run.key] != "finished"]
    logger.info("%d of %d runs are finished", len(runs) - len(waiting), len(runs))
    _drop_weights(study, runs)
    start = time.monotonic()
    for number, run in enumerate(waiting):
        spent = time.monotonic() - start
        left = f", about {_duration(spent / number * (len(waiting) - number))} left" if number else ""
        logger.info("Run %d of %d: %s (%s spent%s)", number + 1, len(waiting), run.name, _duration(spent), left)
        logger.info("  %s: %s", "goes on" if states[run.key] == "resume" else "starts", run.log)
        status = _run_once(run, states[run.key] == "resume", runner)
        if report_of(run) is None:
            failures[run.key] = f"exit status {status}, no whole report; the end of {run.log}:\n{_tail(run.log)}"
            logger.error("%s failed: %s", run.name, failures[run.key])
        after_run(failures)
        _drop_weights(study, [run])
    return failures


def _run_once(run: Run, resume: bool, runner: Runner) -> int:
    run.folder.mkdir(parents=True, exist_ok=True)
    if not resume:  # none of these is whole, and train/run.py would not start beside them
        for checkpoint in run.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(checkpoint)
    config = yaml.safe_dump(run.settings, allow_unicode=True, sort_keys=False)
    (run.folder / "config.yaml").write_text(config, encoding="utf-8")
    return runner(run, resume)


def _drop_weights(study: Study, runs: Sequence[Run]) -> None:
    """Leave of finished runs their settings, reports and logs, unless the study keeps all of it."""
    for run in runs:
        if study.keep_checkpoints or report_of(run) is None:
            continue
        for path in run.folder.iterdir():
            if path.name not in _KEPT:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _tail(log: Path) -> str:
    if not log.exists():
        return "(it said nothing)"
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])


# The results


def collect(trials: Sequence[Trial]) -> list[Measurement]:
    """Read the reports of the finished runs.

    Returns:
        One measurement a factor, value, system, modality and metric of which there is a figure, in the order of the
        trials. A model that reads text alone has figures for "text" alone, beside those of the validation. What is null
        in a report, as a metric that was no number, is no figure.
    """
    found: dict[tuple[str, str, str, str, str], dict[int, float]] = {}
    for trial in trials:
        report = report_of(trial.run)
        if report is None:
            continue
        figures = {(row["system"], row["modality"]): row["metrics"] for row in report["rows"]}
        prefix = f"{VALIDATION}_"
        figures[TRAINED, VALIDATION] = {
            name.removeprefix(prefix): value for name, value in report["facts"].items() if name.startswith(prefix)
        }
        for (system, modality), metrics in figures.items():
            for metric, value in metrics.items():
                if value is None:
                    continue
                found.setdefault((trial.factor, trial.value, system, modality, metric), {})[trial.seed] = value
    return [Measurement(*which, by_seed) for which, by_seed in found.items()]


def study_tables(study: Study, measurements: Sequence[Measurement]) -> dict[str, Table]:
    """Factor ─► its table: the study's metric of each value, mean ± half the 95 % interval over seeds, by `SHOWN`; then
    a line each of `REFERENCES`, unless the factor's runs have different test notes.

    Raises:
        StudyError: there are figures, but none of the study's metric.
    """
    _check_metric(study, measurements)
    shown = {
        (m.factor, m.value, m.modality): m for m in measurements if (m.system, m.metric) == (TRAINED, study.metric)
    }
    tables = {}
    base = changed_settings(study.settings)
    for factor, values in study.factors.items():
        rows: list[list[Cell]] = []
        for value, settings in values.items():
            of_value = [shown.get((factor, value, modality)) for modality in SHOWN]
            finished = max((len(m.by_seed) for m in of_value if m is not None), default=0)
            is_base = changed_settings(study.settings | settings) == base
            label = f"{value} (base)" if is_base else value
            rows.append([label, f"{finished} of {len(study.seeds)}", *map(_estimate, of_value)])
        references = _references(study, factor, measurements) or {}
        for system, reached in references.items():
            rows.append([system, None, None, *(reached.get(modality, reached.get("-")) for modality in MODALITIES)])
        note = _interval_text(study)
        if PERFECT in references:
            note += f" {_OF_PERFECT}"
        tables[factor] = Table([factor, "seeds", *SHOWN], rows, _caption(study, factor), note)
    return tables


def study_sections(study: Study, measurements: Sequence[Measurement]) -> list[Section]:
    """One section a factor, with its table and its figure, for `evaluation.report.write_report`.

    Raises:
        StudyError: there are figures, but none of the study's metric.
        ImportError: matplotlib is not installed.
    """
    sections = []
    for factor, table in study_tables(study, measurements).items():
        has_references = _references(study, factor, measurements) is not None
        text = [] if has_references else ["Its runs have different test notes: chance and bm25 are in their reports."]
        sections.append(Section(factor, text, [table], [_figure(study, factor, table, measurements)]))
    return sections


def _references(study: Study, factor: str, measurements: Sequence[Measurement]) -> dict[str, dict[str, float]] | None:
    """Of `REFERENCES`: system ─► modality ─► the study's metric; None where the factor's runs have different ones."""
    found: dict[str, dict[str, float]] = {}
    for m in measurements:
        if m.system in REFERENCES and (m.factor, m.metric) == (factor, study.metric):
            for value in m.by_seed.values():
                known = found.setdefault(m.system, {}).setdefault(m.modality, value)
                if not math.isclose(value, known, rel_tol=1e-6):  # the last bits may be another machine's
                    return None
    return found


def _figure(study: Study, factor: str, table: Table, measurements: Sequence[Measurement]) -> Figure:
    values = "; ".join(f"{row[0]}: {', '.join(map(str, row[2:]))}" for row in table.rows)
    alt = f"{_caption(study, factor)} ({', '.join(SHOWN)}). {values}"
    return Figure.from_matplotlib(draw_factor(study, factor, measurements), _caption(study, factor), alt)


def _caption(study: Study, factor: str) -> str:
    return f"{study.metric} by {factor}"


def _check_metric(study: Study, measurements: Sequence[Measurement]) -> None:
    metrics = list(dict.fromkeys(m.metric for m in measurements))
    if metrics and study.metric not in metrics:
        raise StudyError(f"metric={study.metric!r} is in no report: choose one of {metrics}. No run is lost.")


def _estimate(measurement: Measurement | None) -> Cell:
    if measurement is None or measurement.half_width is None:
        return None if measurement is None else measurement.mean
    return f"{measurement.mean:.4f} ± {measurement.half_width:.4f}"


def draw_factor(study: Study, factor: str, measurements: Sequence[Measurement]) -> "matplotlib.figure.Figure":
    """The study's metric over a factor's values, one line a modality and one of the validation, 95 % intervals as bars,
    and chance on the test notes.

    Values that are numbers have an axis of numbers, logarithmic where they span more than a factor of 10; others stand
    side by side as points.
    """
    import matplotlib.figure

    values = list(study.factors[factor])
    positions = _numbers(values)
    figure = matplotlib.figure.Figure(figsize=(8.0, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (modality, marker) in enumerate(zip(SHOWN, "^osD", strict=True)):
        shown = [
            m
            for m in measurements
            if (m.factor, m.system, m.modality, m.metric) == (factor, TRAINED, modality, study.metric)
            and m.value in values
        ]
        if not shown:
            continue
        if positions is None:  # beside one another, so that their bars can be told apart
            x = [values.index(m.value) + min(0.02 * len(values), 0.12) * (number - 1.5) for m in shown]
        else:
            x = [positions[m.value] for m in shown]
            shown = [shown[i] for i in np.argsort(x)]
            x = sorted(x)
        half_widths = [math.nan if m.half_width is None else m.half_width for m in shown]
        axes.errorbar(
            x,
            [m.mean for m in shown],
            yerr=None if all(map(math.isnan, half_widths)) else half_widths,  # without, the legend shows no bar either
            marker=marker,
            linestyle="none" if positions is None else "-",
            capsize=4,
            color="grey" if modality == VALIDATION else f"C{number - 1}",
            label="validation notes" if modality == VALIDATION else f"test notes, {modality}",
        )
    chance = (_references(study, factor, measurements) or {}).get("chance", {}).get("-")
    if chance is not None:
        axes.axhline(chance, color="black", linestyle="--", linewidth=1, label="test notes, chance")
    # The axis is of all values, also of those that are not run yet.
    if positions is None:
        axes.set_xticks(range(len(values)), values, rotation=20, ha="right")
        axes.set_xlim(-0.5, len(values) - 0.5)
    else:
        if min(positions.values()) > 0 and max(positions.values()) > 10 * min(positions.values()):
            axes.set_xscale("log")
        axes.update_datalim([(position, 0) for position in positions.values()])
        axes.autoscale_view()
        axes.set_xticks(list(positions.values()), values)
        axes.minorticks_off()
    axes.set_xlabel(factor)
    axes.set_ylabel(study.metric)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper center", ncols=3)  # within, it may hide a bar
    return figure


def _numbers(values: Sequence[str]) -> dict[str, float] | None:
    """The labels as numbers, or None if one of them is none."""
    try:
        numbers = {value: float(value) for value in values}
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers.values())) else None


def write_study(study: Study, trials: Sequence[Trial], failures: Mapping[str, str]) -> list[Section]:
    """Write study.md, study.json and a figure a factor into `output_dir`, of the runs that are finished.

    Args:
        study: the study.
        trials: all of it.
        failures: what `complete` returns.

    Returns:
        What `study_sections` gives.

    Raises:
        StudyError: no report has the study's metric.
        ImportError: matplotlib is not installed.
    """
    measurements = collect(trials)
    sections = study_sections(study, measurements)
    study.output_dir.mkdir(parents=True, exist_ok=True)
    for section in sections:
        (study.output_dir / f"{_slug(section.title)}.png").write_bytes(section.figures[0].png)
    runs = [_run_record(run, failures) for run in {trial.run.key: trial.run for trial in trials}.values()]
    facts = collect_facts(study=study.name, base=str(study.base), metric=study.metric, seeds=list(study.seeds))
    content = {
        "facts": facts,
        "settings": study.settings,
        "factors": study.factors,
        "measurements": [asdict(m) | {"mean": m.mean, "half_width": m.half_width} for m in measurements],
        "runs": runs,
    }
    (study.output_dir / "study.json").write_text(json_text(content, default=str) + "\n", encoding="utf-8")
    (study.output_dir / "study.md").write_text(_markdown(study, sections, runs, facts), encoding="utf-8")
    return sections


def _run_record(run: Run, failures: Mapping[str, str]) -> dict[str, Any]:
    report = report_of(run)
    state = "failed" if run.key in failures else "not run" if report is None else "finished"
    facts = {} if report is None else report["facts"]
    record: dict[str, Any] = {"name": run.name, "folder": str(run.folder), "key": run.key, "state": state}
    record |= {name: facts.get(name) for name in _RUN_FACTS}
    return record | ({"failure": failures[run.key]} if run.key in failures else {})


def _markdown(
    study: Study, sections: Sequence[Section], runs: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]
) -> str:
    finished = [run for run in runs if run["state"] == "finished"]
    commits = _distinct(str(run["commit"]) for run in finished)
    common = yaml.safe_dump(study.common, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10_000)
    lines = [
        f"# Study: {study.name}",
        "",
        f"{study.metric} of the trained model on the test notes, which it sees whole (both), without image (text) or "
        f"without text (image), and on the validation notes (other notes, and fewer), by which to choose: the best of "
        f"many by the test would look better than it is. {_interval_text(study)} "
        f"One factor at a time differs from the base, {study.base}. The last lines of a table are no values: they are "
        "what chance and, in a simulated world, perfect knowledge are expected to reach on the same test notes, and "
        f"what BM25 reaches. {_OF_PERFECT}",
        "",
        f"- command: `{facts['command']}`",
        f"- runs: {len(finished)} of {len(runs)} finished; commits: {commits}",
        f"- settings of all runs, over the base: `{common.strip()}`",
        f"- test notes: {_distinct(map(_test_notes, finished))}",
        f"- hardware: {_distinct(_hardware(run['hardware']) for run in finished if run['hardware'])}",
        "",
    ]
    for section in sections:
        lines += [f"## {section.title}", "", table_markdown(section.tables[0])]
        lines += [line for paragraph in section.text for line in (paragraph, "")]
        lines += [f"![{section.figures[0].caption}]({_slug(section.title)}.png)", ""]
    if len(finished) < len(runs):
        lines += ["## Not finished", ""]
        lines += [f"- {run['name']}: {run['state']}" for run in runs if run["state"] != "finished"]
        for run in runs:
            if "failure" in run:
                lines += ["", f"{run['name']} failed:", "", *(f"    {line}" for line in run["failure"].splitlines())]
        lines.append("")
    return "\n".join(lines)


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(sorted(set(texts))) or "-"


def _test_notes(run: Mapping[str, Any]) -> str:
    queries = run["test_queries"]  # that have related notes among them
    return f"{run['test_notes']}" + (f", of which {queries} are queries" if queries is not None else "")


def _hardware(hardware: Mapping[str, Any]) -> str:
    gpu = f", {hardware['gpu']}" if "gpu" in hardware else ""
    return f"{hardware['cpu']}, {hardware['cores']} cores{gpu}"


def _interval_text(study: Study) -> str:
    if len(study.seeds) == 1:
        return "One seed: there is no interval, and small differences may be luck."
    return (
        "Mean ± half the 95 % interval over seeds (Student's t; a mean of one seed has none). A seed decides what "
        "training draws; initial weights (composition_seed) and test notes (split_seed) are the same for all."
    )


# The command


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = CommandParser(
        prog="python -m evaluation.study",
        description="Train with each value of each factor of a study file and each seed, and write tables and figures\n"
        "into its output_dir. Given again, it runs only what is not finished.",
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the study file, such as configs/studies/*.yaml")
    parser.add_argument("--only", nargs="+", metavar=("FACTOR", "VALUE"), help="only this factor, or this value of it")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, and what is left to do of each")
    parser.add_argument(
        "--num-processes",
        "--num_processes",
        type=int,
        default=1,
        help="processes, one a GPU, that `accelerate launch` starts for each run (default: 1; then, "
        "where there are several GPUs, choose one with CUDA_VISIBLE_DEVICES)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`. Exit status 1 if a run failed, 130 or 143 if it was interrupted."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.only is not None and len(options.only) > 2:
        parser.error(f"--only {' '.join(options.only)}: give a factor, or a factor and one of its values, in quotes")
    if options.num_processes < 1:
        parser.error(f"--num-processes {options.num_processes}: give 1 or more")
    try:
        study = read_study(options.config)
        trials = plan_runs(study, options.num_processes)
        chosen = trials if options.only is None else select(trials, *options.only)
    except ValueError as error:
        parser.error(str(error))
    runs = list({trial.run.key: trial.run for trial in chosen}.values())
    if options.dry_run:
        sys.stdout.write("".join(f"{state_of(run):<10}{run.folder}\n" for run in runs) + f"{len(runs)} runs\n")
        return
    if importlib.util.find_spec("matplotlib") is None:  # now, not after hours of training
        parser.error("the figures need matplotlib: pip install 'notellm2[report]', or -e '.[report]' in a checkout")
    try:
        with _alone_in(study.output_dir) as lock, _terminated_as_exit():
            runner = functools.partial(run_in_own_process, held=[lock])
            failures = complete(study, runs, runner, functools.partial(write_study, study, trials))
            sections = write_study(study, trials, failures)
    except StudyError as error:
        sys.exit(str(error))
    except (KeyboardInterrupt, SystemExit) as interruption:  # SIGINT, SIGTERM
        finished = sum(state_of(run) == "finished" for run in runs)
        logger.warning("Interrupted; %d of %d runs are finished; give the same command to go on.", finished, len(runs))
        sys.exit(130 if isinstance(interruption, KeyboardInterrupt) else interruption.code)
    sys.stdout.write("\n" + "\n".join(table_markdown(section.tables[0]) for section in sections))
    sys.stdout.write(f"\nStudy: {study.output_dir / 'study.md'}\n")
    if failures:
        sys.exit(1)


@contextmanager
def _alone_in(folder: Path) -> Iterator[int]:
    """A lock on the folder, which a run that outlives its study holds, too; gives the file descriptor."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StudyError(
                f"output_dir={folder}: another study, or a run that one left behind, is at work there: wait for it or "
                "end it, or give another output_dir."
            ) from error
        yield file.fileno()


@contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """SIGTERM ends this process as an exception does, so that its run is ended with it."""
    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
