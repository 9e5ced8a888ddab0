"""Encode a corpus: a table of notes ─► Parquet files of embeddings, by all processes, and over interruptions.

    accelerate launch -m hub.encode MODEL notes.parquet --output EMBEDDINGS                 # on all GPUs
    torchrun --nproc_per_node 2 -m hub.encode MODEL notes.parquet --output EMBEDDINGS       # by two CPU processes

`hub.embeddings` says how the folder is laid out. A shard's files are written beside their places and renamed, the
embeddings last: a shard is whole or absent, and a run that was killed goes on with the shards that are absent. So every
note is in just one file.

A note that cannot be read is listed among the failures, and stays there. Where the cause may pass, nothing is listed:
trouble of the machine ends the run, and so does a shard of which a large part fails, as where a folder of pictures is
away. `--retry-failures` tries once more what is listed. With `--bad-images text-only`, a note whose picture cannot be
read is encoded by its text, if it has any, and listed in `text-only/`; it counts as failed notes do, since all pictures
may be away.

In memory are the shard that a process is at, some batches of pictures and 8 bytes a note, but no table of notes; see
`pairs.note_table`.
"""

import argparse
import errno
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm

from evaluation.checkpoints import check_model, load_model
from evaluation.run import BadImages
from hub.embeddings import (
    EncodedRows,
    Failure,
    Manifest,
    ShardCounts,
    count_text_only,
    read_shard,
    shard_file,
    whole_shards,
    write_shard,
)
from hub.fingerprint import model_fingerprint
from modeling_notellm2 import NoteError, NoteLLM2PreTrainedModel
from modeling_notellm2.modeling_notellm2 import WINDOW_BATCHES
from modeling_notellm2.processing_notellm2 import EncodedNote
from pairs.command import CommandParser, interruption_said
from pairs.disk import DiskError, alone_in, disk_errors_named
from pairs.note_table import NoteTable
from pairs.tables import IMAGE_ROOT_HELP
from train.distributed import said_by_main_process

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]
Item = TypeVar("Item")
Result = TypeVar("Result")

PASSING_ERRORS = frozenset(
    getattr(errno, name)
    for name in """
    EAGAIN EBUSY ECONNRESET EHOSTDOWN EHOSTUNREACH EIO EMFILE ENETDOWN ENETUNREACH ENFILE ENOMEM ENOTCONN EREMOTEIO
    ESTALE ETIMEDOUT
    """.split()
    if hasattr(errno, name)  # not every system has all of them
)
"""Errors of the system that tell of the machine, a disk or the network, and not of the file that was opened."""

LONGEST_WAIT = timedelta(days=1)
"""How long processes wait for what the main one finds out. NCCL alone would give up after ten minutes, which hashing
large weights and tables may take."""


@dataclass(frozen=True)
class EncodingSummary:
    """What became of a corpus.

    Attributes:
        encoded: notes with an embedding, those of earlier runs among them.
        failed: notes without.
        notes_of_this_run: notes that this run read.
        seconds: that it took, without loading the model and looking through the notes.
        text_only: how many of the encoded notes are so by their text alone, as their picture cannot be read.
    """

    encoded: int
    failed: int
    notes_of_this_run: int
    seconds: float
    text_only: int

    def sentence(self, output: str | Path) -> str:
        """The summary in words."""
        rate = self.notes_of_this_run / self.seconds if self.seconds else 0.0
        text_only = f", {self.text_only:,} of them by their text alone (see text-only/)" if self.text_only else ""
        failures = " (see failures/)" if self.failed else ""
        retry = "; --retry-failures tries what is listed there again" if self.failed or self.text_only else ""
        return (
            f"{output}: {self.encoded:,} notes encoded{text_only}, {self.failed:,} failed{failures}{retry}; "
            f"{self.notes_of_this_run:,} notes in this run, in {self.seconds:,.1f} s, {rate:,.1f} notes/s"
        )


class _Plan(NamedTuple):
    """What a run has to do.

    Attributes:
        manifest: of the folder.
        kept: notes that are done and stay as they are.
        retried: shards that are there, and of which only what is listed is encoded.
        todo: the shards to write, in order, and which file of embeddings each has so far.
    """

    manifest: Manifest
    kept: int
    retried: frozenset[int]
    todo: dict[int, tuple[int, int] | None]


