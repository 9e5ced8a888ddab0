"""What all commands have in common: an error is one sentence, and so is what Ctrl-C leaves."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

INTERRUPTED = 130
"""Exit status of a command that was interrupted: 128 and the number of SIGINT, as shells have it."""


class CommandParser(argparse.ArgumentParser):
    """Says what is wrong alone: dozens of lines of usage in front of it would hide it."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help explains all options)\n")


@contextmanager
def interruption_said(what_is_kept: str) -> Iterator[None]:
    """Ends the process with one line in place of a traceback where Ctrl-C interrupts it; for a command's `main`.

    Args:
        what_is_kept: what is there now, and how to go on. Of several processes, which torchrun and accelerate number,
            the first one says it.

    Raises:
        SystemExit: it was interrupted.
    """
    try:
        yield
    except (KeyboardInterrupt, RuntimeError) as error:
        # DuckDB makes a RuntimeError of an interrupt.
        if not isinstance(error, KeyboardInterrupt) and not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"\nInterrupted: {what_is_kept}\n")  # a bar may stand in this line
        sys.exit(INTERRUPTED)


__all__ = ["CommandParser", "interruption_said"]
