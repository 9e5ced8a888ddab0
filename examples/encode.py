"""Encode notes with a published model and compare them. Needs transformers, torch and pillow, not this repository.

python examples/encode.py MODEL shelf.jpg "Oak shelf for small things" "Spicy noodles"
"""

import argparse
import os
import sys
from typing import Any

from PIL import Image


def as_note(text: str) -> dict[str, Any]:
    """The path of a file is a note's picture; any other text is its content, unless it is named as pictures are."""
    if os.path.isfile(text):
        return {"image": text}
    if os.path.splitext(text)[1].lower() in Image.registered_extensions():
        sys.exit(f"error: there is no picture {text!r} here: give the path of one, or a text that does not end so.")
    return {"content": text}


def load_model(name: str) -> Any:
    """The model, with its own code."""
    from safetensors import SafetensorError
    from transformers import AutoModel  # seconds, which --help and a wrong option need not take

    try:
        return AutoModel.from_pretrained(name, trust_remote_code=True).eval()
    except (OSError, ValueError, SafetensorError) as error:  # the last where weights are damaged
        why = str(error).partition("\n")[0]
        sys.exit(f"error: {name!r} is no folder with a model, and no Hub id that can be read: {why}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print how similar notes are to one another.")
    parser.add_argument("model", help="folder or Hub id; its own code is run")
    parser.add_argument("notes", nargs="+", help="each the path of a picture, or a text")
    arguments = parser.parse_args(argv)

    # A note has any of title, topics, content and image; a plain string or a PIL image would do here, too.
    notes = [as_note(text) for text in arguments.notes]
    model = load_model(arguments.model)
    try:
        embeds = model.encode(notes)  # (N, D) float32 of unit length
    except ValueError as error:  # a note that cannot be read: the message names it, its field and the remedy
        sys.exit(f"error: {error}")
    similarity = embeds @ embeds.T  # so this is the cosine
    for text, row in zip(arguments.notes, similarity, strict=True):
        sys.stdout.write(" ".join(f"{value:6.3f}" for value in row) + f"  {text}\n")


if __name__ == "__main__":
    main()
