"""Check that published folders give their recorded embeddings in other releases of the libraries that load them.

    python -m hub.versions FOLDER ... [--every-minor] [--markdown docs/COMPAT.md]

For every release a new virtual environment, into which pip installs that release and what it asks for, as anyone's
would; torch alone is installed once and shared. There, fresh processes (`hub.verify`) without this repository and
without network load a copy of each folder, through `AutoModel` and, where it is installed, `SentenceTransformer`, and
their embeddings are compared with those that `hub.export` recorded.

By default the oldest and the newest supported releases: what setup.cfg asks for, and what the package index has. It
takes minutes an environment, and is run before a release.
"""

import argparse
import json
import logging
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version
from tqdm.auto import tqdm

from evaluation.report import Table, collect_facts, table_markdown
from hub.card import supported_releases
from hub.verify import (
    Loader,
    VerificationError,
    available_loaders,
    check_files,
    is_export,
    recorded_difference,
)
from pairs.command import CommandParser, interruption_said

logger = logging.getLogger("hub.versions")

TRANSFORMERS, SENTENCE_TRANSFORMERS = "transformers", "sentence-transformers"
LOADERS: dict[Loader, str] = {"transformers": "AutoModel", "sentence-transformers": "SentenceTransformer"}
"""Each loader of `hub.verify`, and the class that a table names."""
SHOWN = (TRANSFORMERS, SENTENCE_TRANSFORMERS, "pillow", "torch")
"""The packages whose installed releases are asked for."""
BEGIN, END = "<!-- hub.versions: what stands here is written by it -->", "<!-- hub.versions: end -->"

COLUMNS = [TRANSFORMERS, SENTENCE_TRANSFORMERS, "pillow", *LOADERS.values()]

Pins = dict[str, Version]
"""An environment: library ─► its release."""


class InstallError(RuntimeError):
    """pip could not make an environment; the message holds its last words."""


@dataclass(frozen=True)
class Outcome:
    """What came of one environment.

    Args:
        pins: the releases that were asked for.
        installed: package ─► release, of those of `SHOWN` that are there; empty if nothing could be installed.
        found: loader ─► the largest absolute difference of an embedding over all folders, or why there is none.
    """

    pins: Pins
    installed: dict[str, str]
    found: dict[Loader, float | str]

    @property
    def passed(self) -> bool:
        """Whether every loader gave the recorded embeddings, up to `hub.verify.TOLERANCE`."""
        return all(isinstance(value, float) for value in self.found.values())

    def cells(self) -> list[str]:
        """A line of the table: the releases, then the largest difference or the failure of each loader."""
        pinned = {name: str(release) for name, release in self.pins.items()}
        releases = [(self.installed or pinned).get(name, "-") for name in (TRANSFORMERS, SENTENCE_TRANSFORMERS)]
        return [*releases, self.installed.get("pillow", "-"), *(self._result(loader) for loader in LOADERS)]

    def _result(self, loader: Loader) -> str:
        value = self.found.get(loader, "-")
        return f"{value:.1e}" if isinstance(value, float) else value


def releases(library: str) -> list[Version]:
    """All releases of a library in pip's package index that this Python can install, the oldest first, without
    pre-releases.

    Raises:
        InstallError: the index cannot be asked.
    """
    listed = re.search(r"Available versions: (.+)", _pip("index", "versions", library))
    if listed is None:
        raise InstallError(f"pip's index lists no release of {library}: check its settings (pip config list).")
    return sorted(Version(text.strip()) for text in listed[1].split(","))


def supported(library: str, found: Sequence[Version]) -> list[Version]:
    """Those of `found` that this package's own requirements allow.

    Raises:
        ValueError: none of them is, or this package is not installed.
    """
    specifier = supported_releases()[library]
    allowed = [release for release in found if release in specifier]
    if not allowed:
        raise ValueError(f"{library}{specifier}: no such release in pip's index ({len(found)} others).")
    return allowed


def choose(found: Sequence[Version], every_minor: bool = False) -> list[Version]:
    """The oldest and the newest of `found`, in order; with `every_minor` also the last of each minor release.

    >>> [str(release) for release in choose([Version(text) for text in ("5.6.0", "5.6.2", "5.7.0", "5.8.1")], True)]
    ['5.6.0', '5.6.2', '5.7.0', '5.8.1']
    >>> [str(release) for release in choose([Version(text) for text in ("5.6.0", "5.6.2", "5.7.0", "5.8.1")])]
    ['5.6.0', '5.8.1']
    """
    last = {release.release[:2]: release for release in found}
    return sorted({found[0], found[-1], *(last.values() if every_minor else ())})


