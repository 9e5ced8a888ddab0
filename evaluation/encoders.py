"""Frozen encoders: what pretrained models make of a note's text and image, before anything is trained on notes.

Each is loaded once and called with notes. Each gives float32 vectors of unit length, so that two of them weigh the same
side by side, and a zero vector for a note that has nothing for it to read.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from evaluation.lexical import note_text
from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor
from modeling_notellm2.modeling_notellm2 import load_backbone
from modeling_notellm2.processing_notellm2 import Language, read_image
from modeling_notellm2.vision_notellm2 import VisionTower

Notes = Sequence[Mapping[str, Any]]

# Dual encoders that were trained on texts padded to their full length, without a mask (https://huggingface.co/docs/
# transformers/model_doc/siglip). What others make of a text does not depend on its padding.
_READS_PADDING = {"siglip", "siglip2"}


def default_device() -> str:
    """The GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class TextEncoder:
    """A sentence-transformers model on a note's text, `note_text`.

    Args:
        name_or_path: folder or Hub id of the model.
        batch_size: texts encoded at once.

    Raises:
        ImportError: if sentence-transformers is not installed.
    """

    def __init__(self, name_or_path: str, batch_size: int = 64) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(
                "The text encoder baseline needs sentence-transformers: "
                'pip install "notellm2[baselines]", or leave out --text-encoder.'
            ) from error
        self.batch_size = batch_size
        self.model = SentenceTransformer(name_or_path)

    def __call__(self, notes: Notes) -> np.ndarray:
        """(N, D) float32. Raises ValueError if no note has a text."""
        texts, positions = _texts(notes)
        return _unit_rows(
            self.model.encode(texts, batch_size=self.batch_size, show_progress_bar=True), positions, len(notes)
        )


class ImageEncoder:
    """A vision tower's pooled vector of a note's image: its class token, or what its pooler gives.

    Args:
        name_or_path: folder or Hub id of the tower, with its image processor; the vision half is taken of a dual
            encoder such as CLIP.
        batch_size: images encoded at once.
    """

    def __init__(self, name_or_path: str, batch_size: int = 32) -> None:
        whole = AutoConfig.from_pretrained(name_or_path)
        config = getattr(whole, "vision_config", whole)
        self.batch_size = batch_size
        self.processor = _image_processor(name_or_path)
        self.tower = VisionTower(config)
        load_backbone(self.tower.model, name_or_path, config, torch.float32)
        self.tower.to(default_device())

    def __call__(self, notes: Notes) -> np.ndarray:
        """(N, d) float32. Raises ValueError if no note has an image, NoteError where one cannot be read."""
        return _encode_images(
            notes, self.processor, lambda **inputs: self.tower(**inputs).pooled_embeds, self.batch_size
        )


class DualEncoder:
    """A model such as CLIP or SigLIP, which maps texts and images into one space.

    Args:
        name_or_path: folder or Hub id of the model, with its tokenizer and image processor.
        batch_size: texts or images encoded at once.

    Raises:
        ValueError: the model is no dual encoder.
    """

    def __init__(self, name_or_path: str, batch_size: int = 32) -> None:
        config = AutoConfig.from_pretrained(name_or_path)
        self.batch_size = batch_size
        self.model = AutoModel.from_config(config).eval()
        for name in ("get_text_features", "get_image_features", "logit_scale"):
            if not hasattr(self.model, name):
                raise ValueError(
                    f"clip={name_or_path!r} is a {config.model_type} without {name}: give a dual encoder, such as CLIP "
                    "or SigLIP."
                )
        load_backbone(self.model, name_or_path, config, torch.float32)
        self.model.to(default_device())
        self.tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        self.processor = _image_processor(name_or_path)
        self.max_length = min(self.tokenizer.model_max_length, config.text_config.max_position_embeddings)

    @torch.inference_mode()
    def texts(self, notes: Notes) -> np.ndarray:
        """(N, D) float32 of `note_text`, cut to what the model reads. Raises ValueError if no note has a text."""
        texts, positions = _texts(notes)
        batches = []
        for start in tqdm(range(0, len(texts), self.batch_size), desc="Texts", unit="batch"):
            inputs = self.tokenizer(
                texts[start : start + self.batch_size],
                padding="max_length",
                padding_side="right",
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.model.device)  # input_ids (B, T)
            if self.model.config.model_type in _READS_PADDING:
                inputs.pop("attention_mask", None)
            batches.append(self.model.get_text_features(**inputs).pooler_output.cpu().numpy())  # (B, D)
        return _unit_rows(np.concatenate(batches), positions, len(notes))

    def images(self, notes: Notes) -> np.ndarray:
        """(N, D) float32. Raises ValueError if no note has an image, NoteError where one cannot be read."""
        return _encode_images(notes, self.processor, self._encode, self.batch_size)

    def _encode(self, **inputs: Tensor) -> Tensor:
        return self.model.get_image_features(**inputs).pooler_output


