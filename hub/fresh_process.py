"""The other side of `hub.verify`: run by path, in a process of its own, with a checkpoint folder and libraries only.

    python -I fresh_process.py FOLDER NOTES.json EMBEDDINGS.npy [transformers | sentence-transformers]

Not part of the package: it imports nothing of this repository, and refuses to let anything else import it.
"""

import base64
import importlib.abc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

REPOSITORY = ("evaluation", "hub", "modeling_notellm2", "pairs", "train")


class HideRepository(importlib.abc.MetaPathFinder):
    """Hides the repository's packages, which an editable install puts on every process's path."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.partition(".")[0] in REPOSITORY:
            raise ModuleNotFoundError(f"{fullname} is hidden: a published folder must do without it", name=fullname)


# Sockets of this machine, whose address is a file, too: behind one may be whatever goes on to the network.
NETWORK = frozenset(
    f"socket.{call}"
    for call in ("bind", "connect", "getaddrinfo", "gethostbyaddr", "gethostbyname", "getnameinfo", "sendmsg", "sendto")
)
PROGRAMS = frozenset({"os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.system", "subprocess.Popen"})
# joblib counts the processors by it, where scikit-learn is; code that named it would learn no more than that.
HARMLESS_PROGRAM = "lscpu"
# What changes files without opening them: the positions of paths among the event's arguments, each with that of the
# descriptor of the folder which it is relative to, or None.
CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.link": ((0, 2), (1, 3)),  # what is linked could be written through the link
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.setxattr": ((0, None),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
}
FOLLOWING = frozenset({"os.chmod", "os.chown", "os.link", "os.setxattr", "os.truncate", "os.utime"})
# torch sets the last two for every process that it starts, to folders that it makes there.
CACHES = ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TORCH_HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
# What the machine says of itself: processors, memory, time zone, types of files.
SYSTEM_FILES = ("/dev/", "/etc/", "/proc/", "/sys/", "/usr/share/", "/usr/lib/", "/usr/local/lib/")
SYSTEM_LIBRARIES = ("/lib/", "/lib64/", "/usr/lib/", "/usr/lib64/", "/usr/local/")
SYSTEM_SECRETS = ("/etc/shadow", "/etc/ssh", "/etc/ssl/private")


class Confinement:
    """An audit hook that ends the process when anything in it turns to the network or to a socket, starts a program,
    opens a file elsewhere than in the folder, in the Python installation, or among its own files, or changes one
    elsewhere than among its own. It ends it, as an exception could be taken for a bad connection, and the library go
    on without.

    It sees what goes through Python. Compiled code that a folder brought would not be seen, and verification lets a
    folder bring none; nor is it a sandbox against code that means to break out.

    Args:
        readable: files and folders that may be read.
        writable: those that may also be written.
    """

    def __init__(self, readable: list[str], writable: list[str]) -> None:
        self.readable = [os.path.realpath(path) for path in (*readable, *writable)]
        self.writable = [os.path.realpath(path) for path in writable]

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in NETWORK:
            address = arguments[0] if event == "socket.getaddrinfo" else arguments[-1]
            _end(f"{event} {address!r}: the network is off")
        elif event in PROGRAMS and arguments[0] != HARMLESS_PROGRAM:
            _end(f"{event} {arguments[0]!r}: no program is started")
        elif event == "sqlite3.connect":  # it opens files unseen, and any other by ATTACH
            _end(f"{event} {arguments[0]!r}: no database is opened")
        elif event == "ctypes.dlopen":
            # Without a folder in its name it is a library of the system; transformers and torch load some.
            name = os.fsdecode(arguments[0] or "")
            path = os.path.realpath(name)
            is_known = path.startswith(SYSTEM_LIBRARIES) or _is_in(path, self.readable)
            if os.sep in name and (not is_known or _is_in(path, self.writable)):
                _end(f"{event} {path!r}: compiled code elsewhere is closed")
        elif event in CHANGES:
            for at, folder_at in CHANGES[event]:
                folder = -1 if folder_at is None else arguments[folder_at]
                changed = _changed(arguments[at], folder, event in FOLLOWING)
                if changed is not None and not _is_in(changed, self.writable):
                    _end(f"{event} {changed!r}: files elsewhere are closed")
        elif event == "open" and not isinstance(arguments[0], int):  # a number is a file that is open already
            path = os.path.realpath(os.fsdecode(arguments[0]))
            flags = arguments[2] or 0
            is_written = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND) != 0
            if is_written and not (_is_in(path, self.writable) or path in ("/dev/null", "/dev/shm")):
                _end(f"open {path!r} to write: files elsewhere are closed")
            # /proc/PID/environ has tokens in it.
            is_system = path.startswith(SYSTEM_FILES) and not (
                path.startswith(SYSTEM_SECRETS) or path.endswith("/environ")
            )
            if not (is_system or _is_in(path, self.readable)):
                _end(f"open {path!r}: files elsewhere are closed")


def _end(what: str) -> NoReturn:
    """End the process itself: an exception, `SystemExit` too, ends one thread at most, and can be caught."""
    try:
        message = f"{what}, and a published folder must do without it\n"
        os.write(2, message.encode(errors="backslashreplace"))  # unbuffered, and not what was put into `sys.stderr`
    finally:
        os._exit(1)


def _changed(path: Any, folder: int, is_followed: bool) -> str | None:
    """Where a change to `path` happens, a link at its end followed or not; None for a file that is open already."""
    if isinstance(path, int):
        return None
    name = os.fsdecode(path).rstrip(os.sep) or os.sep
    if folder != -1:
        name = os.path.join(os.path.realpath(f"/dev/fd/{folder}"), name)
    if is_followed:
        return os.path.realpath(name)
    return os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))


def _is_in(path: str, places: list[str]) -> bool:
    return any(path == place or path.startswith(place.rstrip(os.sep) + os.sep) for place in places)


def blobs(folder: str) -> list[str]:
    """The files that a snapshot in the cache of the Hub's client consists of: its own links lead to them."""
    root = os.path.realpath(folder)
    snapshots = os.path.dirname(root)
    if os.path.basename(snapshots) != "snapshots":
        return []
    own = os.path.join(os.path.dirname(snapshots), "blobs")
    found = (os.path.realpath(os.path.join(place, name)) for place, _, names in os.walk(root) for name in names)
    return [file for file in found if os.path.dirname(file) == own]


