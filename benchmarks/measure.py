"""Time, memory and temporary disk that a command takes in a process of its own, within limits."""

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

# To find a process's children takes milliseconds, which the command would miss: ten times a second cost it 8 % on two
# cores. A command that is soon done is looked at more often.
SECONDS_BETWEEN_SAMPLES = 0.5
SECONDS_BETWEEN_DISK_SAMPLES = 1.0


@dataclass(frozen=True)
class Limits:
    """What ends a command before it is done.

    Attributes:
        memory_gb: resident memory of the process and its children together, in 10^9 bytes.
        seconds: wall time.
    """

    memory_gb: float
    seconds: float


@dataclass(frozen=True)
class Usage:
    """What a command took.

    Attributes:
        seconds: wall time, from the start of the process to its end.
        peak_memory_gb: the most resident memory of the process and its children together, in 10^9 bytes, at the moments
            of sampling; memory that processes share counts for each of them.
        peak_disk_gb: the most that its temporary folder held, in 10^9 bytes on disk.
        failure: why there is no result, or None.
    """

    seconds: float
    peak_memory_gb: float
    peak_disk_gb: float
    failure: str | None


def measure(command: Sequence[str], temp_dir: str | Path, limits: Limits, cwd: str | Path | None = None) -> Usage:
    """Runs a command and watches it.

    Args:
        command: program and arguments.
        temp_dir: the folder whose size is taken; the command finds it as `TMPDIR`, too.
        limits: what ends it; then all its processes are killed.
        cwd: where it runs; None: here.
    """
    started = time.perf_counter()
    memory = disk = 0
    disk_sampled = started
    failure = None
    environment = {**os.environ, "TMPDIR": str(temp_dir), "SPARK_LOCAL_DIRS": str(temp_dir)}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment, cwd=cwd)
        try:
            while process.poll() is None:
                now = time.perf_counter()
                memory = max(memory, _resident_bytes(process.pid))
                if now - disk_sampled >= SECONDS_BETWEEN_DISK_SAMPLES:
                    disk_sampled, disk = now, max(disk, _disk_bytes(Path(temp_dir)))
                if memory > limits.memory_gb * 1e9:
                    failure = f"out of memory (limit {limits.memory_gb:g} GB)"
                elif now - started > limits.seconds:
                    failure = f"out of time (limit {limits.seconds:g} s)"
                if failure:
                    _kill_all(process.pid)
                    break
                time.sleep(min(SECONDS_BETWEEN_SAMPLES, 0.05 + (now - started) / 20))
            seconds = time.perf_counter() - started
        finally:
            if process.poll() is None:
                _kill_all(process.pid)
            process.wait()
        if failure is None and process.returncode != 0:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            # The operating system kills what takes the last memory, and programs say in many words that they got none.
            is_memory = process.returncode == -9 or any("out of memory" in line.lower() for line in lines[-5:])
            last = lines[-1] if lines else f"exit status {process.returncode}"
            failure = f"out of memory ({last})" if is_memory else f"failed ({last})"
    return Usage(seconds, memory / 1e9, disk / 1e9, failure)


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _resident_bytes(pid: int) -> int:
    total = 0
    for process in _family(pid):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _kill_all(pid: int) -> None:
    """Kills a process and its children, and waits until the children are gone: the next run shall have their memory."""
    family = _family(pid)
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family[1:], timeout=30)


def _disk_bytes(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total
