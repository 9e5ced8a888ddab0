"""The other side of `hub.verify`: run by path, in a process of its own, with a checkpoint folder and libraries only.

    python -I fresh_process.py FOLDER NOTES.json EMBEDDINGS.npy [transformers | sentence-transformers]

Not part of the package: it imports nothing of this repository, and refuses to let anything else import it.
"""

import base64
import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = ("evaluation", "hub", "modeling_notellm2", "pairs", "train")


class HideRepository(importlib.abc.MetaPathFinder):
    """Hides the repository's packages, which an editable install puts on every process's path."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.partition(".")[0] in REPOSITORY:
            raise ModuleNotFoundError(f"{fullname} is hidden: a published folder must do without it", name=fullname)


def refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook that ends the process when anything in it turns to the network: an exception could be taken for a
    bad connection, and the library go on without."""
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(arguments[1], tuple)):
        address = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
        sys.exit(f"{event} {address!r}: the network is off, and a published folder must do without it")


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
    sys.addaudithook(refuse_network)
    import numpy as np

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
