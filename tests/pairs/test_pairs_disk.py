"""Files appear when they are whole, a full disk has a name, and a place has one run at a time."""

import errno
import fcntl
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from pairs.disk import (
    BusyError,
    DiskError,
    alone_at,
    alone_in,
    disk_errors_named,
    disk_trouble,
    new_file,
    new_folder,
    remove,
)

FULL = "/dev/full"
"""A device that takes no byte, as a full disk does. Written to through a link: Arrow deletes what it cannot write."""

TABLE = pa.table({"number": np.random.default_rng(0).random(1000)})


def write_by_python(full: Path) -> None:
    full.write_text("text")


def write_by_numpy(full: Path) -> None:
    with open(full, "wb") as file:
        np.save(file, np.random.default_rng(0).random(100_000))


def write_by_arrow(full: Path) -> None:
    pq.write_table(TABLE, full)


def write_by_arrow_stream(full: Path) -> None:
    with pa.ipc.new_stream(str(full), TABLE.schema) as writer:
        writer.write_table(TABLE)


def write_by_duckdb(full: Path) -> None:
    duckdb.sql(f"COPY (SELECT range AS number FROM range(100000)) TO '{full}' (FORMAT csv, USE_TMP_FILE false)")


def write_by_torch(full: Path) -> None:
    torch.save({"weights": torch.rand(100_000)}, full)


