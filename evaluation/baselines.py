"""What a user could do instead of training a NoteLLM-2: score notes by words, or by frozen encoders.

BM25 gives scores, the encoders give features. Features are compared by their cosine as they are, or go through a small
trained head (`evaluation.head`).
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor

from evaluation.metrics import ScoreFunction
from modeling_notellm2.modeling_notellm2 import load_backbone
from modeling_notellm2.processing_notellm2 import read_image
from modeling_notellm2.vision_notellm2 import VisionTower

# Kana and Chinese characters are words of their own, since no space separates them; elsewhere a word is a run of
# letters, digits and underscores in any script.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_CJK}]|[^\\W{_CJK}]+")


def default_device() -> str:
    """The GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def note_text(note: Mapping[str, Any]) -> str:
    """A note's title, topics and content, one a line; without the empty ones, so "" for a note without text.

    >>> note_text({"title": "Vase", "topics": ["glass", "blue"], "content": None})
    'Vase\\nglass, blue'
    """
    fields = []
    for name in ("title", "topics", "content"):
        value = note.get(name)
        text = value if isinstance(value, str) else ", ".join(value if value is not None else ())
        if text.strip():
            fields.append(text.strip())
    return "\n".join(fields)


def tokenize(text: str) -> list[str]:
    """Lower-cased words; a Chinese or Japanese character is a word.

    No stop words and no stemming: they are of one language, and BM25 gives a word that is everywhere little weight.

    >>> tokenize("Blue VASE, 20cm 花瓶")
    ['blue', 'vase', '20cm', '花', '瓶']
    """
    return _WORD.findall(text.lower())


def bm25_scores(texts: Sequence[str]) -> ScoreFunction:
    """BM25 between all texts, each in turn the query, a word as often as it occurs in it.

    Lucene's variant with k1 = 1.5 and b = 0.75, the defaults of bm25s. A text without words scores 0.

    Args:
        texts: N texts, as `note_text` makes them.

    Returns:
        A function for `retrieval_metrics`: (start, stop) to (stop - start, N) float32 scores.
    """
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # bm25s sets itself to DEBUG when imported
    words = [tokenize(text) for text in texts]
    index = bm25s.BM25()
    if any(words):
        index.index(words, show_progress=False)

    def score(start: int, stop: int) -> np.ndarray:
        scores = np.zeros((stop - start, len(words)), dtype=np.float32)
        for row, query in zip(scores, words[start:stop], strict=True):
            if query:
                row[:] = index.get_scores(query)
        return scores

    return score


def encode_texts(model_name_or_path: str, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
    """Embed texts with a frozen sentence-transformers encoder.

    Args:
        model_name_or_path: a folder or a Hub id.
        texts: N texts; an empty one gets a zero vector.
        batch_size: texts encoded at once.

    Returns:
        (N, D) float32, L2-normalised.

    Raises:
        ImportError: if sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            "The text encoder baseline needs sentence-transformers: "
            'pip install "notellm2[baselines]", or leave out --text-encoder.'
        ) from error
    encoder = SentenceTransformer(model_name_or_path)
    embeds = encoder.encode(
        list(texts), batch_size=batch_size, show_progress_bar=True, normalize_embeddings=True
    )  # (N, D)
    embeds[[not text.strip() for text in texts]] = 0
    return embeds.astype(np.float32)


@torch.inference_mode()
def pooled_image_features(
    vision_name_or_path: str | Path, notes: Sequence[Mapping[str, Any]], batch_size: int = 32
) -> np.ndarray:
    """The frozen tower's pooled vector of each note's image: its class token, or what its pooler gives.

    Args:
        vision_name_or_path: a tower's folder or Hub id, with its image processor.
        notes: N notes; `image` as the processor takes it; a note without one gets a zero vector.
        batch_size: images encoded at once.

    Returns:
        (N, d) float32, not normalised.

    Raises:
        ValueError: if no note has an image.
        NoteError: if one cannot be read; names the note's position.
    """
    positions = [position for position, note in enumerate(notes) if note.get("image") is not None]
    if not positions:
        raise ValueError("No note has an image: check the table's column image, or leave the image baselines out.")
    whole = AutoConfig.from_pretrained(vision_name_or_path)
    config = getattr(whole, "vision_config", whole)  # the vision half of a dual encoder such as CLIP
    # The PIL backend, as in NoteLLM-2's processor: features do not depend on whether torchvision is installed.
    processor = AutoImageProcessor.from_pretrained(vision_name_or_path, backend="pil")
    tower = VisionTower(config)
    load_backbone(tower.model, vision_name_or_path, config, torch.float32)
    tower.to(default_device())
    batches = []
    for start in tqdm(range(0, len(positions), batch_size), desc="Images", unit="batch"):
        picked = positions[start : start + batch_size]
        images = [read_image(notes[position]["image"], position) for position in picked]
        inputs = processor(images, return_tensors="pt").to(default_device())  # pixel_values (B, C, H, W)
        batches.append(tower(**inputs).pooled_embeds.float().cpu().numpy())  # (B, d)
    encoded = np.concatenate(batches)
    features = np.zeros((len(notes), encoded.shape[1]), dtype=np.float32)
    features[positions] = encoded
    return features