def encode_corpus(
    checkpoint: str | Path,
    notes: NoteTable,
    output: str | Path,
    *,
    dtype: Dtype = "float32",
    batch_size: int = 32,
    shard_size: int = 10_000,
    truncate_dim: int | None = None,
    max_failures: float = 0.1,
    retry_failures: bool = False,
    bad_images: BadImages = "raise",
    workers: int = 4,
) -> EncodingSummary | None:
    """Encode all notes into a folder, or those that an earlier run into it has not. All processes must call this.

    Args:
        checkpoint: the model: a folder or Hub id.
        notes: the table.
        output: the folder, which all processes must reach.
        dtype: of the model's weights, to compute in.
        batch_size: notes a forward pass; may differ from run to run.
        shard_size: notes a file.
        truncate_dim: keep the first so many dimensions and normalise again.
        max_failures: share of a whole shard's notes that may fail, because they cannot be read or their embedding is
            not finite, or be encoded by their text alone; they are listed. One more ends the run, and its shard is not
            written.
        retry_failures: encode what an earlier run listed, as failed or as encoded by its text alone, once more, too.
        bad_images: what becomes of a note whose image cannot be read and that has a text: it fails, or is encoded
            by its text alone. Of the notes that this run encodes; those of an earlier one stay as they are.
        workers: threads of a process that decode pictures ahead of the model.

    Returns:
        The summary in the main process, which waits for the others; None in these.

    Raises:
        NoteError: more notes of a shard fail than `max_failures` allows, or one cannot be read for a cause that may
            pass: see `PASSING_ERRORS`.
        ValueError: a setting out of range; the folder holds something else, or lists more notes of a shard than
            `max_failures` allows; another run is at work there; an id is empty or there twice; a column is of a wrong
            type; no such model.
        OSError: no such model; the disk is full (DiskError).
    """
    output = Path(output)
    _check_settings(dtype, max_failures, bad_images, batch_size=batch_size, shard_size=shard_size, workers=workers)
    _refuse_file(output)
    state = process_state()  # before the model, so that each process has its GPU
    held = ExitStack()  # what the main process has the folder by
    is_new = not output.exists()

    def refuse_early() -> None:
        """What needs no model, which may take minutes to load; a new folder is made when everything is known to be
        good."""
        check_model(checkpoint)
        if not is_new:
            _take_folder(output, held)
        notes.check_ids()

    def prepare() -> _Plan:
        manifest = Manifest(
            model=str(checkpoint),
            model_fingerprint=model_fingerprint(model),
            notes=str(notes.path),
            notes_fingerprint=notes.fingerprint(),
            num_notes=len(notes),
            shard_size=shard_size,
            dim=int(empty.shape[1]),
            dtype=dtype,
        )
        if is_new:
            _take_folder(output, held)
        _open_folder(output, manifest)
        done = whole_shards(output, manifest, read=True)
        text_only = {shard: count_text_only(output, shard) for shard in done}
        listed = {shard: done[shard][1] + text_only[shard] for shard in done}
        retried = frozenset(shard for shard, count in listed.items() if count and retry_failures)
        kept = ShardCounts({shard: counts for shard, counts in done.items() if shard not in retried})
        _refuse_failures({shard: listed[shard] for shard in kept}, manifest, max_failures, output)
        todo = {shard: _version(output, shard) for shard in range(manifest.num_shards) if shard not in kept}
        with disk_errors_named(output):
            (output / ".progress").write_bytes(bytes(8 * state.num_processes))
        found = kept.encoded + kept.failed + sum(done[shard][0] - text_only[shard] for shard in retried)
        return _Plan(manifest, found, retried, todo)

    try:
        _agreed(refuse_early)
        model = load_model(checkpoint, getattr(torch, dtype)).to(state.device)
        empty = model.encode([], batch_size=batch_size, truncate_dim=truncate_dim)  # also checks the width
        plan = _agreed(prepare)
        manifest = plan.manifest
        started = time.perf_counter()
        encoder = _ShardEncoder(
            model, notes.path, output, plan, batch_size, truncate_dim, max_failures, bad_images, workers
        )
        with _Progress(output, manifest.num_notes, plan.kept, state) as progress:
            for shards in _runs(np.array_split(list(plan.todo), state.num_processes)[state.process_index]):
                rows = notes.rows(manifest.rows(shards[0])[0], manifest.rows(shards[-1])[1])
                for shard in shards:
                    encoder.encode(shard, rows, progress)
            if not state.is_main_process:
                return None
            while any(_version(output, shard) in (None, before) for shard, before in plan.todo.items()):
                time.sleep(0.2)  # no barrier: who is first done may wait for hours
                progress.show()
            progress.show()
        counts = whole_shards(output, manifest)
        (output / ".progress").unlink()
        seconds = time.perf_counter() - started
        text_only = sum(count_text_only(output, shard) for shard in counts)
        return EncodingSummary(counts.encoded, counts.failed, manifest.num_notes - plan.kept, seconds, text_only)
    finally:
        held.close()


