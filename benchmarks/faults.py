"""Faults, by seed, of commands that run on a small world, and what a restart makes of them.

Five jobs: building pairs, splits and the store of vision features, training, encoding a corpus, exporting. Each runs
once undisturbed. A fault then hits a run of the same command, and what the command gives when it is run again is
compared with the undisturbed result: bytes for pairs, splits, weights and an export, `TOLERANCE` for vectors, whose
batches may be divided in another way. Between the two, whatever can be read as whole has to be right.

    kill     kill −9 of the process group, after a random time, or before a random change of a file
    disk     a disk that is too small: a tmpfs of a random size (where one may mount; all writers get ENOSPC), or a
             limit on the size of a file (everywhere; all writers get EFBIG where a file would grow beyond it)
    worker   kill −9 of one process of several: a loader of the training, a rank of the encoding
    damage   bytes flipped, or the end cut off, in a random file that a run goes on with or that is read
    twice    a second run of the same command while the first one is held in the middle

The results of `inject` say what went wrong; see `Outcome`.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import psutil
import torch
from safetensors.torch import load_file
from transformers import AutoModel, TrainerState

import train.features
from benchmarks.file_events import run_command
from benchmarks.inputs import RANDOM_MODELS, save_random_checkpoint
from hub.embeddings import Manifest, load_embeddings, shard_file, whole_shards
from hub.verify import VerificationError, check_files, folder_files
from modeling_notellm2 import NoteLLM2Model
from pairs.query import PairOptions
from pairs.simulate import SimulationOptions, simulate
from pairs.split import SPLITS, SplitOptions, load_split, make_splits
from pairs.tables import load_notes, load_pairs
from train.checkpoints import checkpoint_problem

Kind = Literal["kill", "disk", "worker", "damage", "twice"]
Result = dict[str, Any]
"""Name ─► bytes, text or array."""

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-6
"""The largest difference of two numbers of a vector, of length 1 or of the tower's, that is no wrong result."""

SECONDS_AT_MOST = 600.0
"""What runs longer hangs."""

PAGE = 4096
"""Bytes that a tmpfs gives at a time."""

NAMED = (OSError, ValueError, VerificationError)
"""What reading may raise: it says what is missing or damaged."""

STEPS, SAVED_EVERY = 6, 2
WORLD = SimulationOptions(notes=96, subjects=3, looks=3, users=150, image_size=24, seed=1)


