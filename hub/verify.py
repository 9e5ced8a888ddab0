"""Prove that a checkpoint stands on its own.

    python -m hub.verify DIR

Encodes a few notes here, then in a fresh process that cannot import this repository and loads the folder's own code
with `trust_remote_code=True`, and compares. A folder that passes works for people who have nothing but transformers.

A folder that `hub.export` wrote holds more: a list of its files with their checksums, and notes with their embeddings,
recorded when it was written. There the files are compared with the list first, and then the recorded embeddings with
those of this process, of a fresh process with transformers, and of one with sentence-transformers where it is
installed.

Before any code of a folder runs, it is compared with that of the installed package, byte by byte. The list says that a
folder is as somebody wrote it, not who: whoever changes a file can write the list anew. `--sha256`, with the list's own
checksum as the publisher announced it, is what says who.
"""

import argparse
import base64
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoModel
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_notellm2
from modeling_notellm2 import NoteLLM2Model
from pairs.command import CommandParser, interruption_said
from pairs.disk import sha256

TOLERANCE = 1e-5
CHECKSUMS = "checksums.sha256"
"""The list of an export's other files, as `sha256sum` writes and checks it."""
RECORD = "verification.json"
"""An export's recorded `notes`, images as Base64 of an image file, and `embeddings`, one list of numbers a note."""

Loader = Literal["transformers", "sentence-transformers"]

# Weights in these kinds of file are or may be pickles, which run code when they are loaded.
_PICKLES = frozenset({".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"})
# The other files that an export may hold, by name: a list of checksums can be written anew with more in it.
_EXPORTED = re.compile(
    r"(config|processor_config|preprocessor_config|generation_config|tokenizer_config|tokenizer|special_tokens_map|"
    r"added_tokens|vocab|chat_template|modules|config_sentence_transformers|provenance|verification|"
    r"model\.safetensors\.index)\.json|model(-\d{5}-of-\d{5})?\.safetensors|[a-z_]+_notellm2\.py|README\.md|merges\.txt|"
    r"vocab\.txt|(additional_chat_templates/)?[\w-]+\.jinja|checksums\.sha256|training/(settings\.yaml|report\.json)|evaluation/report\.json"
)
# What `hf download --local-dir` keeps of a download.
_DOWNLOADS = re.compile(r"\.cache/huggingface/(\.gitignore|CACHEDIR\.TAG|download/([^/]+/)*[^/]+\.(metadata|lock))")
_PROVENANCE = "provenance.json"


class VerificationError(RuntimeError):
    """The folder is not whole, does not load, or does not give the same embeddings, in a fresh process."""


def sample_notes(with_images: bool) -> list[dict[str, Any]]:
    """Notes that reach every path of the processor: with and without image, without text, long, hostile."""
    notes: list[dict[str, Any]] = [
        {"title": "Oak shelf", "topics": ["home", "wood"], "content": "A shelf for small things."},
        {"title": "<IMG> <IMG_EMB> </s>", "content": "Text that names control tokens is text about them. " * 40},
        {"content": "蓝色的沙发"},
    ]
    if not with_images:
        return notes
    generator = np.random.default_rng(0)
    pictures = []
    # None much taller than wide: Pillow 13 resizes such a picture in another order than Pillow 12 (docs/COMPAT.md),
    # which says nothing about the folder.
    for width, height in ((64, 48), (90, 40), (32, 32)):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    return [{**notes[0], "image": pictures[0]}, {**notes[1], "image": pictures[1]}, notes[2], {"image": pictures[2]}]


