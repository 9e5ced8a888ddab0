"""A name for a model: embeddings of two models must not meet, whatever folders and releases they come from."""

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modeling_notellm2 import NoteLLM2PreTrainedModel

_SETTINGS_FILES = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
_PLACES = frozenset({"_name_or_path", "auto_map", "transformers_version"})
# Settings of NoteLLM2Config that its first release lacked, and what each one was before there was a name for it. A test
# fails while a setting is missing here.
_LATER_SETTINGS = {"standardize_states": False}


def model_fingerprint(model: NoteLLM2PreTrainedModel) -> str:
    """A name for all of a checkpoint that decides on an embedding: weights, configuration, prompt, tokenizer and image
    processor.

    It is of what is stored where the model was loaded from, whatever releases of transformers and of this package load
    it, and in whatever dtype. What was done since to the model or its processor in memory is not seen.

    Raises:
        ValueError: the model was not loaded from a folder or repository, or that lacks a file which a model has.
    """
    if not model.name_or_path:
        raise ValueError("this model was not loaded from a checkpoint, which its fingerprint is of: save and load it.")
    folder = Path(model.name_or_path)
    if not folder.is_dir():
        revision = getattr(model.config, "_commit_hash", None) or "main"
        patterns = [*_SETTINGS_FILES, "*.safetensors", SAFE_WEIGHTS_INDEX_NAME]
        folder = Path(snapshot_download(model.name_or_path, revision=revision, allow_patterns=patterns))
    config, processor, tokenizer, tokenizer_config = (_stored(folder, name) for name in _SETTINGS_FILES)
    for name, value in _LATER_SETTINGS.items():
        if config.get(name) == value:
            del config[name]
    settings = {
        "config": _without_places(config),
        "processor": _without_places(processor),
        "tokenizer": tokenizer,
        "tokens": _named_tokens(tokenizer_config),
    }
    content = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(safe_open(file, "pt")) for file in _weights_files(folder)]
        except FileNotFoundError as error:
            raise ValueError(
                f"{model.name_or_path} lacks weights ({error}): save or download the model anew."
            ) from error
        file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # no mapping
        for name in sorted(file_of):
            tensor = file_of[name].get_tensor(name)
            content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            content.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return content.hexdigest()


def _stored(folder: Path, name: str) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no {name}: save the model and its processor with save_pretrained.") from error
    return stored


def _weights_files(folder: Path) -> list[Path]:
    """The files that `from_pretrained` reads: one, or else those that an index names. Others may lie beside them."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).exists() or not index.exists():
        return [folder / SAFE_WEIGHTS_NAME]
    return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]


def _without_places(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what says where a model, a part of it or its code is, and what saved it."""
    return {
        name: _without_places(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in _PLACES
    }


def _named_tokens(tokenizer_config: dict[str, Any]) -> dict[str, Any]:
    """Which tokens begin a text, stand for an unknown one, and so on; a token may be stored with its properties, which
    `tokenizer.json` has too. The rest of this file says how a release of transformers saved the tokenizer."""
    return {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in tokenizer_config.items()
        if name.endswith("_token") and value is not None
    }


__all__ = ["model_fingerprint"]