def _version(output: Path, shard: int) -> tuple[int, int] | None:
    """What tells a shard's file of embeddings from one that is written in its place; None: there is none."""
    try:
        found = shard_file(output, "embeddings", shard).stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _refuse_failures(listed: dict[int, int], manifest: Manifest, max_failures: float, output: Path) -> None:
    """Raises ValueError for a shard of an earlier run that listed, as failed or as encoded by its text alone, more
    notes than may be."""
    for shard, count in listed.items():
        if count / manifest.notes_of_whole_shard > max_failures:
            raise ValueError(
                f"max_failures={max_failures:g} (--max-failures): {shard_file(output, 'failures', shard)} of an "
                f"earlier run, and the file of that name in text-only/, list {count} of "
                f"{manifest.notes_of_whole_shard} notes of a whole shard: add --retry-failures, or allow more."
            )


def _runs(shards: np.ndarray) -> list[list[int]]:
    """Shards that follow one another, whose rows are read in one go: a table cannot always be entered anywhere.

    >>> _runs(np.array([0, 1, 2, 5, 7, 8]))
    [[0, 1, 2], [5], [7, 8]]
    """
    runs = np.split(shards.astype(np.int64), np.flatnonzero(np.diff(shards) != 1) + 1)
    return [run.tolist() for run in runs if len(run)]


def process_state() -> PartialState:
    """The processes of this run, on processors if there is no accelerator, which `PartialState` alone would not see, or
    if `accelerate launch --cpu` asks for them."""
    is_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=is_cpu, timeout=LONGEST_WAIT)


def _check_settings(dtype: str, max_failures: float, bad_images: str, **at_least_one: int) -> None:
    for name, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype={dtype!r}: use one of {get_args(Dtype)}.")
    if bad_images not in get_args(BadImages):
        raise ValueError(f"bad_images={bad_images!r}: use one of {get_args(BadImages)}.")
    if not 0 <= max_failures <= 1:
        raise ValueError(f"max_failures={max_failures} must lie between 0 and 1: it is a share of a shard's notes.")


def _refuse_file(output: Path) -> None:
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"output={output}: {path} is a file; give a new or empty folder.")


def _agreed(find: Callable[[], Result]) -> Result:
    """What `find` returns or raises in the main process, in all processes."""

    def attempt() -> tuple[Any, Exception | None]:
        try:
            return find(), None
        except Exception as error:  # whatever it is, the others wait for an answer, and raise it, too
            return None, error

    found, error = said_by_main_process(attempt)
    if error is not None:
        raise error
    result: Result = found
    return result


def _take_folder(output: Path, held: ExitStack) -> None:
    """Takes the folder for this run.

    Raises:
        ValueError: it is no folder of embeddings, or another run is at work there.
    """
    if output.exists() and not (output / "manifest.json").exists():
        if foreign := [path.name for path in output.iterdir() if not path.name.startswith((".lock", ".manifest.json"))]:
            raise ValueError(f"output={output} holds {foreign[0]!r} and no manifest.json: give a new or empty folder.")
    held.enter_context(alone_in(output))


def _open_folder(output: Path, manifest: Manifest) -> None:
    """Makes the folder one of this corpus, and removes what a killed run was writing.

    Raises:
        ValueError: it holds the embeddings of another corpus, model or settings.
    """
    if (output / "manifest.json").exists():
        manifest.refuse_other(Manifest.read(output), output)
    else:
        manifest.write(output)
    for unfinished in (*output.glob("*/.shard-*"), *output.glob(".manifest.json.*")):
        unfinished.unlink()


