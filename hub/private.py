"""The last look at a folder before it is published: no credential, and no place of a machine.

What goes into a folder is chosen by name where it is written. This is for what came along unseen, in whatever a
checkpoint brought or a library wrote: all of it is read, weights for what their header says of them.
"""

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from hub.verify import folder_files

# Of Hugging Face, GitHub, AWS and of private keys: nothing else looks like them.
_CREDENTIALS = re.compile(
    rb"\b(hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|AKIA[A-Z0-9]{16})"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY"
)
# Of OpenAI and Slack: a piece of a vocabulary may look so.
_LIKE_CREDENTIALS = re.compile(rb"\b(sk-[\w-]{20,}|xox[a-z]-[\w-]{10,})")
# Vocabularies hold any text, also what looks like a folder.
VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"})
# Numbers and pixels: what looks like a place there is none.
_PICTURES_AND_GRAPHS = (".onnx", ".data", ".bmp", ".gif", ".jpeg", ".jpg", ".mpo", ".png", ".tiff", ".webp")
# Folders of people, projects and containers, on whatever machine a checkpoint was before this one.
_NAME = r"""[^\s"'`<>(),;|/\\]+"""
_ANY_PLACE = re.compile(
    r"(?<![\w./:~-])(?:file://)?/(?:(?:home|root|Users|Volumes|mnt|srv|tmp|scratch|workspaces?|nfs|lustre|gpfs|kaggle|dbfs)/"
    # A word of an address or of a sentence, too ("/data/notes"): a place goes on below it.
    rf"|(?:data|content|media|private|var|opt)/{_NAME}/)[^\s\"'`<>)]+"
    # Nobody's own: it says where a library keeps what it fetched.
    r"|(?<![\w/])~/(?!\.cache\b)[^\s\"'`<>)]+"
)
# "Q:\n" in a text about code is none.
_DRIVE = re.compile(rf"(?<!\w)[A-Za-z]:(?:[\\/]+(?:Users|Documents)\b[^\s\"'`<>)]*|\\+{_NAME}\\+{_NAME}[^\s\"'`<>)]*)")


class PrivateError(RuntimeError):
    """A folder to publish holds a credential, or names a place of a machine; nothing was written."""


def refuse_private(
    folder: str | os.PathLike, places: Iterable[str | os.PathLike] = (), *, notes: Collection[str] = ()
) -> None:
    """Read all of a folder that is about to be published.

    Args:
        folder: the folder.
        places: folders of this machine that must not be named, beside what looks like one of any machine.
        notes: names of files that hold what other people wrote, in which no folder is looked for, but credentials are.

    Raises:
        PrivateError: with the file's name, and of a credential its first letters only.
    """
    root = Path(folder)
    found = [place for place in map(Path, places) if place.exists()]
    spellings = {str(place.resolve()) for place in found} | {str(place.absolute()) for place in found}
    patterns = {place: _place_pattern(place) for place in spellings if len(Path(place).parts) > 1}
    for name in folder_files(folder):
        is_vocabulary = Path(name).name in VOCABULARIES
        content = _header(root / name) if name.endswith(".safetensors") else (root / name).read_bytes()
        credential = _CREDENTIALS.search(content)
        if credential is None and not is_vocabulary:
            credential = _LIKE_CREDENTIALS.search(content)
        if credential:
            raise PrivateError(
                f"{name} would hold what looks like a credential ({credential[0][:6].decode()}…): remove it from where "
                "it came from, and revoke it if it is one."
            )
        if is_vocabulary or name in notes or name.endswith(_PICTURES_AND_GRAPHS):
            continue
        for place, pattern in patterns.items():
            # A comment of our own code may have "/data/" in it.
            if (len(Path(place).parts) > 2 or not name.endswith(".py")) and pattern.search(content):
                raise PrivateError(
                    f"{name} would name the folder {place} of this machine: remove it from the checkpoint."
                )
        if not name.endswith(".py"):
            for text, is_template in _texts(name, content):
                if found_place := _ANY_PLACE.search(text) or (None if is_template else _DRIVE.search(text)):
                    raise PrivateError(
                        f"{name} would name {found_place[0]!r}, a place of a machine: {_remedy(name, is_template)}."
                    )


def _header(file: Path) -> bytes:
    """What safetensors says of itself: names, shapes and free text. The numbers after it say nothing."""
    with open(file, "rb") as stream:
        return stream.read(int.from_bytes(stream.read(8), "little"))


def _remedy(name: str, is_template: bool) -> str:
    if Path(name).name == "README.md":
        return "take it out of what the card is written from, its options and the run's report"
    if is_template:
        return "take it out of the tokenizer's chat template, and save the tokenizer again"
    if name.endswith(".safetensors"):
        return "save the weights again without it in their metadata"
    return "remove it from the file of this name in the checkpoint, or from the settings that it is written from"


def _texts(name: str, content: bytes) -> Iterator[tuple[str, bool]]:
    """The texts in a file, as they are meant, and whether each is a chat template: JSON doubles what a path of Windows
    has between its folders, and a template spells a line break as such a path spells a folder that begins with n."""
    text = content.decode("utf-8", errors="replace")
    if name.endswith(".json"):
        yield from _strings(json.loads(text), False)
    else:
        yield text, name.endswith(".jinja")


def _strings(value: Any, is_template: bool) -> Iterator[tuple[str, bool]]:
    if isinstance(value, str):
        yield value, is_template
    elif isinstance(value, dict):
        for key, part in value.items():
            yield str(key), False
            yield from _strings(part, is_template or key == "chat_template")
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part, is_template)


def _place_pattern(place: str) -> re.Pattern[bytes]:
    """Finds a folder in the bytes of a file, also as JSON spells it. A folder right below the root, such as "/root",
    counts where a path goes on from it, and not as the middle of a longer one or of an address."""
    spelled = b"|".join(re.escape(way.encode()) for way in {place, json.dumps(place)[1:-1]})
    if len(Path(place).parts) > 2:
        return re.compile(spelled)
    return re.compile(rb"(?:(?<![\w./-])|(?<=file://))(?:" + spelled + rb")[/\\]")


__all__ = ["VOCABULARIES", "PrivateError", "refuse_private"]
