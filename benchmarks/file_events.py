"""Runs a command, and kills it and its process group when it is about to make its k-th change of files.

A change is a file opened for writing, renamed or removed, or a folder made or removed, below a folder, by Python: the
moments between which files are in another state. (What Arrow, DuckDB and safetensors write does not pass by Python, but
their files are renamed by it.) Unlike a time, a number means the same on machines of any speed.
"""

import os
import runpy
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir"})


def run_command(arguments: list[str], below: Path | None, kill_at: int | None, count_file: Path | None) -> None:
    """Runs a command in this process, as `python` does.

    Args:
        arguments: a module or .py file, and its arguments.
        below: the folder below which changes count; None: nothing is counted.
        kill_at: number of the change, from 1, before which the process group is killed; None: none.
        count_file: where the number of changes is written at the end; None: nowhere.
    """
    seen = 0

    def hook(event: str, given: tuple[Any, ...]) -> None:
        nonlocal seen
        is_change = event in _CHANGES or (event == "open" and bool((given[2] or 0) & _WRITES))
        if is_change and isinstance(given[0], str | os.PathLike):
            if os.path.abspath(os.fspath(given[0])).startswith(str(below)):
                seen += 1
                if seen == kill_at:
                    os.killpg(0, signal.SIGKILL)

    if below is not None:
        sys.addaudithook(hook)
    program, sys.argv = arguments[0], list(arguments)
    warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)  # it is imported for its speed
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        if count_file is not None:
            count_file.write_text(str(seen), encoding="utf-8")


__all__ = ["run_command"]