@dataclass(frozen=True)
class Job:
    """A command, and what it gives.

    Attributes:
        name: of the job.
        arguments: the folder for its output ─► a module or .py file, and its arguments.
        read: the same folder ─► all of the result that counts as whole there; raises one of `NAMED`.
        lock: where its lock is in that folder; None: it has none, as several may be at work.
        files: the same folder ─► the files that damage may hit.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    read: Callable[[Path], Result]
    lock: str | None
    files: Callable[[Path], list[Path]]


@dataclass
class Outcome:
    """What a fault did.

    Attributes:
        kind, job: of the fault.
        what: the fault in words, with what repeats it.
        wrong: results that are not the undisturbed ones, in words.
        lost: notes of the result that are gone.
        unnamed: ends of a run other than by an error that says what is wrong, in words.
        largest_difference: of a number of a vector.
        seconds: that the restart took, or reading.
    """

    kind: Kind
    job: str
    what: str
    wrong: list[str] = field(default_factory=list)
    lost: int = 0
    unnamed: list[str] = field(default_factory=list)
    largest_difference: float = 0.0
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.wrong or self.lost or self.unnamed)


@dataclass(frozen=True)
class Ended:
    """How a command ended: its status, negative for a signal; what it said; how long it took; whether it had to be
    killed as its time was over."""

    status: int
    said: str
    seconds: float
    hung: bool


class Command:
    """A command that runs in a process group of its own, from now on; left, it is killed if it still runs.

    The process is forked from a server that has imported the libraries, which takes longer than the work; it then runs
    the module or file as `python -m` does.

    Args:
        arguments: a module or .py file, and its arguments.
        said: file for what it writes to stdout and stderr, through a pipe, which `largest_file` does not bound.
        events_below, kill_at, count_file: as `benchmarks.file_events.count_events` takes them.
        largest_file: bytes beyond which no file of it may grow.

    Attributes:
        pid: of the process and its group.
    """

    def __init__(
        self,
        arguments: list[str],
        said: Path,
        *,
        events_below: Path | None = None,
        kill_at: int | None = None,
        count_file: Path | None = None,
        largest_file: int | None = None,
    ) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["benchmarks.faults", "train.run", "hub.encode", "hub.export", "pairs.split"])
        events = None if events_below is None else (events_below, kill_at, count_file)
        said.unlink(missing_ok=True)
        self._said = said
        self._started = time.perf_counter()
        reader, writer = server.Pipe(duplex=False)
        self._process = server.Process(target=_run_command, args=(arguments, writer, events, largest_file))
        self._process.start()
        writer.close()
        self._copying = threading.Thread(target=_copy, args=(reader, said), daemon=True)
        self._copying.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *exception: object) -> None:
        self._kill()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def wait(self, seconds: float) -> Ended:
        """Waits for its end, and kills it after so many seconds."""
        self._process.join(seconds)
        hung = self._process.is_alive()
        self._kill()
        self._process.join()
        status = self._process.exitcode
        assert status is not None
        self._copying.join(10)  # no longer: a rank of torch.distributed has a process group of its own
        said = self._said.read_text(encoding="utf-8", errors="replace") if self._said.exists() else ""
        return Ended(status, said, time.perf_counter() - self._started, hung)

    def _kill(self) -> None:
        """What is left of its group is killed, too; before it has one, it is alone."""
        self._process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def _copy(reader: Connection, said: Path) -> None:
    with reader, said.open("wb", buffering=0) as file:
        while content := os.read(reader.fileno(), 2**16):
            file.write(content)


def _run_command(
    arguments: list[str],
    said: Connection,
    events: tuple[Path, int | None, Path | None] | None,
    largest_file: int | None,
) -> None:
    os.setsid()
    os.chdir(ROOT)
    multiprocessing.set_start_method(None, force=True)  # as a command has it, not the server that it was forked from
    for stream in (1, 2):
        os.dup2(said.fileno(), stream)
    said.close()
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    run_command(arguments, *(events or (None, None, None)))


class NoFaultError(Exception):
    """The fault that was drawn hit nothing: the command was done, or needed no more room."""


class FaultBench:
    """A small world, the jobs on it, and their undisturbed results, made when they are asked for.

    Args:
        folder: where all of it is; the caller removes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        world = folder / "world"
        simulate(WORLD).write(world)
        self.notes, self.views = world / "notes.jsonl", world / "views.csv"
        notes = load_notes(self.notes)
        self.splits = folder / "splits"
        make_splits(notes, self.views, PairOptions(top_k=5), SplitOptions(), self.splits)
        self.model = save_random_checkpoint(RANDOM_MODELS["tiny"], list(notes), folder / "model")
        self.jobs = {job.name: job for job in self._jobs()}
        self._expected: dict[str, tuple[Result, float, int]] = {}

    @cached_property
    def loaded(self) -> NoteLLM2Model:
        """The model, for its store."""
        model: NoteLLM2Model = AutoModel.from_pretrained(self.model)
        return model

    def _jobs(self) -> Iterator[Job]:
        notes, views, model = str(self.notes), str(self.views), str(self.model)
        yield Job(
            "pairs.build",
            lambda out: ["pairs.build", "--views", views, "--output", f"{out}/pairs.parquet", "--top-k", "5"],
            lambda out: {"pairs": json.dumps(load_pairs(out / "pairs.parquet").to_dict())},
            ".pairs.parquet.lock",
            lambda out: [out / "pairs.parquet"],
        )
        yield Job(
            "pairs.split",
            lambda out: ["pairs.split", "--notes", notes, "--views", views, "--output", f"{out}/splits"],
            _read_splits,
            "splits/.lock",
            lambda out: sorted(file for file in (out / "splits").rglob("*") if file.suffix in (".arrow", ".parquet")),
        )
        yield Job(
            "features",
            lambda out: ["benchmarks.faults", "build-store", model, notes, f"{out}/store"],
            self._read_store,
            None,
            lambda out: sorted(out.glob("store/*/part-*/*")),
        )
        training = [
            *("train/run.py", "--splits", str(self.splits), "--model", model, "--use_cpu", "--max_steps", str(STEPS)),
            *("--save_steps", str(SAVED_EVERY), "--per_device_train_batch_size", "4", "--warmup_steps", "0"),
            *("--report_to", "none", "--disable_tqdm", "True", "--eval_untrained", "False", "--logging_steps", "1"),
            *("--eval_steps", str(SAVED_EVERY), "--head_warmup_steps", "2", "--head_learning_rate", "1e-3"),
            *("--hard_negatives", "1", "--resume_from_checkpoint", "auto"),
        ]
        yield Job(
            "training",
            lambda out: [*training, "--output_dir", f"{out}/run"],
            _read_training,
            "run/.lock",
            lambda out: sorted(
                file for file in out.glob("run/checkpoint-*/*") if file.is_file() and file.name != "checksums.json"
            ),
        )
        yield Job(
            "encoding",
            lambda out: ["hub.encode", model, notes, "--output", f"{out}/embeddings", "--shard-size", "8"],
            _read_embeddings,
            "embeddings/.lock",
            lambda out: sorted(out.glob("embeddings/*/shard-*.parquet")),
        )
        yield Job(
            "export",
            lambda out: ["hub.export", model, f"{out}/export"],
            _read_export,
            ".export.lock",
            lambda out: sorted(file for file in (out / "export").rglob("*") if file.is_file()),
        )

    def _read_store(self, out: Path) -> Result:
        store = train.features.VisionFeatureStore(out / "store", self.loaded)
        found: Result = {}
        for key, (part, row) in zip(store._keys.tolist(), store._places.tolist(), strict=True):
            for name, values in store._parts.arrays(part).items():
                found[f"{key.decode()} {name}"] = np.array(values[row])
        return found

    def run(self, arguments: list[str], kill_after: float | None = None, **disturbance: Any) -> Ended:
        """Runs a command in a process group of its own.

        Args:
            arguments: a module or .py file, and its arguments.
            kill_after: seconds until its group is killed.
            disturbance: see `Command`.
        """
        with Command(arguments, self.folder / "said", **disturbance) as command:
            return command.wait(SECONDS_AT_MOST if kill_after is None else kill_after)

    def undisturbed(self, job: Job) -> tuple[Result, float, int]:
        """The result, the seconds, and how many changes of files the undisturbed run makes.

        Raises:
            RuntimeError: it fails.
        """
        if job.name not in self._expected:
            out, count = self.fresh(f"undisturbed-{job.name}"), self.folder / "count"
            ended = self.run(job.arguments(out), events_below=out, count_file=count)
            if ended.status:
                raise RuntimeError(f"{job.name} fails undisturbed: {ended.said}")
            self._expected[job.name] = (job.read(out), ended.seconds, int(count.read_text()))
        return self._expected[job.name]

    def fresh(self, name: str) -> Path:
        """An empty folder."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def whole_so_far(self, job: Job, out: Path, outcome: Outcome) -> None:
        """Looks at what a disturbed run has left: all that can be read must be right."""
        try:
            found = job.read(out)
        except NAMED:
            return
        expected = self.undisturbed(job)[0]
        _compare({name: expected.get(name) for name in found}, found, outcome, "left behind, ")

    def restart(self, job: Job, out: Path, outcome: Outcome) -> Outcome:
        """Runs the command again, and compares."""
        ended = self.run(job.arguments(out))
        _judge_restart(ended, outcome)
        if not ended.status:
            self.compare(job, out, outcome)
        return _timed(outcome, ended.seconds)

    def compare(self, job: Job, out: Path, outcome: Outcome) -> None:
        """Compares a result that should be whole."""
        try:
            found = job.read(out)
        except NAMED as error:
            outcome.wrong.append(f"the result cannot be read: {error}")
            return
        _compare(self.undisturbed(job)[0], found, outcome)

    def kill(self, job: Job, rng: np.random.Generator, by_event: bool) -> Outcome:
        """kill −9 at a moment drawn by `rng`, then a restart."""
        _, seconds, changes = self.undisturbed(job)
        out = self.fresh("killed")
        if by_event:
            number = int(rng.integers(1, changes + 1))
            ended = self.run(job.arguments(out), events_below=out, kill_at=number)
            outcome = Outcome("kill", job.name, f"before change {number} of {changes}")
        else:
            moment = float(rng.uniform(0, seconds))
            ended = self.run(job.arguments(out), kill_after=moment)
            outcome = Outcome("kill", job.name, f"after {moment:.2f} of {seconds:.2f} s")
        if ended.status != -signal.SIGKILL:
            raise NoFaultError(f"{outcome.what}: exit status {ended.status}")
        self.whole_so_far(job, out, outcome)
        return self.restart(job, out, outcome)

    def fill_disk(self, job: Job, rng: np.random.Generator, by_mount: bool) -> Outcome:
        """A disk that is too small, or a limit on a file's size; then room is made."""
        self.undisturbed(job)
        sizes = [file.stat().st_size for file in (self.folder / f"undisturbed-{job.name}").rglob("*") if file.is_file()]
        out, room, limit = self.fresh("full"), 0, None
        if by_mount:
            pages = sum(-(-size // PAGE) for size in sizes)
            if pages == 1:
                raise NoFaultError("no disk is smaller than a page")
            room = PAGE * int(rng.integers(1, pages))
            outcome = Outcome("disk", job.name, f"a disk of {room:,} bytes, of {PAGE * pages:,}")
        else:
            limit = int(np.exp(rng.uniform(np.log(64), np.log(max(sizes)))))
            outcome = Outcome("disk", job.name, f"no file beyond {limit:,} bytes, the largest having {max(sizes):,}")
        with _small_disk(out, room) if by_mount else contextlib.nullcontext():
            ended = self.run(job.arguments(out), largest_file=limit)
            if not ended.status:
                raise NoFaultError(outcome.what)
            _judge_full_disk(ended, outcome)
            self.whole_so_far(job, out, outcome)
            if by_mount:
                _mount("-o", "remount,size=2g", str(out))
            return self.restart(job, out, outcome)

    def kill_worker(self, job: Job, rng: np.random.Generator) -> Outcome:
        """kill −9 of one of a run's processes, at a moment drawn by `rng`; the run must end and say why."""
        self.undisturbed(job)
        out = self.fresh("worker")
        arguments = job.arguments(out)
        if job.name == "training":
            arguments += ["--dataloader_num_workers", "2"]
        else:
            arguments = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", *arguments]
        outcome = Outcome("worker", job.name, "")
        begun = out / ("run/checkpoint-2/checksums.json" if job.name == "training" else "embeddings/manifest.json")
        with Command(arguments, self.folder / "said") as command:
            while not begun.exists() and command.is_running:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            with contextlib.suppress(psutil.NoSuchProcess):
                workers = psutil.Process(command.pid).children()
                if workers:
                    workers[int(rng.integers(len(workers)))].kill()
            ended = command.wait(SECONDS_AT_MOST)
        if ended.hung:
            outcome.unnamed.append("it hangs")
            return outcome
        if not ended.status:
            raise NoFaultError("the run was done")
        said = ended.said
        name = "dataloader_num_workers" if job.name == "training" else "SIGKILL"
        if name not in said or (job.name == "training" and "Traceback" in said):
            outcome.unnamed.append(said[-2000:])
        self.whole_so_far(job, out, outcome)
        return self.restart(job, out, outcome)

    def damage(self, job: Job, rng: np.random.Generator) -> Outcome:
        """A file that is not as it was written, and what reads it. It is put right again."""
        self.undisturbed(job)
        out = self.folder / f"undisturbed-{job.name}"
        files = [file for file in job.files(out) if file.stat().st_size]
        file = files[int(rng.integers(len(files)))]
        whole = file.read_bytes()
        if rng.random() < 0.3:
            kept = int(rng.integers(len(whole)))
            file.write_bytes(whole[:kept])
            what = f"cut after {kept} bytes"
        else:
            places = rng.integers(len(whole), size=int(rng.integers(1, 9))).tolist()
            content = bytearray(whole)
            for place in set(places):
                content[place] ^= int(rng.integers(1, 256))
            file.write_bytes(content)
            what = f"flipped at {places}"
        outcome = Outcome("damage", job.name, f"{file.relative_to(out)} {what}")
        started = time.perf_counter()
        try:
            if job.name == "training":
                problem = checkpoint_problem(file.parent)
                if problem is None or file.name not in problem:
                    outcome.wrong.append(f"the checkpoint is taken for whole, or another file is named: {problem}")
            elif job.name == "encoding":
                self._reread_shards(out / "embeddings", file, outcome)
            else:
                found = job.read(out)
                _compare(self.undisturbed(job)[0], found, outcome, "damaged, ")
        except NAMED as error:
            # A part of a store is to be deleted, and any file of it is.
            if file.name not in str(error) and str(file.parent) not in str(error):
                outcome.unnamed.append(f"the file is not named: {error!r}")
        finally:
            file.write_bytes(whole)
        return _timed(outcome, time.perf_counter() - started)

    def _reread_shards(self, folder: Path, file: Path, outcome: Outcome) -> None:
        """A shard that is damaged does not count for a run that goes on, or nothing of it has changed."""
        manifest = Manifest.read(folder)
        shard = int(file.stem.removeprefix("shard-"))
        if shard in whole_shards(folder, manifest, read=True):
            found = _read_embeddings(folder.parent)
            _compare(self.undisturbed(self.jobs["encoding"])[0], found, outcome, "damaged, ")

    def start_twice(self, job: Job) -> Outcome:
        """A second run while the first is held: the second is refused, and the first one's result is right.

        The store takes both at once.
        """
        self.undisturbed(job)
        out = self.fresh("twice")
        outcome = Outcome("twice", job.name, "the second while the first holds its lock")
        with Command(job.arguments(out), self.folder / "said by the first") as command:
            if job.lock is not None:
                while not _is_locked(out / job.lock) and command.is_running:
                    time.sleep(0.001)
                os.killpg(command.pid, signal.SIGSTOP)
            second = self.run(job.arguments(out))
            if job.lock is not None:
                os.killpg(command.pid, signal.SIGCONT)
            first = command.wait(SECONDS_AT_MOST)
        if job.lock is not None and (not second.status or "another run is at work" not in second.said):
            outcome.wrong.append(f"the second run was let in: exit status {second.status}, {second.said[-500:]}")
        if "Traceback" in second.said:
            outcome.unnamed.append(second.said[-2000:])
        if first.status or (job.lock is None and second.status):
            outcome.wrong.append(f"a run failed: {first.said[-1000:]} {second.said[-1000:]}")
        else:
            self.compare(job, out, outcome)
        return _timed(outcome, second.seconds)


def plan(faults: int, seed: int) -> list[tuple[Kind, str, int]]:
    """Kind, job and seed of so many faults of each kind; those of one kind go through its jobs in turn."""
    jobs = {
        "kill": ["pairs.build", "pairs.split", "features", "training", "encoding", "export"],
        "disk": ["pairs.build", "pairs.split", "features", "training", "encoding", "export"],
        "worker": ["training", "encoding"],
        "damage": ["pairs.build", "pairs.split", "features", "training", "encoding", "export"],
        "twice": ["pairs.build", "pairs.split", "features", "training", "encoding", "export"],
    }
    # Damage is read in milliseconds; a second start is not random.
    counts = {"kill": faults, "disk": faults // 2, "worker": faults // 8, "damage": 10 * faults, "twice": 6}
    return [
        (kind, jobs[kind][number % len(jobs[kind])], seed + number)
        for kind in get_args(Kind)
        for number in range(counts[kind])
    ]


def inject(bench: FaultBench, kind: Kind, job: str, seed: int) -> Outcome:
    """One fault. Where the one drawn hits nothing, another is drawn, up to twenty times.

    Raises:
        NoFaultError: none of them did.
    """
    rng = np.random.default_rng([seed, get_args(Kind).index(kind)])
    for attempt in range(20):
        # Of the faults on a job every other one is by events, and by a mount.
        other = (seed // 6 + attempt) % 2 == 0
        try:
            if kind == "kill":
                return bench.kill(bench.jobs[job], rng, by_event=other)
            if kind == "disk":
                return bench.fill_disk(bench.jobs[job], rng, by_mount=other and can_mount())
            if kind == "worker":
                return bench.kill_worker(bench.jobs[job], rng)
            if kind == "damage":
                return bench.damage(bench.jobs[job], rng)
            return bench.start_twice(bench.jobs[job])
        except NoFaultError as error:
            missed = error
    raise NoFaultError(f"{kind} of {job}, seed {seed}: {missed}")


@cache
def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    with tempfile.TemporaryDirectory(prefix="notellm2-mount-") as folder:
        try:
            with _small_disk(Path(folder), PAGE):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


@contextlib.contextmanager
def _small_disk(folder: Path, room: int) -> Iterator[None]:
    """A tmpfs of so many bytes in place of a folder."""
    _mount("-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def _is_locked(file: Path) -> bool:
    """Whether some process holds a lock on a file; to try it oneself could keep that process out."""
    try:
        inode = file.stat().st_ino
    except FileNotFoundError:
        return False
    locks = Path("/proc/locks").read_text(encoding="ascii")
    return any(words[5].endswith(f":{inode}") for line in locks.splitlines() if len(words := line.split()) > 5)


def _judge_restart(ended: Ended, outcome: Outcome) -> None:
    if ended.hung:
        outcome.unnamed.append("the restart hangs")
    elif ended.status:
        outcome.wrong.append(f"the restart fails: {ended.said[-1500:]}")


def _judge_full_disk(ended: Ended, outcome: Outcome) -> None:
    if ended.hung:
        outcome.unnamed.append("it hangs")
    elif "Traceback (most recent call last)" in ended.said:
        outcome.unnamed.append(ended.said[-2500:])
    elif not any(words in ended.said for words in ("cannot be written", "disk is short")):
        outcome.unnamed.append(f"the disk is not named: {ended.said[-1500:]}")


def _timed(outcome: Outcome, seconds: float) -> Outcome:
    outcome.seconds = seconds
    return outcome


def _compare(expected: Mapping[str, Any], found: Mapping[str, Any], outcome: Outcome, place: str = "") -> None:
    """Notes what differs in an outcome."""
    for name in sorted(expected.keys() - found.keys()):
        outcome.wrong.append(f"{place}{name} is missing")
    for name in sorted(found.keys() - expected.keys()):
        outcome.wrong.append(f"{place}{name} is too much")
    for name in sorted(expected.keys() & found.keys()):
        one, other = expected[name], found[name]
        if isinstance(one, np.ndarray) and isinstance(other, np.ndarray) and one.shape == other.shape:
            difference = float(np.abs(one.astype(np.float64) - other).max(initial=0.0))
            if not difference <= TOLERANCE:
                outcome.wrong.append(f"{place}{name} differs by {difference:.1e}")
            outcome.largest_difference = max(outcome.largest_difference, difference)
        elif isinstance(one, np.ndarray) or one != other:
            outcome.wrong.append(f"{place}{name} differs")
    if not place:
        outcome.lost += len(_note_ids(expected) - _note_ids(found))


def _note_ids(result: Mapping[str, Any]) -> set[str]:
    """The notes of a result, also of one that lacks shards."""
    lists = [ids for name, ids in result.items() if name == "note ids" or name.startswith("ids of shard")]
    return {note_id for ids in lists for note_id in ids}


def _read_splits(out: Path) -> Result:
    found: Result = {"splits.json": (out / "splits" / "splits.json").read_text(encoding="utf-8")}
    ids: list[str] = []
    for name in SPLITS:
        split = load_split(out / "splits", name)
        found[f"{name} pairs"] = json.dumps(split.pairs.to_dict())
        found[f"{name} notes"] = json.dumps(
            split.notes.remove_columns([c for c in split.notes.column_names if c == "image"]).to_dict()
        )
        ids += split.notes["note_id"]
    found["note ids"] = sorted(ids)
    return found


def _read_training(out: Path) -> Result:
    folder = out / "run"
    report = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))  # written last
    state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    found: Result = {
        f"weights {name}": value.numpy().tobytes() for name, value in load_file(folder / "model.safetensors").items()
    }
    times = ("runtime", "per_second", "flos")
    found["losses"] = [
        {name: value for name, value in entry.items() if not any(word in name for word in times)}
        for entry in state.log_history
        if "loss" in entry
    ]
    found["metrics"] = [(row["system"], row["modality"], row["metrics"]) for row in report["rows"]]
    return found


def _read_embeddings(out: Path) -> Result:
    """The shards that are whole; each shard's notes and vectors."""
    folder = out / "embeddings"
    manifest = Manifest.read(folder)
    found: Result = {}
    there = whole_shards(folder, manifest)
    for shard, counts in there.items():
        loaded = load_embeddings(shard_file(folder, "embeddings", shard)) if counts[0] else None
        assert loaded is not None
        found[f"ids of shard {shard}"] = loaded.note_ids.to_pylist()
        found[f"vectors of shard {shard}"] = loaded.vectors
    if len(there) == manifest.num_shards:
        found["note ids"] = load_embeddings(folder).note_ids.to_pylist()
    return found


def _read_export(out: Path) -> Result:
    """All files but what says when it was written."""
    folder = out / "export"
    check_files(folder)
    names = set(folder_files(folder)) - {"provenance.json", "checksums.sha256"}
    return {name: (folder / name).read_bytes() for name in names}


def build_store(model: str, notes: str, folder: str) -> None:
    """The features of the pictures of a table, in parts of a few."""
    train.features.PART_BYTES = 2**16
    loaded = AutoModel.from_pretrained(model)
    torch.set_num_threads(1)
    train.features.VisionFeatureStore(folder, loaded).table(list(load_notes(notes)), batch_size=4)


def main(argv: list[str] | None = None) -> None:
    """What a fault is injected into where the package has no command of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=main.__doc__)
    parser.add_argument("action", choices=["build-store"])
    parser.add_argument("arguments", nargs=3, metavar="MODEL NOTES FOLDER", help="as `build_store` takes them")
    options = parser.parse_args(argv)
    try:
        build_store(*options.arguments)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
