"""The other side of `hub.verify`: run by path, in a process of its own, with a checkpoint folder and transformers only.

    python -I fresh_process.py FOLDER NOTES.json EMBEDDINGS.npy

Not part of the package: it imports nothing of this repository, and refuses to let anything else import it.
"""

import base64
import importlib.abc
import json
import sys
from pathlib import Path

REPOSITORY = ("evaluation", "hub", "modeling_notellm2", "pairs", "train")


class HideRepository(importlib.abc.MetaPathFinder):
    """Hides the repository's packages, which an editable install puts on every process's path."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.partition(".")[0] in REPOSITORY:
            raise ModuleNotFoundError(f"{fullname} is hidden: a published folder must do without it", name=fullname)


def main(folder: str, notes_file: str, embeddings_file: str) -> None:
    """Load the folder with its own code, encode the notes, save the embeddings."""
    sys.meta_path.insert(0, HideRepository())
    import numpy as np
    from transformers import AutoModel

    notes = json.loads(Path(notes_file).read_text(encoding="utf-8"))
    for note in notes:
        if "image" in note:
            note["image"] = base64.b64decode(note["image"])
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    if not type(model).__module__.startswith("transformers_modules."):
        raise SystemExit(f"the model came from {type(model).__module__}, not from the folder's own code")
    np.save(embeddings_file, model.encode(notes))


if __name__ == "__main__":
    main(*sys.argv[1:])