def plan(transformers: Sequence[Version], sentence_transformers: Sequence[Version]) -> list[Pins]:
    """Which environments to make of releases, each in order: every one of transformers alone, every one of
    sentence-transformers with the last of transformers, and the first of both."""
    alone = [{TRANSFORMERS: release} for release in transformers]
    last = [{TRANSFORMERS: transformers[-1], SENTENCE_TRANSFORMERS: release} for release in sentence_transformers]
    first = [{TRANSFORMERS: transformers[0], SENTENCE_TRANSFORMERS: sentence_transformers[0]}]
    return alone + first + [pins for pins in last if pins not in first]


def install_torch(requirement: str, folder: Path) -> Path:
    """Install torch and what it requires into `folder`, unless that is there already. Returns the folder.

    Raises:
        InstallError: pip failed.
    """
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        _pip("install", "--no-compile", "--target", str(partial), requirement)
        partial.rename(folder)
    return folder


@contextmanager
def environment(pins: Pins, also: Sequence[str], torch: Path, folder: Path) -> Iterator[str]:
    """A new virtual environment in `folder`, as long as the context lasts. Gives its interpreter.

    Args:
        pins: the releases to install.
        also: further requirements.
        torch: where torch is; its packages come behind the environment's own, and pip does not touch them.
        folder: where to; must not exist.

    Raises:
        InstallError: pip failed.
    """
    try:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        places = {"base": str(folder), "platbase": str(folder)}
        shared = Path(sysconfig.get_path("purelib", "venv", places)) / "shared_torch.pth"
        shared.write_text(f"{torch.resolve()}\n", encoding="utf-8")
        python = str(Path(sysconfig.get_path("scripts", "venv", places)) / "python")
        requirements = [f"{library}=={release}" for library, release in pins.items()]
        _pip("--python", python, "install", "--no-compile", *requirements, "pillow", *also)
        yield python
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check(folders: Sequence[Path], pins: Pins, python: str) -> Outcome:
    """Encode the recorded notes of each folder with an interpreter, by every loader that it has."""
    found: dict[Loader, float | str] = {}
    for loader in available_loaders(python):
        try:
            found[loader] = max(recorded_difference(folder, python, loader) for folder in folders)
        except VerificationError as error:
            logger.error("%s: %s", _name(pins), error)
            found[loader] = f"fails: {_last_line(str(error))}"
    return Outcome(pins, _installed(python), found)


def check_span(
    folders: Sequence[Path], span: Sequence[Pins], also: Sequence[str], torch: str, work: Path
) -> Iterator[Outcome]:
    """Check folders in every environment of `span`, one after the other; what fails does not end it.

    Args:
        folders: exports.
        span: from `plan`.
        also: further requirements of each environment.
        torch: the requirement that says which torch.
        work: where the environments are made; torch stays there for another time.

    Raises:
        InstallError: torch cannot be installed.
        VerificationError: a folder is not as it was exported.
    """
    for folder in folders:
        check_files(folder)
    work.mkdir(parents=True, exist_ok=True)
    shared = install_torch(torch, work / "torch")
    with tempfile.TemporaryDirectory(prefix="notellm2-versions-") as scratch:
        # Copied, so that nothing that stands beside a folder, as this repository may, is in reach.
        copies = [
            Path(shutil.copytree(folder, Path(scratch) / str(number) / folder.resolve().name))
            for number, folder in enumerate(folders)
        ]
        for pins in span:
            try:
                with environment(pins, also, shared, Path(scratch) / "environment") as python:
                    yield check(copies, pins, python)
            except InstallError as error:
                logger.error("%s: %s", _name(pins), error)
                loaders: list[Loader] = ["sentence-transformers" if SENTENCE_TRANSFORMERS in pins else "transformers"]
                yield Outcome(pins, {}, {loader: f"not installed: {_last_line(str(error))}" for loader in loaders})


def markdown(outcomes: Sequence[Outcome], folders: Sequence[Path], named: Sequence[str] = ()) -> str:
    """The outcomes as a Markdown table, below what one must know to repeat them.

    Args:
        outcomes: of all environments.
        folders: what was loaded in them.
        named: the libraries of which somebody named the releases, so that the table need not hold both ends.
    """
    facts = collect_facts()
    installed = next((outcome.installed for outcome in outcomes if outcome.installed), {})
    names = ", ".join(f"`{folder.resolve().name}`" for folder in folders)
    by_hand = f" The releases of {' and '.join(named)} were named by hand." if named else ""
    head = (
        f"Folders: {names}. {facts['time'][:10]}, commit {facts['commit']}, Python {facts['versions']['python']}, "
        f"torch {installed.get('torch', '-')}, processors only. Each cell: the largest absolute difference from the "
        f"recorded embeddings.{by_hand}\n\n"
    )
    return head + table_markdown(Table(COLUMNS, [outcome.cells() for outcome in outcomes]))


