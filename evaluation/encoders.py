"""Frozen encoders: what pretrained models make of a note's text and image, before anything is trained on notes.

Each is loaded once, knows its `num_parameters`, and is called with notes. Each gives float32 vectors of unit length, so
that two of them weigh the same side by side, and a zero vector for a note that has nothing for it to read.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
)

from evaluation.lexical import note_text
from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor
from modeling_notellm2.modeling_notellm2 import load_backbone
from modeling_notellm2.processing_notellm2 import Language, has_image, read_image
from modeling_notellm2.vision_notellm2 import VisionTower

Notes = Sequence[Mapping[str, Any]]

# Dual encoders that were trained on texts padded to their full length, without a mask (https://huggingface.co/docs/
# transformers/model_doc/siglip). What others make of a text does not depend on its padding.
_READS_PADDING = {"siglip", "siglip2"}


def default_device() -> str:
    """The GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def count_parameters(model: nn.Module) -> int:
    """How many numbers a model holds that training could change; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_llm(name_or_path: str) -> None:
    """Look at a model's configuration: what its folder lacks would be said in words of tokenizers and weights.

    Args:
        name_or_path: folder or Hub id.

    Raises:
        OSError: there is none.
        ValueError: it is no decoder LLM, but an encoder, an encoder-decoder, a vision tower or a dual encoder.
    """
    config = AutoConfig.from_pretrained(name_or_path)
    kind = type(config.get_text_config(decoder=True))
    # Encoders such as BERT have a causal head, too, for those who made them decoders.
    is_decoder = kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING
    is_multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if config.is_encoder_decoder or not (is_decoder or is_multimodal):
        raise ValueError(
            f"llm={name_or_path!r} is a {config.model_type!r}, no decoder LLM: give one such as Qwen/Qwen2.5-0.5B; a "
            "vision tower belongs to vision, a sentence encoder to text_encoder, a dual encoder to clip."
        )


def check_tower(name_or_path: str) -> None:
    """Likewise for a vision tower. A dual encoder such as CLIP has one.

    Raises:
        OSError: there is none.
        ValueError: it has no vision tower, or none that loads without the rest of the model.
    """
    whole = AutoConfig.from_pretrained(name_or_path)
    config = getattr(whole, "vision_config", whole)
    if getattr(MODEL_MAPPING.get(type(config), None), "main_input_name", None) == "pixel_values":
        return
    lacking = "no vision tower" if config is whole else "whose tower does not load without the rest of it"
    raise ValueError(
        f"vision={name_or_path!r} is a {whole.model_type!r}, {lacking}: give a tower such as "
        "openai/clip-vit-base-patch16; an LLM belongs to llm, a sentence encoder to text_encoder."
    )


def check_clip(name_or_path: str) -> None:
    """Likewise for a dual encoder.

    Raises:
        OSError: there is none.
        ValueError: it is none.
    """
    config = AutoConfig.from_pretrained(name_or_path)
    with torch.device("meta"):  # as it would be, without its weights
        model = AutoModel.from_config(config)
    for name in ("get_text_features", "get_image_features", "logit_scale"):
        if not hasattr(model, name):
            raise ValueError(
                f"clip={name_or_path!r} is a {config.model_type!r} without {name}: give a dual encoder, such as CLIP "
                "or SigLIP; a tower belongs to vision, an LLM to llm."
            )


class TextEncoder:
    """A sentence-transformers model on a note's text, `note_text`.

    Args:
        name_or_path: folder or Hub id of the model.
        batch_size: texts encoded at once.
        dtype: of the weights.

    Raises:
        ImportError: if sentence-transformers is not installed.
    """

    def __init__(self, name_or_path: str, batch_size: int = 64, dtype: torch.dtype = torch.float32) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(
                "The text encoder baseline needs sentence-transformers: "
                'pip install "notellm2[baselines]", or leave out --text-encoder.'
            ) from error
        self.batch_size = batch_size
        self.model = SentenceTransformer(name_or_path, model_kwargs={"dtype": dtype})
        self.num_parameters = count_parameters(self.model)

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
        dtype: of the weights.

    Raises: what `check_tower` raises.
    """

    def __init__(self, name_or_path: str, batch_size: int = 32, dtype: torch.dtype = torch.float32) -> None:
        check_tower(name_or_path)
        whole = AutoConfig.from_pretrained(name_or_path)
        config = getattr(whole, "vision_config", whole)
        self.batch_size = batch_size
        self.processor = _image_processor(name_or_path)
        self.tower = VisionTower(config)
        load_backbone(self.tower.model, name_or_path, config, dtype)
        self.tower.to(default_device(), dtype)
        self.num_parameters = count_parameters(self.tower)

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
        dtype: of the weights.

    Raises: what `check_clip` raises.
    """

    def __init__(self, name_or_path: str, batch_size: int = 32, dtype: torch.dtype = torch.float32) -> None:
        check_clip(name_or_path)
        config = AutoConfig.from_pretrained(name_or_path)
        self.batch_size = batch_size
        self.model = AutoModel.from_config(config).eval()
        load_backbone(self.model, name_or_path, config, dtype)
        self.model.to(default_device(), dtype)
        self.num_parameters = count_parameters(self.model)
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
            batches.append(self.model.get_text_features(**inputs).pooler_output.float().cpu().numpy())  # (B, D)
        return _unit_rows(np.concatenate(batches), positions, len(notes))

    def images(self, notes: Notes) -> np.ndarray:
        """(N, D) float32. Raises ValueError if no note has an image, NoteError where one cannot be read."""
        return _encode_images(notes, self.processor, self._encode, self.batch_size)

    def _encode(self, **inputs: Tensor) -> Tensor:
        inputs = {name: x.to(self.model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        return self.model.get_image_features(**inputs).pooler_output


class LLMEncoder:
    """The last hidden state of NoteLLM-2's text prompt ("Compress this note into one word") in an unchanged LLM.

    Args:
        name_or_path: folder or Hub id of a decoder LLM.
        language: of the prompt.
        batch_size: notes encoded at once.
        dtype: of the weights.

    Raises:
        OSError: there is no such model.
        ValueError: see `check_llm` and `NoteLLM2Model.from_backbones`.
    """

    def __init__(
        self, name_or_path: str, language: Language = "en", batch_size: int = 32, dtype: torch.dtype = torch.float32
    ) -> None:
        check_llm(name_or_path)
        processor = NoteLLM2Processor.from_backbones(name_or_path, language=language)
        self.batch_size = batch_size
        model = NoteLLM2Model.from_backbones(name_or_path, None, processor=processor, embedding_dim=None, dtype=dtype)
        self.model: NoteLLM2Model = model.eval().to(default_device())
        self.num_parameters = count_parameters(self.model)

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
    positions = [position for position, note in enumerate(notes) if has_image(note)]
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