class _ShardEncoder:
    """Encodes shards, one after another; see `encode_corpus` for the arguments. `notes` is the name of their table."""

    def __init__(
        self,
        model: NoteLLM2PreTrainedModel,
        notes: str | Path,
        output: Path,
        plan: _Plan,
        batch_size: int,
        truncate_dim: int | None,
        max_failures: float,
        bad_images: BadImages,
        workers: int,
    ) -> None:
        self.model = model
        self.notes = notes
        self.output = output
        self.plan = plan
        self.batch_size = batch_size
        self.truncate_dim = truncate_dim
        self.max_failures = max_failures
        self.bad_images = bad_images
        self.workers = workers
        # What a processor makes on first use has to be there before threads share it.
        model.processor.encode_note("-")

    def encode(self, shard: int, rows: Iterator[dict[str, Any]], progress: "_Progress") -> None:
        """Take the notes of a shard from `rows`, and write it."""
        manifest = self.plan.manifest
        start, stop = manifest.rows(shard)
        known = EncodedRows(np.empty(0, np.int64), [], np.empty((0, manifest.dim), np.float32))
        if shard in self.plan.retried:
            known = read_shard(self.output, manifest, shard)
        skipped = set(known.rows.tolist())
        read: list[tuple[str, int]] = []  # id and row of each note that the model got
        failures: list[Failure] = []
        text_only: list[Failure] = []

        def readable() -> Generator[EncodedNote, None, None]:
            numbered = enumerate(islice(rows, stop - start), start=start)
            wanted = ((row, note) for row, note in numbered if row not in skipped)
            ahead = WINDOW_BATCHES * self.batch_size
            for note_id, row, prepared, error in _ahead(self._prepare, wanted, self.workers, ahead):
                progress.add()
                if error is not None:
                    # The number in its message is another one than the table's.
                    failure = Failure(note_id, row, str(error).removeprefix(f"notes[{row}]").lstrip(" ."))
                    (failures if prepared is None else text_only).append(failure)
                    self._refuse_too_many(len(failures) + len(text_only), failure)
                if prepared is not None:
                    read.append((note_id, row))
                    yield prepared

        with closing(readable()) as notes:  # so that its threads end where the model is interrupted
            embeds = self.model.encode(
                notes, batch_size=self.batch_size, truncate_dim=self.truncate_dim, check_finite=False
            )
        assert isinstance(embeds, np.ndarray)
        is_finite = np.isfinite(embeds).all(axis=1)
        for position in np.flatnonzero(~is_finite).tolist():
            error = f"its embedding is not finite, computed in {manifest.dtype}: use float32, or check the weights."
            failures.append(Failure(*read[position], error))
            text_only = [failure for failure in text_only if failure.row != failures[-1].row]
            self._refuse_too_many(len(failures) + len(text_only), failures[-1])
        kept = [read[position] for position in np.flatnonzero(is_finite).tolist()]
        encoded = EncodedRows(
            np.concatenate([known.rows, np.array([row for _note_id, row in kept], np.int64)]),
            known.note_ids + [note_id for note_id, _row in kept],
            np.concatenate([known.vectors, embeds[is_finite]]),
        )
        write_shard(self.output, manifest, shard, encoded, failures, text_only)

    def _prepare(self, numbered: tuple[int, dict[str, Any]]) -> tuple[str, int, EncodedNote | None, NoteError | None]:
        """Id and row of a note, what the model gets of it, and what is wrong with it."""
        row, note = numbered
        processor = self.model.processor
        try:
            return note["note_id"], row, processor.load_image(processor.encode_note(note, row)), None
        except NoteError as error:
            if (cause := _passing_cause(error, note["image"])) is not None:
                raise NoteError(
                    f"{self._place(note['note_id'], row)}: {cause}. That is no fault of the note, so it is not listed: "
                    "repair the machine, its disks or network, and run the command again."
                ) from error
            return note["note_id"], row, self._text_alone(note, row), error

    def _text_alone(self, note: dict[str, Any], row: int) -> EncodedNote | None:
        """The note without its image; None where nothing is left of it, or the image is not to be left out."""
        if self.bad_images == "raise":
            return None
        try:
            encoded: EncodedNote = self.model.processor.encode_note({**note, "image": None}, row)
        except NoteError:
            return None
        return encoded

    def _refuse_too_many(self, count: int, last: Failure) -> None:
        """Raises NoteError if `count` notes of a shard are more than may be bad, the `last` one of them."""
        size = self.plan.manifest.notes_of_whole_shard
        if count / size > self.max_failures:
            raise NoteError(
                f"{self._place(last.note_id, last.row)}: {last.error} Failures in this shard: at least {count} of "
                f"{size} notes of a whole one, more than max_failures={self.max_failures:g} (--max-failures): repair "
                "what they have in common, or list them and go on, with a larger --max-failures."
            )

    def _place(self, note_id: str, row: int) -> str:
        return f"{self.notes}, row {row + 1}, note_id={note_id!r}"