def load(folder: str, loader: str) -> tuple[Any, Any]:
    """What encodes notes, and the model behind it, computing in float32 whatever the weights are stored in."""
    import torch

    if loader == "sentence-transformers":
        from sentence_transformers import SentenceTransformer

        encoder = SentenceTransformer(
            folder, trust_remote_code=True, device="cpu", model_kwargs={"dtype": torch.float32}
        )
        return encoder, encoder[0].model
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return model, model


def main(folder: str, notes_file: str, embeddings_file: str, loader: str = "transformers") -> None:
    """Load the folder with its own code, encode the notes, save the embeddings."""
    sys.meta_path.insert(0, HideRepository())
    installation = [sys.prefix, sys.base_prefix, *filter(None, sys.path)]
    own = [str(Path(name).parent) for name in (notes_file, embeddings_file)]  # a temporary folder
    # Libraries look into the user's caches for what they have; there is nothing to find.
    os.environ.update(dict.fromkeys(CACHES, own[0]))
    tempfile.tempdir = own[0]
    import numpy as np
    import torch  # noqa: F401
    import transformers  # noqa: F401

    if loader == "sentence-transformers":
        import sentence_transformers  # noqa: F401
    # Before it the libraries alone have run, which look for compilers and shared objects.
    sys.addaudithook(Confinement([folder, *blobs(folder), __file__, *installation], own))

    notes = json.loads(Path(notes_file).read_text(encoding="utf-8"))
    for note in notes:
        if "image" in note:
            note["image"] = base64.b64decode(note["image"])
    encoder, model = load(folder, loader)
    if not type(model).__module__.startswith("transformers_modules."):
        raise SystemExit(f"the model came from {type(model).__module__}, not from the folder's own code")
    np.save(embeddings_file, encoder.encode(notes))


if __name__ == "__main__":
    main(*sys.argv[1:])
