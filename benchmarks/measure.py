"""Time, memory and disk that a command takes in a process of its own, within limits, and the speed of products."""

import os
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

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


class FlopCounter(TorchDispatchMode):
    """Counts what matrix products and convolutions compute, by PyTorch's own formulas.

    (`FlopCounterMode` also follows modules, by hooks that passes without gradients break.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            with self:  # in inference mode, what consists of products comes here whole
                parts = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if parts is NotImplemented else parts
        result = func(*args, **kwargs)
        self.total += formula(*args, **kwargs, out_val=result)
        return result


def moment(device: torch.device) -> float:
    """The time, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def product_flops(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]] = (), repeat: int = 5
) -> float:
    """Floating-point operations a second of matrix products alone, one after another.

    Args:
        device: where they are computed.
        dtype: of both factors.
        shapes: (rows, inner, columns) of each product, as `torch.nn.functional.linear` computes it; by default one
            large square product.
        repeat: each product's time is the median of so many.
    """
    size = 4096 if device.type == "cuda" else 2048
    flops = seconds = 0.0
    for (rows, inner, columns), count in Counter(shapes or [(size, size, size)]).items():
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        right = torch.randn(columns, inner, device=device, dtype=dtype)
        taken = []
        for _turn in range(repeat + 1):  # the first one warms up
            started = moment(device)
            functional.linear(left, right)
            taken.append(moment(device) - started)
        flops += count * 2.0 * rows * inner * columns
        seconds += count * median(taken[1:])
    return flops / seconds


def weight_products(llm: nn.Module, tokens: int) -> list[tuple[int, int, int]]:
    """The products of so many tokens with all weights of an LLM, for `product_flops`."""
    return [
        (tokens, weight.shape[1], weight.shape[0])
        for module in llm.modules()
        if not isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False)
        if weight.dim() == 2
    ]


class Watch:
    """Seconds that wrapped calls take, by part: what one of them spends in another counts for the other alone.

    Args:
        device: waited for before and after each call.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._device = device
        self._inner: list[float] = []  # seconds within the calls that have not ended

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, watched."""

        @wraps(function)
        def call(*arguments: Any, **inputs: Any) -> Any:
            started = moment(self._device)
            self._inner.append(0.0)
            try:
                return function(*arguments, **inputs)
            finally:
                elapsed = moment(self._device) - started
                self.seconds[part] += elapsed - self._inner.pop()
                if self._inner:
                    self._inner[-1] += elapsed

        return call


def facts_text(facts: dict[str, object]) -> str:
    """What one must know to repeat a measurement, a line each."""

    def flat(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {item}" for name, item in value.items())
        return f"`{value}`" if isinstance(value, str) else str(value)

    return "\n".join(f"- {name}: {flat(value)}" for name, value in facts.items())


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
