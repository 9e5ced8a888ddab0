"""Prove that a checkpoint stands on its own.

    python -m hub.verify DIR

Encodes a few notes here, then in a fresh process that cannot import this repository and loads the folder's own code
with `trust_remote_code=True`, and compares. A folder that passes works for people who have nothing but transformers.
"""

import argparse
import base64
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoModel

from modeling_notellm2 import NoteLLM2Model

TOLERANCE = 1e-5


class VerificationError(RuntimeError):
    """The folder does not load, or does not give the same embeddings, in a fresh process."""


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
    for width, height in ((64, 48), (40, 90), (32, 32)):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    return [{**notes[0], "image": pictures[0]}, {**notes[1], "image": pictures[1]}, notes[2], {"image": pictures[2]}]


def encode_in_fresh_process(
    folder: str | os.PathLike, notes: list[dict[str, Any]], python: str = sys.executable
) -> np.ndarray:
    """Embeddings (N, D) float32 of `notes`, computed by a process that has the folder and transformers only.

    Args:
        folder: the checkpoint.
        notes: their images, if any, as the bytes of an image file.
        python: interpreter of the fresh process, for instance one with another release of transformers.

    Raises:
        VerificationError: the process failed; the message holds its last words.
    """
    with tempfile.TemporaryDirectory(prefix="notellm2-verify-") as scratch:
        notes_file, embeddings_file = Path(scratch) / "notes.json", Path(scratch) / "embeddings.npy"
        packed = [
            {**note, "image": base64.b64encode(note["image"]).decode()} if "image" in note else note for note in notes
        ]
        notes_file.write_text(json.dumps(packed), encoding="utf-8")
        script = Path(__file__).with_name("fresh_process.py")
        # Not resolved: the interpreter of a virtual environment is a link, and knows its packages by where it stands.
        files = [script, Path(folder).resolve(), notes_file, embeddings_file]
        command = [str(Path(python).absolute()), "-I", *map(str, files)]
        # A modules cache of its own: the process must copy the folder's code, not find an earlier copy.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch) / "modules")}
        finished = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True)
        if finished.returncode:
            raise VerificationError(f"{folder} failed in a fresh process:\n{finished.stderr[-3000:]}")
        return np.load(embeddings_file)


def verify(folder: str | os.PathLike, python: str = sys.executable) -> float:
    """Compare the embeddings of this process with those of a fresh one.

    Args:
        folder: a checkpoint as `hub.compose` or training saves it.
        python: interpreter of the fresh process.

    Returns:
        The largest absolute difference, at most 1e-5.

    Raises:
        VerificationError: the fresh process failed, or the embeddings differ by more.
    """
    model = AutoModel.from_pretrained(folder)
    if not isinstance(model, NoteLLM2Model):
        raise VerificationError(f"{folder} holds a {type(model).__name__}, no NoteLLM-2 model.")
    notes = sample_notes(with_images=model.config.has_vision)
    here = model.encode(notes)
    there = encode_in_fresh_process(folder, notes, python)
    if here.shape != there.shape:
        raise VerificationError(f"{folder}: embeddings of shape {there.shape} in a fresh process, {here.shape} here.")
    difference = float(np.abs(here - there).max())
    if not difference <= TOLERANCE:  # also catches nan
        raise VerificationError(
            f"{folder}: embeddings differ by {difference:.2e} in a fresh process (allowed: {TOLERANCE:.0e}). Save the "
            "folder again, so that its code and weights belong together."
        )
    return difference


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    parser = argparse.ArgumentParser(
        prog="python -m hub.verify",
        description="Check that a checkpoint gives the same embeddings in a process without this repository.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", help="the checkpoint")
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter of the fresh process, to check other library versions"
    )
    arguments = parser.parse_args(argv)
    if not (Path(arguments.folder) / "config.json").is_file():
        parser.error(
            f"folder={arguments.folder!r} holds no config.json: give a folder that hub.compose or training wrote"
        )
    try:
        difference = verify(arguments.folder, arguments.python)
    except VerificationError as error:
        sys.exit(f"FAILED: {error}")
    sys.stdout.write(
        f"verified: {arguments.folder} gives the same embeddings in a process without this repository "
        f"(largest difference {difference:.1e})\n"
    )


if __name__ == "__main__":
    main()
