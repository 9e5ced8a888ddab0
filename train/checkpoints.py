"""Which checkpoints are whole: a run that was killed, or whose disk was full, may leave one that is not, and a disk may
damage one later.

    RUN/checkpoint-N/checksums.json   of the checkpoint's files, and of those beside it that its run goes on with

Of a run's processes the main one reads, and the others hear of it: all of them must ask.
"""

import json
import logging
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pairs.disk import new_file, sha256
from train.distributed import said_by_main_process

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
BESIDE = ("hard_negatives/*.npy", "warmed_up.safetensors")
"""What a run goes on with besides a checkpoint, in the folder that the checkpoint is in."""


class WholeCheckpoint(str):
    """The path of a checkpoint that was found whole in this run: who gets one need not read all of it once more."""


class CheckpointChecksums(TrainerCallback):
    """Writes the checksums of a checkpoint when it is written.

    It is read once more for it, by one process: seconds a gigabyte.
    """

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """`args.output_dir` and `state.global_step` say which."""
        PartialState().wait_for_everyone()  # each process writes a random state, and may write a part of the weights
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero:
            write_checksums(folder)


def write_checksums(folder: Path) -> None:
    """Lists the files of a checkpoint, and those beside it that its run goes on with, with their checksums."""
    (folder / CHECKSUMS).unlink(missing_ok=True)
    files = [path for path in folder.rglob("*") if path.is_file()]
    files += [path for pattern in BESIDE for path in folder.parent.glob(pattern)]
    checksums = {Path(os.path.relpath(path, folder)).as_posix(): sha256(path) for path in sorted(files)}
    with new_file(folder / CHECKSUMS) as unfinished:
        unfinished.write_text(json.dumps(checksums, indent=2) + "\n", encoding="utf-8")


def newest_whole_checkpoint(folder: str | Path, processes: int = 1) -> Path | None:
    """The checkpoint of a run's folder to go on from: the newest that is whole. The log names those that are not.

    Args:
        folder: the run's `output_dir`.
        processes: how many processes are to go on.
    """
    return said_by_main_process(lambda: _newest(Path(folder), processes))


def _newest(folder: Path, processes: int) -> Path | None:
    numbered = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)):
            numbered.append((int(match[1]), path))
    for _step, path in sorted(numbered, reverse=True):
        problem = _problem(path, processes)
        if problem is None:
            return path
        logger.warning("%s is not whole and is passed over: %s", path, problem)
    return None


def checkpoint_problem(checkpoint: str | Path, processes: int = 1) -> str | None:
    """Why one cannot go on from a checkpoint, or None if one can.

    Everything that can tell a cut-off file from a whole one is read: sizes of safetensors, checksums of PyTorch's
    archives, JSON. `Trainer` writes its state last, and PyTorch the index of a sharded checkpoint. Then all files are
    compared with their checksums; a run that was killed just before these were written has none.

    Args:
        checkpoint: its folder.
        processes: how many processes are to go on; each needs its own random state.
    """
    return said_by_main_process(lambda: _problem(Path(checkpoint), processes))


def was_cut_off(checkpoint: Path) -> bool:
    """Whether a run ended while it wrote a checkpoint, which is then no training to go on from, and never was.

    `Trainer` writes its state last, and in place; its checksums come after it. A state that is unreadable in another
    way, or beside checksums, was whole once.
    """
    state = checkpoint / TRAINER_STATE_NAME
    if (checkpoint / CHECKSUMS).exists():
        return False
    if not state.exists():
        return True
    if _file_problem(state) is None:
        return False
    return not state.read_bytes().rstrip().endswith(b"\n}")  # braces within it are indented


def has_readable_state(checkpoint: Path) -> bool:
    """Whether the trainer's state of a checkpoint is there and is JSON; nothing else of it is looked at."""
    state = checkpoint / TRAINER_STATE_NAME
    return state.exists() and _file_problem(state) is None


def _problem(folder: Path, processes: int) -> str | None:
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / TRAINER_STATE_NAME).exists():
        return f"{TRAINER_STATE_NAME} is missing, which is written last"
    # One file, a folder of FSDP's, or DeepSpeed's folder.
    if not any(
        any(folder.glob(pattern)) for pattern in ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")
    ):
        return "it has no optimizer state: it was saved with save_only_model, or only in part"
    if not (folder / "scheduler.pt").exists():
        return "scheduler.pt is missing"
    random_states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    missing = [name for name in random_states if not (folder / name).exists()]
    if missing:
        return f"{missing[0]} is missing: it was saved by another number of processes, or only in part"
    weights = [path.name for path in folder.glob("model*.safetensors")]
    index = folder / "model.safetensors.index.json"
    if index.exists() and (problem := _file_problem(index)) is None:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if absent := sorted(shards.difference(weights)):
            return f"{absent[0]} is missing, which the index names"
    elif not weights and (pickles := [*folder.glob("pytorch_model*.bin"), *folder.glob("pytorch_model*.index.json")]):
        return f"its weights are a pickle ({min(pickles).name}), and only safetensors are read"
    elif not weights and not any(folder.glob("pytorch_model*")) and not any(folder.glob("global_step*")):
        return "it has no weights"
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and any(path.glob("*.distcp")) and not (path / ".metadata").exists():
            return f"{path.name} has no .metadata, which is written last"
        if path.is_file() and (problem := _file_problem(path)):
            return f"{path.relative_to(folder)} {problem}"
    return _damage(folder)


def _damage(folder: Path) -> str | None:
    """The first file that is not as its checksum says; what is beside the checkpoint may have been taken away."""
    if not (folder / CHECKSUMS).exists():
        logger.info("%s has no %s: damage that leaves its files readable would go unseen.", folder, CHECKSUMS)
        return None
    for name, checksum in json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")).items():
        if not (folder / name).exists():
            if not name.startswith("../"):
                return f"{name} is missing, which {CHECKSUMS} names"
        elif sha256(folder / name) != checksum:
            return f"{name} is damaged, by its checksum"
    return None


def _file_problem(path: Path) -> str | None:
    if path.stat().st_size == 0 and path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".json"):
        return "is empty"
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):  # its header says how long it has to be
                return None
        if path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            return None if damaged is None else f"is damaged ({damaged})"
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (SafetensorError, zipfile.BadZipFile, ValueError, OSError) as error:
        return f"cannot be read ({error})"
    return None


__all__ = [
    "CheckpointChecksums",
    "WholeCheckpoint",
    "checkpoint_problem",
    "has_readable_state",
    "newest_whole_checkpoint",
    "was_cut_off",
    "write_checksums",
]
