"""Models to measure, encode with and show: looked at first, then loaded, with words for what is not to be found."""

import os
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel

from evaluation.encoders import default_device
from evaluation.multimodal_llm import MultimodalLLMConfig  # registers it with AutoModel
from modeling_notellm2 import NoteLLM2Config, NoteLLM2PreTrainedModel  # registers them with AutoModel


def load_model(
    name_or_path: str | os.PathLike[str],
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    device: torch.device | str | None = None,
    **settings: Any,
) -> NoteLLM2PreTrainedModel:
    """Load a model from a folder or the Hub.

    Args:
        name_or_path: what `check_model` takes.
        dtype: of the weights; "auto": as they were saved.
        device: where to; `None`: onto the GPU if there is one.
        settings: what else `from_pretrained` takes, as `attn_implementation`.

    Raises: what `check_model` raises, and an OSError where its weights cannot be read.
    """
    check_model(name_or_path)
    try:
        model: NoteLLM2PreTrainedModel = AutoModel.from_pretrained(name_or_path, dtype=dtype, **settings)
    except SafetensorError as error:
        raise OSError(
            f"model={str(name_or_path)!r}: its weights are damaged ({error}): copy or download them again, or take "
            "another checkpoint."
        ) from error
    except OSError as error:
        raise OSError(f"model={str(name_or_path)!r}: {error}") from error
    return model.eval().to(default_device() if device is None else device)


def check_model(name_or_path: str | os.PathLike[str], is_released: bool = False) -> None:
    """Look at a checkpoint's configuration: an evaluation of many models must not end at the last one's name.

    Args:
        name_or_path: a folder, or ORGANISATION/NAME on the Hub, which is not asked for what can only be a folder.
        is_released: it is a multimodal LLM as its makers published it, in place of a model that this package trained.

    Raises:
        OSError: there is none.
        ValueError: it is no NoteLLM-2 and no fine-tuned multimodal LLM or, if it `is_released`, no multimodal LLM.
    """
    name = str(name_or_path)
    said = f"model={name!r}"
    is_there = Path(name).exists()
    unknown = f"{said}: no such folder here, and no such Hub id could be read"
    if not is_there and ("/" not in name or is_missing_folder(name)):
        raise FileNotFoundError(f"{unknown}.")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise OSError(
            f"{said}: no model is saved there (no config.json): training has not ended, or it is another folder."
        )
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise OSError(f"{said}: {error}" if is_there else f"{unknown} ({error}).") from error
    if is_released:
        try:
            MultimodalLLMConfig(config)
        except ValueError as error:
            raise ValueError(f"{said}: {error}") from error
    elif not isinstance(config, NoteLLM2Config | MultimodalLLMConfig):
        raise ValueError(
            f"{said} is a {config.model_type!r}, no NoteLLM-2: train it first. (evaluation.run measures it untrained, "
            "with --llm.)"
        )


def is_missing_folder(name_or_path: str | None) -> bool:
    """Whether this names a folder that is not there, rather than a repository of the Hub, which is `organisation/name`.

    >>> is_missing_folder("/no/such/folder"), is_missing_folder("org/model"), is_missing_folder(None)
    (True, False, False)
    """
    if name_or_path is None or Path(name_or_path).exists():
        return False
    path = Path(name_or_path)
    is_path = name_or_path.startswith(("/", ".", "~")) or len(path.parts) > 2
    return is_path or (len(path.parts) == 2 and path.parent.is_dir())