def pack_notes(notes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Notes whose images are the bytes of image files ─► notes that JSON can hold, images in Base64."""
    return [
        {**note, "image": base64.b64encode(note["image"]).decode()} if "image" in note else dict(note) for note in notes
    ]


def unpack_notes(packed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The inverse of `pack_notes`."""
    return [{**note, "image": base64.b64decode(note["image"])} if "image" in note else dict(note) for note in packed]


def folder_files(folder: str | os.PathLike) -> list[str]:
    """Paths of all that is below `folder` and no folder itself, relative, in order: hidden files and links too, without
    what the Hub and its client add to a download."""
    found = []
    for place, folders, files in os.walk(os.fspath(folder)):
        # A link to a folder is one thing, which is not looked into.
        names = [*files, *(name for name in folders if os.path.islink(os.path.join(place, name)))]
        found += [Path(place, name).relative_to(folder).as_posix() for name in names]
    return sorted(
        name
        for name in found
        if name != ".gitattributes" and not name.startswith(".git/") and _DOWNLOADS.fullmatch(name) is None
    )


def is_export(folder: str | os.PathLike) -> bool:
    """Whether `hub.export` wrote the folder, though somebody may have removed a part of it."""
    return any((Path(folder) / name).exists() for name in (CHECKSUMS, RECORD, _PROVENANCE))


def write_record(folder: str | os.PathLike) -> None:
    """Encode the sample notes with the checkpoint in `folder`, in float32, and keep both in it."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    notes = sample_notes(with_images=model.config.has_vision)
    record = {"notes": pack_notes(notes), "embeddings": model.encode(notes).tolist()}
    text = json.dumps(record, ensure_ascii=False)
    (Path(folder) / RECORD).write_text(text + "\n", encoding="utf-8")


def read_record(folder: str | os.PathLike) -> tuple[list[dict[str, Any]], np.ndarray]:
    """An export's recorded notes, images as the bytes of image files, and their embeddings (N, D) float32.

    Raises:
        VerificationError: the record cannot be read.
    """
    try:
        record = json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
        return unpack_notes(record["notes"]), np.array(record["embeddings"], dtype=np.float32)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VerificationError(f"{folder}: {RECORD} cannot be read ({error!r}): export again.") from error


def write_checksums(folder: str | os.PathLike) -> None:
    """List all files of `folder` with their checksums in a file beside them."""
    lines = [f"{sha256(Path(folder) / name)}  {name}\n" for name in folder_files(folder) if name != CHECKSUMS]
    (Path(folder) / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def listed_files(folder: str | os.PathLike) -> dict[str, str]:
    """An export's list of its other files: relative path ─► SHA-256 in hexadecimal.

    Raises:
        VerificationError: the list cannot be read.
    """
    listed: dict[str, str] = {}
    try:
        lines = (Path(folder) / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VerificationError(f"{folder}: {CHECKSUMS} cannot be read ({error}): export again.") from error
    for number, line in enumerate(lines, start=1):
        checksum, separator, name = line.partition("  ")
        if not separator or re.fullmatch("[0-9a-f]{64}", checksum) is None or name in listed or not _is_inside(name):
            raise VerificationError(f"{folder}: line {number} of {CHECKSUMS} is {line!r}: export again.")
        listed[name] = checksum
    return listed


def _is_inside(name: str) -> bool:
    return not name.startswith("/") and not {"", ".", ".."} & set(name.split("/"))


def _foreign_links(root: Path, names: Iterable[str]) -> set[str]:
    """Links that do not lead to the cache of the Hub's client, which keeps a download as links to its own `blobs`."""
    blobs = root.resolve().parent.parent / "blobs"
    is_cached = root.resolve().parent.name == "snapshots"
    links = {name for name in names if any(part.is_symlink() for part in _parts_below(root, name))}
    return {name for name in links if not (is_cached and (root / name).resolve().parent == blobs)}


def _parts_below(root: Path, name: str) -> list[Path]:
    path = root / name
    return [path, *(parent for parent in path.parents if parent != root and root in parent.parents)]


def check_files(folder: str | os.PathLike) -> None:
    """Compare an export's files with its list, and its code with what its configs name.

    Raises:
        VerificationError: a file is missing, was changed or was added; is a link, or none that an export has; weights
            are not safetensors; the code lacks a file, or holds one that nothing imports.
    """
    root, listed = Path(folder), listed_files(folder)
    everything = folder_files(folder)
    present = set(everything) - {CHECKSUMS}
    if links := _foreign_links(root, everything):  # before any is read
        raise VerificationError(
            f"{folder} holds links: {', '.join(sorted(links))}. Export again, or copy what they are."
        )
    for problem, names in (
        ("lacks", set(listed) - present),
        (f"holds what {CHECKSUMS} does not list:", present - set(listed)),
        (
            "has other content than it was exported with:",
            {name for name in present if sha256(root / name) != listed.get(name)},
        ),
        ("holds what may be a pickle:", {name for name in present if Path(name).suffix.lower() in _PICKLES}),
        ("holds what no export has:", {name for name in present if _EXPORTED.fullmatch(name) is None}),
    ):
        if names:
            raise VerificationError(f"{folder} {problem} {', '.join(sorted(names))}. Export again.")
    _check_code(root)


def _check_code(root: Path) -> None:
    named = set()
    try:
        for config in ("config.json", "processor_config.json"):
            named |= set(json.loads((root / config).read_text(encoding="utf-8"))["auto_map"].values())
        named |= {module["type"] for module in json.loads((root / "modules.json").read_text(encoding="utf-8"))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerificationError(
            f"{root}: its configs do not name its code ({type(error).__name__}: {error}). Export again."
        ) from error
    needed = set()
    for reference in named:
        file = root / f"{reference.split('.')[0]}.py"
        try:
            needed |= {file.name, *(Path(name).name for name in get_relative_import_files(file))}
        except FileNotFoundError as error:
            raise VerificationError(f"{root} lacks code that {reference} needs ({error}). Export again.") from error
    present = {path.name for path in root.glob("*.py")}
    if needed != present:
        raise VerificationError(
            f"{root} needs the code {sorted(needed)} and holds {sorted(present)}: export again, so that both agree."
        )


def check_code(folder: str | os.PathLike) -> None:
    """Compare a folder's code with that of the installed package, byte by byte.

    Raises:
        VerificationError: a file differs, or the package has none of this name.
    """
    installed = Path(modeling_notellm2.__file__).parent
    for file in sorted(Path(folder).rglob("*.py")):
        own = installed / file.name
        if not own.is_file() or own.read_bytes() != file.read_bytes():
            raise VerificationError(
                f"{folder}: {file.name} is not that of the installed modeling_notellm2 {modeling_notellm2.__version__}"
                f"{_release_of(Path(folder))}. Nothing of it was run. Install the release that the folder was exported "
                "with, export again, or read its code and allow it (--allow-other-code)."
            )


def _release_of(root: Path) -> str:
    try:
        found = json.loads((root / _PROVENANCE).read_text(encoding="utf-8"))["notellm2"]
    except (OSError, ValueError, KeyError, TypeError):  # no export, or a damaged one: its code is refused all the same
        return ""
    return f" (the folder says of itself that it is of {found!r:.40})"


def encode_in_fresh_process(
    folder: str | os.PathLike,
    notes: list[dict[str, Any]],
    python: str = sys.executable,
    loader: Loader = "transformers",
) -> np.ndarray:
    """Embeddings (N, D) float32 of `notes`, computed by a process that has the folder and libraries only.

    Args:
        folder: the checkpoint.
        notes: their images, if any, as the bytes of an image file.
        python: interpreter of the fresh process, for instance one with another release of transformers.
        loader: whether `AutoModel` or `SentenceTransformer` loads the folder.

    Raises:
        VerificationError: the process failed; the message holds its last words.
    """
    with tempfile.TemporaryDirectory(prefix="notellm2-verify-") as scratch:
        notes_file, embeddings_file = Path(scratch) / "notes.json", Path(scratch) / "embeddings.npy"
        notes_file.write_text(json.dumps(pack_notes(notes)), encoding="utf-8")
        script = Path(__file__).with_name("fresh_process.py")
        # Not resolved: the interpreter of a virtual environment is a link, and knows its packages by where it stands.
        files = [script, Path(folder).resolve(), notes_file, embeddings_file]
        command = [str(Path(python).absolute()), "-I", *map(str, files), loader]
        # A modules cache of its own: the process must copy the folder's code, not find an earlier copy.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch) / "modules")}
        finished = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
        if finished.returncode:
            raise VerificationError(f"{folder} failed in a fresh process ({loader}):\n{finished.stderr[-3000:]}")
        return np.load(embeddings_file)


def available_loaders(python: str = sys.executable) -> list[Loader]:
    """The libraries that can load an export with this interpreter: transformers, and sentence-transformers if it is
    installed there."""
    question = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sentence_transformers') is None)"
    asked = subprocess.run([str(Path(python).absolute()), "-I", "-c", question], capture_output=True)
    return ["transformers", "sentence-transformers"] if asked.returncode == 0 else ["transformers"]


def verify(
    folder: str | os.PathLike,
    python: str = sys.executable,
    allow_other_code: bool = False,
    checksum: str | None = None,
) -> float:
    """Compare the embeddings of this process, or the recorded ones of an export, with those of fresh processes.

    All compute in float32, whatever the weights are stored in.

    Args:
        folder: a checkpoint as `hub.compose` or training saves it, or an export.
        python: interpreter of the fresh process.
        allow_other_code: run the folder's code though it is not that of the installed package.
        checksum: of an export, the SHA-256 of its list of checksums, as its publisher announced it.

    Returns:
        The largest absolute difference, at most 1e-5.

    Raises:
        VerificationError: an export is not as it was written, the folder's code is another, it cannot be loaded, a
            fresh process failed, or the embeddings differ by more.
    """
    exported = is_export(folder)
    if exported:
        check_files(folder)
    if checksum is not None:
        found = sha256(Path(folder) / CHECKSUMS) if exported else "none, as it is no export"
        if found != checksum.lower():
            raise VerificationError(f"{folder}: the SHA-256 of {CHECKSUMS} is {found}, and not {checksum}.")
    if not allow_other_code:
        check_code(folder)
    try:
        model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise VerificationError(f"{folder} cannot be loaded: {error}") from error
    if not isinstance(model, NoteLLM2Model):
        raise VerificationError(f"{folder} holds a {type(model).__name__}, no NoteLLM-2 model.")
    if not exported:
        notes = sample_notes(with_images=model.config.has_vision)
        there = encode_in_fresh_process(folder, notes, python)
        return _difference(folder, np.asarray(model.encode(notes)), there, "in a fresh process")
    notes, expected = read_record(folder)
    here = np.asarray(model.encode(notes))
    differences = [_difference(folder, expected, here, "with the installed modeling_notellm2")]
    del model  # a fresh process loads it once more
    differences += [recorded_difference(folder, python, loader) for loader in available_loaders(python)]
    return max(differences)


def recorded_difference(folder: str | os.PathLike, python: str, loader: Loader) -> float:
    """The largest absolute difference, at most 1e-5, between an export's recorded embeddings and those of a fresh
    process.

    Args:
        folder: the export.
        python: interpreter of the fresh process.
        loader: what loads the folder there.

    Raises:
        VerificationError: the process failed, or the embeddings differ by more.
    """
    notes, expected = read_record(folder)
    there = encode_in_fresh_process(folder, notes, python, loader)
    return _difference(folder, expected, there, f"in a fresh process ({loader})")


def _difference(folder: str | os.PathLike, expected: np.ndarray, found: np.ndarray, where: str) -> float:
    if expected.shape != found.shape:
        raise VerificationError(f"{folder}: embeddings of shape {found.shape} {where}, expected {expected.shape}.")
    difference = float(np.abs(expected - found).max())
    if not difference <= TOLERANCE:  # also catches nan
        raise VerificationError(
            f"{folder}: embeddings differ by {difference:.2e} {where} (allowed: {TOLERANCE:.0e}). Save the "
            "folder again, so that its code and weights belong together."
        )
    return difference


@interruption_said("nothing was verified; give the same command to begin again.")
def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = CommandParser(
        prog="python -m hub.verify",
        description="Check that a checkpoint gives the same embeddings in a process without this repository, and that "
        "an export is as it was written.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", help="the checkpoint or export")
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter of the fresh process, to check other library versions"
    )
    parser.add_argument(
        "--allow-other-code",
        action="store_true",
        help="run the folder's code though it is not that of the installed package: read it first",
    )
    parser.add_argument("--sha256", metavar="HEX", help=f"of an export: of {CHECKSUMS}, as its publisher announced it")
    arguments = parser.parse_args(argv)
    if not Path(arguments.folder).is_dir():
        parser.error(f"folder={arguments.folder!r}: there is no such folder (a Hub id is not taken: download it first)")
    if not (Path(arguments.folder) / "config.json").is_file():
        parser.error(
            f"folder={arguments.folder!r} holds no config.json: give a folder that hub.compose, training or hub.export "
            "wrote"
        )
    try:
        difference = verify(arguments.folder, arguments.python, arguments.allow_other_code, arguments.sha256)
    except (VerificationError, OSError) as error:
        sys.exit(f"FAILED: {error}")
    sys.stdout.write(
        f"verified: {arguments.folder} gives the same embeddings in a process without this repository "
        f"(largest difference {difference:.1e})\n"
    )
    if is_export(arguments.folder):
        loaders = available_loaders(arguments.python)
        sys.stdout.write(
            f"Its files are as {CHECKSUMS} lists them (SHA-256 {sha256(Path(arguments.folder) / CHECKSUMS)}); loaded "
            f"with {' and '.join(loaders)}.\n"
        )
        if "sentence-transformers" not in loaders:
            sys.stdout.write("Whether sentence-transformers loads it was not tried: it is not installed there.\n")


if __name__ == "__main__":
    main()
