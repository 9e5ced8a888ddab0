"""Disks that fill up, files that are damaged, processes that are killed, and two runs that want one place.

What is written appears under its name when it is whole. A run that ends early, however it does, leaves nothing that a
later one would take for whole, and no lock: locks are the operating system's, which gives back those of a process that
is no more.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = "unfinished-"
"""What the names of unfinished files and folders have after a dot and the name of what they are to be."""

_DISK_ERRORS = frozenset(
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS") if hasattr(errno, name)
)
# Arrow, DuckDB, safetensors, tokenizers, PyTorch and NumPy have kinds of errors of their own, and no number in them.
_DISK_WORDS = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|Input/output error|Read-only file system|"
    r"PytorchStreamWriter failed writing|inline_container\.cc:\d+\] \. unexpected pos|iostream error|"
    r"\d+ requested and \d+ written"
)
# What PyTorch names the memory that processes share, of which /dev/shm is the file system.
_SHARED_MEMORY = re.compile(r"(?<![\w.])(/dev/shm)?/torch_\w+")

_LOCKS: set[int] = set()
"""Descriptors of the files that this process has locked."""


class DiskError(OSError):
    """Something cannot be written, for want of room most of the time; the message says where, why and what to do."""


class BusyError(ValueError):
    """Another run is at work in the same place."""


class DamagedError(ValueError):
    """A file is not as it was written."""


def disk_trouble(error: BaseException) -> str | None:
    """What an error says of the disk, in one line; None: it is not of the disk.

    >>> disk_trouble(OSError(28, "No space left on device")), disk_trouble(FileNotFoundError(2, "no such file"))
    ('[Errno 28] No space left on device', None)
    """
    text = str(error)
    if (isinstance(error, OSError) and error.errno in _DISK_ERRORS) or _DISK_WORDS.search(text):
        return text.strip().partition("\n")[0]
    return None


@contextmanager
def disk_errors_named(place: str | Path) -> Iterator[None]:
    """Raises DiskError where what is written to `place`, a file or a folder, cannot be; other errors go on as they are,
    also those of the disk that name a file elsewhere.

    The innermost of several says where.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:  # of every kind: tokenizers raises Exception itself
        if (trouble := disk_trouble(error)) is None:
            raise
        if _SHARED_MEMORY.search(trouble):
            raise DiskError(
                f"/dev/shm, the memory that the loaders share, cannot be written ({trouble}): make it larger, or take "
                "fewer loaders or smaller batches, and run the same command again."
            ) from error
        # A copy names its source first.
        names = [error.filename, error.filename2] if isinstance(error, OSError) else []
        files = [os.fsdecode(name) for name in names if isinstance(name, str | bytes)]
        if files and not any(_is_of(file, place) for file in files):
            raise
        raise DiskError(
            f"{place} cannot be written ({trouble}): make room on its disk, or give another place, and run the same "
            "command again."
        ) from error


def _is_of(file: str, place: str | Path) -> bool:
    """Whether a file is the place, below it, one of its unfinished ones, or a folder that is made for it."""
    for absolute in (os.path.abspath, os.path.realpath):
        target, found = Path(absolute(place)), Path(absolute(file))
        if found in target.parents:
            return True
        for path in (found, *found.parents):
            if path == target or (path.parent == target.parent and path.name.startswith(f".{target.name}.")):
                return True
    return False


@contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Has a folder, which is made, for this process alone, by a lock on FOLDER/.lock.

    Raises:
        BusyError: another process has it.
    """
    with disk_errors_named(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    with _locked(Path(folder) / ".lock", folder):
        yield


@contextmanager
def alone_at(path: str | Path) -> Iterator[None]:
    """Has the place of a file or of a new folder for this process alone, by a lock beside it, which is taken away.

    Raises:
        BusyError: another process has it.
    """
    target = Path(path).absolute()
    with disk_errors_named(path):
        target.parent.mkdir(parents=True, exist_ok=True)
    file = target.parent / f".{target.name}.lock"
    with _locked(file, path, is_taken_away=True):
        for unfinished in target.parent.iterdir():  # no pattern: names may hold brackets
            if unfinished.name.startswith(f".{target.name}.{UNFINISHED}"):  # of a run that was killed
                remove(unfinished)
        yield


def remove(path: Path) -> None:
    """Removes a file, or a folder with all in it."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def _locked(file: Path, place: str | Path, is_taken_away: bool = False) -> Iterator[None]:
    descriptor = _lock(file, place)
    try:
        yield
    finally:
        if descriptor in _LOCKS:  # it is not in a forked process that comes here, too
            if is_taken_away:
                file.unlink(missing_ok=True)  # while it is held: who has opened it meanwhile sees that it is gone
            _unlock(descriptor)


def _lock(file: Path, place: str | Path) -> int:
    """The descriptor of a file that is locked, and that stands under its name.

    Raises:
        BusyError: another has it.
        DiskError: the file cannot be made, or its file system has no locks.
    """
    while True:
        with disk_errors_named(place):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        _LOCKS.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, file):
                return descriptor
        except BlockingIOError as error:
            _unlock(descriptor)
            raise BusyError(
                f"{place}: another run is at work there: wait for it or end it, or give another output."
            ) from error
        except OSError as error:
            _unlock(descriptor)
            raise DiskError(
                f"{place} cannot be locked ({error}), so that two runs could mix there: give a place on a file system "
                "that has locks."
            ) from error
        _unlock(descriptor)  # its holder took it away between our opening and our locking it


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _unlock(descriptor: int) -> None:
    _LOCKS.remove(descriptor)
    os.close(descriptor)  # which frees it, as no forked process has it any longer


def _forget_locks() -> None:
    """In a forked process: a lock is its parent's, and is to end with it."""
    for descriptor in _LOCKS:
        os.close(descriptor)
    _LOCKS.clear()


os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Gives a folder beside its place, which is renamed when the block ends well, and removed when it does not.

    Raises:
        FileExistsError: the place is taken.
        BusyError: another run is writing it.
        DiskError: it cannot be written.
    """
    target = Path(folder)
    refuse_taken(target)
    with alone_at(target), disk_errors_named(target):
        refuse_taken(target)  # by a run that has just ended
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.{UNFINISHED}", dir=target.absolute().parent))
        staging.chmod(0o777 & ~_umask())  # nobody else can read what mkdtemp makes
        try:
            yield staging
            staging.replace(target)
        except BaseException:
            shutil.rmtree(staging)
            raise


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """The same for a file, which may be there already, and then is replaced in one step.

    Raises:
        DiskError: it cannot be written.
    """
    target = Path(path)
    with disk_errors_named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.{UNFINISHED}")
        os.close(handle)
        try:
            yield Path(name)
            os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files that only their owner can read
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise


def refuse_taken(folder: str | Path) -> None:
    """Raises FileExistsError where a new folder cannot be written: something is there, other than an empty folder."""
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise FileExistsError(f"folder={str(folder)!r} exists: give another name, or delete it first.")


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


__all__ = [
    "BusyError",
    "DamagedError",
    "DiskError",
    "alone_at",
    "alone_in",
    "disk_errors_named",
    "disk_trouble",
    "new_file",
    "new_folder",
    "refuse_taken",
    "remove",
    "sha256",
]