def _passing_cause(error: NoteError, image: Any) -> OSError | None:
    """What made a note unreadable, if that may pass and the note be as it should."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno in PASSING_ERRORS:
        return cause
    if isinstance(image, str):
        try:  # the processor has asked only whether a file is there
            os.stat(image)
        except OSError as found:
            return found if found.errno in PASSING_ERRORS else None
    return None


def _ahead(function: Callable[[Item], Result], items: Iterable[Item], workers: int, depth: int) -> Iterator[Result]:
    """`map(function, items)` by threads, which are up to `depth` items ahead of what is asked for."""
    pool = ThreadPoolExecutor(workers)
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # where the run ends early, nobody wants the rest
        pool.shutdown(cancel_futures=True)


class _Progress:
    """One bar over the notes of all processes, which the main process shows: each says in a file how far it is.

    On several machines the file may reach the main process late, and so does the bar. Nothing else depends on it.
    """

    def __init__(self, output: Path, total: int, done: int, state: PartialState) -> None:
        self._counts = np.memmap(output / ".progress", np.int64, "r+", shape=(state.num_processes,))
        self._own = state.process_index
        self._done = done
        self._is_main = state.is_main_process
        self._bar = tqdm(total=total, initial=done, desc="encode", unit="note", disable=not self._is_main)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def add(self) -> None:
        """One note more."""
        self._counts[self._own] += 1
        if self._is_main:
            self.show()

    def show(self) -> None:
        """Bring the bar up to date."""
        self._bar.update(self._done + int(self._counts.sum()) - self._bar.n)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandParser(
        prog="python -m hub.encode",
        description="Encode a table of notes into Parquet files, by one process or, under accelerate launch, by many. "
        "Run it again to go on where it was interrupted.",
        epilog="Exit status: 0 when every note is encoded or listed, also if some have failed; 1 if none could be "
        "encoded, or the run ended early; 2 for a wrong command line; 130 when interrupted.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", help="checkpoint: a folder or Hub id")
    parser.add_argument("notes", help="table of notes: a Parquet, .arrow, CSV or JSON lines file, a folder or Hub id")
    parser.add_argument("--image-root", metavar="DIR", help=IMAGE_ROOT_HELP)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for embeddings and failures")
    parser.add_argument("--batch-size", type=int, default=32, help="notes a forward pass")
    parser.add_argument("--shard-size", type=int, default=10_000, help="notes a file")
    parser.add_argument(
        "--truncate-dim", type=int, metavar="D", help="keep the first D dimensions and normalise again (None: all)"
    )
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32", help="of the model's weights")
    parser.add_argument(
        "--max-failures",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of a shard's notes that may fail, as their picture cannot be read, and are listed; one more ends "
        "the run, before that shard is written. 0: the first one ends it; 1: none does",
    )
    parser.add_argument(
        "--bad-images",
        choices=get_args(BadImages),
        default="raise",
        help="what becomes of a note whose image cannot be read: it fails, or is one without image if it has a text, "
        "listed in text-only/, and counted for --max-failures all the same",
    )
    parser.add_argument(
        "--retry-failures",
        action="store_true",
        help="encode what an earlier run has listed, as failed or as encoded by its text alone, too",
    )
    parser.add_argument(
        "--workers", type=int, default=4, metavar="N", help="threads a process that decode pictures ahead of the model"
    )
    return parser


@interruption_said("what is encoded is kept; give the same command to go on.")
def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    options = build_parser().parse_args(argv)
    state = process_state()
    logging.getLogger().setLevel(logging.INFO if state.is_main_process else logging.ERROR)
    try:
        summary = encode_corpus(
            options.model,
            NoteTable(options.notes, options.image_root),
            options.output,
            dtype=options.dtype,
            batch_size=options.batch_size,
            shard_size=options.shard_size,
            truncate_dim=options.truncate_dim,
            max_failures=options.max_failures,
            retry_failures=options.retry_failures,
            bad_images=options.bad_images,
            workers=options.workers,
        )
    except NoteError as error:  # of this process alone
        sys.exit(str(error))
    except DiskError as error:  # of this process alone
        sys.exit(str(error))
    except (ValueError, OSError) as error:
        sys.exit(str(error) if state.is_main_process else 1)
    state.destroy_process_group()
    if summary is None:
        return
    sys.stdout.write(summary.sentence(options.output) + "\n")
    if summary.failed and not summary.encoded:
        sys.exit(f"No note could be encoded: see {options.output / 'failures'}.")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    main()