def write_by_safetensors(full: Path) -> None:
    """It renames a new file to the name, and would put it in place of the link: no file may grow beyond a size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        save_file({"weights": torch.rand(100_000)}, full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write_by_tokenizers(full: Path) -> None:
    Tokenizer(models.BPE()).save(str(full))


WRITERS = [
    *(write_by_python, write_by_numpy, write_by_arrow, write_by_arrow_stream, write_by_duckdb, write_by_torch),
    *(write_by_safetensors, write_by_tokenizers),
]


@pytest.mark.skipif(not os.path.exists(FULL), reason="no such device")
@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_known_whoever_writes(write: Callable[[Path], None], tmp_path: Path):
    full = tmp_path / "full"
    full.symlink_to(FULL)
    with pytest.raises(DiskError, match=r"some/place cannot be written \(.+make room"), disk_errors_named("some/place"):
        write(full)


def test_other_errors_go_on_as_they_are():
    for error in (FileNotFoundError(2, "no such file"), ValueError("weights"), RuntimeError("CUDA error"), KeyError(1)):
        assert disk_trouble(error) is None
        with pytest.raises(type(error)) as caught, disk_errors_named("place"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("name", "is_of_place"),
    [
        ("out", True),
        ("out/part/file", True),
        (".out.unfinished-a/file", True),
        ("", True),  # the folder that is made for it
        ("other", False),
        ("outer/file", False),
        ("pictures/a.png", False),
    ],
)
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_file_elsewhere_is_not_called_the_place(name: str, is_of_place: bool, number: int, tmp_path: Path):
    """A picture that its own disk cannot give is no output that cannot be written."""
    error = OSError(number, os.strerror(number), str(tmp_path / name))
    with pytest.raises(OSError) as caught, disk_errors_named(tmp_path / "out"):
        raise error
    assert isinstance(caught.value, DiskError) == is_of_place and (is_of_place or caught.value is error)


def test_a_copy_into_the_place_is_of_the_place(tmp_path: Path):
    """It names its source first, which is elsewhere; a copy between other places is no business of ours."""
    number, source = errno.ENOSPC, str(tmp_path / "source.py")
    with pytest.raises(DiskError, match=r"out cannot be written"), disk_errors_named(tmp_path / "out"):
        raise OSError(number, os.strerror(number), source, None, str(tmp_path / ".out.unfinished-1" / "source.py"))
    error = OSError(number, os.strerror(number), source, None, str(tmp_path / "other"))
    with pytest.raises(OSError) as caught, disk_errors_named(tmp_path / "out"):
        raise error
    assert caught.value is error


def test_full_shared_memory_has_words_of_its_own():
    words = "unable to write to file </torch_2711_38_0>: No space left on device (28)"
    for error in (RuntimeError(words), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/torch_2711_38_0")):
        with pytest.raises(DiskError, match=r"^/dev/shm.*fewer loaders"), disk_errors_named("some/place"):
            raise error
    other = RuntimeError("some/torch_weights: No space left on device")
    with pytest.raises(DiskError, match=r"^some/place cannot"), disk_errors_named("some/place"):
        raise other


def test_a_file_is_whole_or_absent(tmp_path: Path):
    target = tmp_path / "new" / "table.txt"
    for content in ("first", "second"):
        with new_file(target) as unfinished:
            unfinished.write_text(content)
            assert not target.exists() or target.read_text() == "first"
        assert target.read_text() == content
    with pytest.raises(KeyError), new_file(target) as unfinished:
        unfinished.write_text("half")
        raise KeyError
    assert target.read_text() == "second" and list(target.parent.iterdir()) == [target]


def test_a_folder_is_whole_or_absent(tmp_path: Path):
    target = tmp_path / "folder"
    with pytest.raises(KeyError), new_folder(target) as unfinished:
        (unfinished / "half").write_text("half")
        raise KeyError
    assert not list(tmp_path.iterdir())
    with new_folder(target) as unfinished:
        (unfinished / "file").write_text("whole")
        assert not target.exists()
    assert (target / "file").read_text() == "whole" and list(tmp_path.iterdir()) == [target]
    with pytest.raises(FileExistsError, match="exists"), new_folder(target):
        pass


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path: Path):
    others = [tmp_path / name for name in (".out.mine", ".out.parquet.unfinished-a", "out.unfinished-b")]
    for path in (*others, tmp_path / ".out.unfinished-file"):
        path.write_text("")
    (tmp_path / ".out.unfinished-folder").mkdir()
    with alone_at(tmp_path / "out"):
        pass
    assert sorted(tmp_path.iterdir()) == sorted(others)


def hammer(place: Path, until: float, said: Connection) -> None:
    entered, met = 0, 0
    while time.monotonic() < until:
        try:
            with alone_at(place):
                try:
                    os.close(os.open(place.parent / "inside", os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    met += 1
                    continue
                entered += 1
                os.unlink(place.parent / "inside")
        except BusyError:
            pass
    said.send((entered, met))


def test_no_two_are_ever_inside(tmp_path: Path):
    """Lock files are taken away and made again all the time."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    until = time.monotonic() + 2
    processes = [context.Process(target=hammer, args=(tmp_path / "place", until, writer)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [reader.recv() for _ in processes if reader.poll(60)]
    for process in processes:
        process.join()
    assert len(found) == 4 and all(entered > 10 for entered, _ in found)
    assert not any(met for _, met in found)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lock", [alone_in, alone_at])
def test_a_forked_process_does_not_hold_its_parents_lock(lock: Callable, tmp_path: Path):
    """It may outlive it, as loaders do for some seconds; and when it ends the lock is still its parent's."""
    context = multiprocessing.get_context("fork")
    with lock(tmp_path / "place"):
        child = context.Process(target=time.sleep, args=(600,))
        child.start()
        short = context.Process(target=time.sleep, args=(0,))
        short.start()
        short.join()
        with pytest.raises(BusyError), lock(tmp_path / "place"):
            pass
    with lock(tmp_path / "place"):
        pass
    child.kill()
    child.join()


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(DiskError, match="place cannot be locked .*file system"), alone_at(tmp_path / "place"):
        pass


def test_links_files_and_folders_are_removed(tmp_path: Path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    remove(tmp_path / "link")
    assert (tmp_path / "folder" / "inner").is_dir()
    remove(tmp_path / "folder")
    remove(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def hold(lock: Callable, path: Path) -> None:
    with lock(path):
        (path.parent / "held").touch()
        time.sleep(600)


@pytest.mark.parametrize("lock", [alone_in, alone_at])
def test_a_second_run_is_refused_until_the_first_is_killed(lock: Callable, tmp_path: Path):
    place = tmp_path / "place"
    first = multiprocessing.get_context("fork").Process(target=hold, args=(lock, place))
    first.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.001)
    with pytest.raises(BusyError, match="place: another run is at work there"), lock(place):
        pass
    with lock(tmp_path / "other"):  # control: it is this place
        pass
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    for _ in range(2):
        with lock(place):
            pass