def read_section(path: Path) -> tuple[str, str]:
    """What stands before and after the part of a document that this command writes.

    Raises:
        ValueError: the document lacks the two marks around it.
    """
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(
            f"markdown={str(path)!r} lacks the lines {BEGIN!r} and {END!r}: add them where the table goes."
        )
    return before, after


def write_section(path: Path, text: str) -> None:
    """Replace that part of a document. Raises ValueError as `read_section`."""
    before, after = read_section(path)
    path.write_text(f"{before}{BEGIN}\n{text.strip()}\n{END}{after}", encoding="utf-8")


def _pip(*arguments: str) -> str:
    """What pip, with this machine's settings, says on its standard output. Raises InstallError if it fails."""
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise InstallError(f"`pip {' '.join(arguments)}` failed:\n{finished.stderr.strip()[-3000:]}")
    return finished.stdout


def _installed(python: str) -> dict[str, str]:
    question = (
        "import importlib.metadata, json, sys\n"
        "here = {found.name.lower().replace('_', '-'): found.version for found in importlib.metadata.distributions()}\n"
        "print(json.dumps({name: here[name] for name in sys.argv[1:] if name in here}))"
    )
    answer = subprocess.run([python, "-I", "-c", question, *SHOWN], check=True, capture_output=True, text=True)
    return json.loads(answer.stdout)


def _name(pins: Pins) -> str:
    return " ".join(f"{library}=={release}" for library, release in pins.items())


def _last_line(message: str) -> str:
    return message.strip().splitlines()[-1].strip()


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m hub.versions",
        description="Check that published folders give their recorded embeddings in other releases of transformers "
        "and sentence-transformers, each in a new virtual environment.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="what hub.export wrote")
    parser.add_argument(
        "--every-minor",
        action="store_true",
        help="also the last of every minor release in between (default: the oldest and the newest supported)",
    )
    for library in (TRANSFORMERS, SENTENCE_TRANSFORMERS):
        parser.add_argument(
            f"--{library}", nargs="+", type=Version, metavar="RELEASE", help=f"these releases of {library} instead"
        )
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="REQUIREMENT", help="what else the folders need: peft, timm"
    )
    parser.add_argument("--torch", default="torch", help="which torch, as pip is told (default: the newest)")
    parser.add_argument(
        "--work", type=Path, help="folder that keeps torch for the next time (default: a temporary one)"
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also write the table into this document, between its marks"
    )
    return parser


@interruption_said("the table was not written; give the same command to begin again.")
def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = _parser()
    arguments = parser.parse_args(argv)
    for folder in arguments.folders:
        if not is_export(folder):
            parser.error(f"folder={str(folder)!r} is no export: write one with hub.export.")
    try:
        if arguments.markdown is not None:
            read_section(arguments.markdown)
        span = plan(
            _chosen(TRANSFORMERS, arguments.transformers, arguments.every_minor),
            _chosen(SENTENCE_TRANSFORMERS, arguments.sentence_transformers, arguments.every_minor),
        )
    except (InstallError, OSError, ValueError) as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory(prefix="notellm2-torch-") as temporary:
        try:
            outcomes = _run(arguments, span, arguments.work or Path(temporary))
        except (InstallError, VerificationError) as error:
            sys.exit(f"FAILED: {error}")
    if arguments.markdown is not None:
        given = {TRANSFORMERS: arguments.transformers, SENTENCE_TRANSFORMERS: arguments.sentence_transformers}
        named = [library for library, chosen in given.items() if chosen]
        write_section(arguments.markdown, markdown(outcomes, arguments.folders, named))
    failed = sum(not outcome.passed for outcome in outcomes)
    if failed:
        sys.exit(f"FAILED: {failed} of {len(outcomes)} environments.")
    sys.stdout.write(f"{len(outcomes)} environments give the recorded embeddings.\n")


def _chosen(library: str, given: list[Version] | None, every_minor: bool) -> list[Version]:
    return sorted(given) if given else choose(supported(library, releases(library)), every_minor)


def _run(arguments: argparse.Namespace, span: Sequence[Pins], work: Path) -> list[Outcome]:
    outcomes: list[Outcome] = []
    widths = [len(name) for name in COLUMNS]
    tqdm.write("  ".join(COLUMNS))
    stream = check_span(arguments.folders, span, arguments.also, arguments.torch, work)
    # One line an environment as it ends; the bar, on the standard error, has the time left.
    for outcome in tqdm(stream, total=len(span), unit="environment"):
        cells = zip(outcome.cells(), widths, strict=True)
        tqdm.write("  ".join(cell.ljust(width) for cell, width in cells).rstrip())
        outcomes.append(outcome)
    return outcomes


if __name__ == "__main__":
    main()