class LLMEncoder:
    """The last hidden state of NoteLLM-2's text prompt ("Compress this note into one word") in an unchanged LLM.

    Args:
        name_or_path: folder or Hub id of a decoder LLM.
        language: of the prompt.
        batch_size: notes encoded at once.

    Raises:
        ValueError: see `NoteLLM2Model.from_backbones`.
    """

    def __init__(self, name_or_path: str, language: Language = "en", batch_size: int = 32) -> None:
        processor = NoteLLM2Processor.from_backbones(name_or_path, language=language)
        self.batch_size = batch_size
        model = NoteLLM2Model.from_backbones(name_or_path, None, processor=processor, embedding_dim=None)
        self.model: NoteLLM2Model = model.eval().to(default_device())

    def __call__(self, notes: Notes) -> np.ndarray:
        """(N, d_llm) float32. Raises ValueError if no note has a text."""
        _, positions = _texts(notes)
        states = self.model.encode(
            [notes[position] for position in positions], batch_size=self.batch_size, show_progress_bar=True
        )
        return _unit_rows(np.asarray(states), positions, len(notes))


def _texts(notes: Notes) -> tuple[list[str], list[int]]:
    """The texts of the notes that have one, and their positions."""
    texts = [note_text(note) for note in notes]
    positions = [position for position, text in enumerate(texts) if text]
    if not positions:
        raise ValueError(
            "No note has a text: check the table's columns title, topics and content, or leave the text baselines out."
        )
    return [texts[position] for position in positions], positions


def _image_processor(name_or_path: str) -> Any:
    # The PIL backend, as in NoteLLM-2's processor: features do not depend on whether torchvision is installed.
    return AutoImageProcessor.from_pretrained(name_or_path, backend="pil")


@torch.inference_mode()
def _encode_images(notes: Notes, processor: Any, encode: Callable[..., Tensor], batch_size: int) -> np.ndarray:
    positions = [position for position, note in enumerate(notes) if note.get("image") is not None]
    if not positions:
        raise ValueError("No note has an image: check the table's column image, or leave the image baselines out.")
    batches = []
    for start in tqdm(range(0, len(positions), batch_size), desc="Images", unit="batch"):
        picked = positions[start : start + batch_size]
        images = [read_image(notes[position]["image"], position) for position in picked]
        inputs = processor(images, return_tensors="pt").to(default_device())  # pixel_values (B, C, H, W)
        batches.append(encode(**inputs).float().cpu().numpy())  # (B, d)
    return _unit_rows(np.concatenate(batches), positions, len(notes))


def _unit_rows(encoded: np.ndarray, positions: Sequence[int], num_notes: int) -> np.ndarray:
    """The vectors of the notes at `positions`, brought to unit length, and zero vectors for the others."""
    features = np.zeros((num_notes, encoded.shape[1]), dtype=np.float32)
    features[positions] = normalized(encoded)
    return features


def normalized(vectors: np.ndarray) -> np.ndarray:
    """(N, D) vectors brought to unit length; a zero vector stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
