"""What encoding is measured with where nothing real is at hand: models of random weights, and simulated notes."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm
from transformers import CLIPImageProcessor, CLIPVisionConfig, Qwen2Config

from hub.compose import CompositionArguments, compose, save_checkpoint
from hub.tiny_backbones import save_random_model, train_tokenizer
from pairs.tables import load_notes, write_table
from pairs.vocabulary import COMMON_WORDS, SUBJECTS

Note = dict[str, Any]


@dataclass(frozen=True)
class RandomModel:
    """A model to be initialised at random.

    Attributes:
        llm: settings of a `Qwen2Config`, `vocab_size` among them.
        tower: settings of a `CLIPVisionConfig`.
        composition: settings of `hub.compose`.
        tokenizer_size: tokens of the tokenizer, at most; the LLM's matrix may have more.
    """

    llm: dict[str, Any]
    tower: dict[str, Any]
    composition: dict[str, Any]
    tokenizer_size: int


def _vit(hidden_size: int, num_layers: int, num_heads: int, patch_size: int, image_size: int) -> dict[str, int]:
    sizes = {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "num_hidden_layers": num_layers}
    return {**sizes, "num_attention_heads": num_heads, "patch_size": patch_size, "image_size": image_size}


RANDOM_MODELS = {
    # Qwen2.5-0.5B, and the vision half of CLIP ViT-B/16
    "qwen-0.5b": RandomModel(
        {
            "vocab_size": 151_936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": True,
        },
        _vit(768, 12, 12, patch_size=16, image_size=224),
        {},
        tokenizer_size=16_384,
    ),
    "tiny": RandomModel(
        {
            "vocab_size": 4096,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        _vit(64, 2, 4, patch_size=8, image_size=48),
        {"qformer_layers": 1, "qformer_hidden_size": 64, "num_visual_tokens": 4},
        tokenizer_size=4096,
    ),
}


def save_random_checkpoint(sizes: RandomModel, notes: Sequence[Note], folder: Path) -> Path:
    """Compose a model of random weights, always the same, with a tokenizer trained on the notes. Returns its folder."""
    texts = [f"{note['title']} {note['topics']} {note['content']}" for note in notes]
    tokenizer = train_tokenizer(texts, sizes.tokenizer_size)
    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    side = sizes.tower["image_size"]
    with tempfile.TemporaryDirectory(prefix="notellm2-backbones-", dir=folder.parent) as backbones:
        llm, tower = f"{backbones}/llm", f"{backbones}/tower"
        save_random_model(Qwen2Config(**tokens, **sizes.llm), llm)
        tokenizer.save_pretrained(llm)
        save_random_model(CLIPVisionConfig(**sizes.tower), tower)
        crop = {"height": side, "width": side}
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size=crop).save_pretrained(tower)
        save_checkpoint(compose(CompositionArguments(llm=llm, vision=tower, **sizes.composition)), folder)
    return folder


def simulate_notes(
    number: int, folder: Path, picture_size: tuple[int, int] = (480, 640), seed: int = 0, repeats: float = 0.0
) -> Path:
    """Write notes with a long tail of lengths, four in five with a picture.

    The number of words of a title, of topics and of a content is log-normal: of contents, one in six or so is cut at
    the 128 tokens that a processor takes by default.

    Args:
        number: how many.
        folder: for `notes.jsonl` and its pictures.
        picture_size: width and height in pixels.
        seed: with all else the same, it gives the same notes.
        repeats: share of the notes that repeat another one.

    Returns:
        The path of the table.

    Raises:
        ValueError: `repeats` is no share, or would leave no note to repeat.
    """
    repeated = round(repeats * number)
    if not 0 <= repeated < number:
        raise ValueError(f"repeats={repeats:g} of {number} notes: give a share from 0 to less than 1.")
    draw = np.random.default_rng(seed)
    words = sorted({*COMMON_WORDS, *(word for subject in SUBJECTS.values() for word in subject)})
    (folder / "images").mkdir(parents=True)

    def text(median_words: float, spread: float) -> str:
        return " ".join(draw.choice(words, round(draw.lognormal(np.log(median_words), spread))))

    distinct: list[Note] = []
    for position in tqdm(range(number - repeated), desc="simulating notes", unit="note"):
        note: Note = {"title": text(6, 0.5), "topics": text(3, 0.6), "content": text(40, 0.9), "image": None}
        if draw.random() < 0.8:
            note["image"] = str(folder / "images" / f"{position:06}.jpg")
            draw_photograph(picture_size, draw).save(note["image"], quality=85)
        distinct.append(note)
    notes = [*distinct, *(distinct[draw.integers(len(distinct))] for _ in range(repeated))]
    rows = [{"note_id": f"n{row:06}", **notes[position]} for row, position in enumerate(draw.permutation(number))]
    write_table(Dataset.from_list(rows), folder / "notes.jsonl")
    return folder / "notes.jsonl"


def draw_photograph(size: tuple[int, int], draw: np.random.Generator) -> Image.Image:
    """An RGB picture of smooth large forms and finer ones over them, which as a JPEG is as large as a photograph."""

    def forms(side: int) -> Image.Image:
        colours = draw.integers(0, 256, (max(2, size[1] // side), max(2, size[0] // side), 3), dtype=np.uint8)
        return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)

    return Image.blend(forms(80), forms(8), 0.25)


def read_notes(path: str, number: int | None) -> list[Note]:
    """The first so many notes of a table; None: all of them.

    Raises:
        ValueError: the table has fewer.
    """
    notes = load_notes(path)
    if number is not None and number > len(notes):
        raise ValueError(f"num_notes={number}, but {path} has {len(notes)} notes: give no more than that.")
    return [notes[row] for row in range(number or len(notes))]


def vary(notes: Sequence[Note], number: int) -> Iterator[Note]:
    """So many notes, no two of them alike: the given ones in turns, each with a number before its title."""
    for position in range(number):
        note = notes[position % len(notes)]
        yield {**note, "title": f"{position} {note['title']}"}
