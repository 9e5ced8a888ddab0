"""Notes ─► embeddings through onnxruntime: the model's graphs in place of its weights.

    vision.onnx   pixel_values ─► visual_tokens, pooled_embeds                     tower and connector, once an image
    model.onnx    input_ids, attention_mask, has_image, these two ─► note_embeds   LLM, late fusion, head

`python -m hub.onnx` writes both, with the processor, the configuration and this code, into one folder. This is the only
file that imports onnxruntime.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import torch
from torch import Tensor

# Some only because transformers 5.6 to 5.9 takes out of a local folder what is named here, and no more.
from .configuration_notellm2 import NoteLLM2Config
from .connector_notellm2 import build_connector  # noqa: F401
from .fusion_notellm2 import LateFusion  # noqa: F401
from .image_notellm2 import ImageError  # noqa: F401
from .modeling_notellm2 import NoteEncoderMixin
from .packing_notellm2 import pack  # noqa: F401
from .processing_notellm2 import NoteLLM2Processor
from .vision_notellm2 import VisionTower  # noqa: F401

MODEL_FILE = "model.onnx"
VISION_FILE = "vision.onnx"


class OnnxNoteEncoder(NoteEncoderMixin):
    """Encodes notes as the exported model does, without loading it: no parameter, no backbone of transformers.

    Args:
        folder: what `python -m hub.onnx` wrote.
        providers: onnxruntime's execution providers, in order of preference.
        session_options: onnxruntime's settings, threads among them; by default its own.

    Attributes:
        config: the model's configuration.
        processor: turns notes into the graphs' inputs.

    Raises:
        FileNotFoundError: the folder holds no `model.onnx`.

    Example:
        >>> OnnxNoteEncoder("notes-onnx").encode([{"title": "Oak shelf", "image": "shelf.jpg"}])  # doctest: +SKIP
    """

    device = torch.device("cpu")

    def __init__(
        self,
        folder: str | os.PathLike,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        session_options: onnxruntime.SessionOptions | None = None,
    ) -> None:
        folder = Path(folder)
        if not (folder / MODEL_FILE).is_file():
            raise FileNotFoundError(
                f"folder={str(folder)!r} holds no {MODEL_FILE}: make one with `python -m hub.onnx CHECKPOINT FOLDER`."
            )
        self.config = NoteLLM2Config.from_pretrained(folder)
        self.processor = NoteLLM2Processor.from_pretrained(folder)

        def session(name: str) -> onnxruntime.InferenceSession:
            return onnxruntime.InferenceSession(folder / name, session_options, providers=list(providers))

        self._model = session(MODEL_FILE)
        self._vision = session(VISION_FILE) if self.config.has_vision else None

    def encode(
        self,
        notes: Iterable[Any],
        batch_size: int = 32,
        show_progress_bar: bool = False,
        truncate_dim: int | None = None,
    ) -> np.ndarray:
        """Notes ─► embeddings, in the notes' order: what `NoteLLM2Model.encode` gives.

        A graph with int8 weights rounds what a batch computes by the largest number in it, so that there, and only
        there, an embedding depends a little on its neighbours.

        Args:
            notes: mappings with `title`, `topics`, `content`, `image` (each optional), strings (a note's content) or
                PIL images; a list, a `datasets.Dataset`, any iterable.
            batch_size: notes a run of the graph.
            show_progress_bar: show one progress bar over all notes.
            truncate_dim: keep the first so many dimensions and normalise again.

        Returns:
            (N, D) float32, L2-normalised.

        Raises:
            NoteError: a note that cannot be read; names its index, the field and the remedy.
            NonFiniteError: an embedding is NaN or infinite; names its note.
            ValueError: `notes` is a single note; `batch_size` or `truncate_dim` out of range.
        """
        return self._encode_all(notes, batch_size, show_progress_bar, truncate_dim).numpy()

    def _embed_batch(self, batch: Mapping[str, Tensor]) -> Tensor:
        given = {name: value.numpy() for name, value in batch.items()}
        if self._vision is not None:
            text = ("input_ids", "attention_mask", "has_image")
            pixels = {name: value for name, value in given.items() if name not in text}
            given |= self._image_inputs(given["has_image"], pixels)
        wanted = {node.name: given[node.name] for node in self._model.get_inputs()}
        (note_embeds,) = self._model.run(["note_embeds"], wanted)
        return torch.from_numpy(note_embeds)

    def _image_inputs(self, has_image: np.ndarray, pixels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The vision graph's outputs, one row a note; zero, and never read, for a note without image."""
        assert self._vision is not None
        nodes = self._vision.get_outputs()
        inputs = {node.name: np.zeros((len(has_image), *node.shape[1:]), np.float32) for node in nodes}
        if pixels:
            for node, values in zip(nodes, self._vision.run(None, pixels), strict=True):
                inputs[node.name][has_image] = values
        return inputs


__all__ = ["MODEL_FILE", "VISION_FILE", "OnnxNoteEncoder"]
