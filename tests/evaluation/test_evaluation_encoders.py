"""Frozen encoders give what the model's own forward gives, whatever the batch; nothing to read is a zero vector."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessor,
    PreTrainedConfig,
    Siglip2Config,
    Siglip2ImageProcessor,
    SiglipConfig,
    SiglipImageProcessor,
)

from evaluation.encoders import DualEncoder, ImageEncoder, LLMEncoder, TextEncoder, normalized
from evaluation.lexical import note_text
from hub.tiny_backbones import save_random_model
from modeling_notellm2 import NoteLLM2Model
from tests.backbones import (
    IMAGE_SIZE,
    NUM_PATCHES,
    PATCH_SIZE,
    byte_level_tokenizer,
    random_picture,
    sentencepiece_tokenizer,
)

LENGTH = 24
_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


def test_text_encoder_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"notellm2\[baselines\]"):
        TextEncoder("any")


def test_text_encoder_is_a_sentence_transformer(tmp_path: Path, llm_folder: Callable[[str], Path]) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    tokens = Transformer(str(llm_folder("llama")))
    tokens.tokenizer.pad_token = tokens.tokenizer.eos_token
    SentenceTransformer(modules=[tokens, Pooling(32)]).save(str(tmp_path))
    notes = [{"title": "Oak shelf"}, {"image": "x.jpg"}, {"title": "Noodles", "content": "chili and garlic " * 5}]
    encoder = TextEncoder(str(tmp_path), batch_size=2)
    embeds = encoder(notes)
    assert embeds.dtype == np.float32
    assert not embeds[1].any()
    by_hand = SentenceTransformer(str(tmp_path)).encode([note_text(notes[0]), note_text(notes[2])])
    np.testing.assert_allclose(embeds[[0, 2]], normalized(by_hand), atol=1e-5)
    with pytest.raises(ValueError, match="No note has a text"):
        encoder([{"image": "x.jpg"}])


def test_image_features_do_not_depend_on_the_batch_and_are_zero_without_image(
    tower_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    random_picture(3, "L").save(tmp_path / "grey.png")
    notes: list[dict[str, Any]] = [
        {"image": random_picture(0)},
        {"image": None},
        {"image": random_picture(1)},
        {"image": str(tmp_path / "grey.png")},
    ]
    encoder = ImageEncoder(str(tower_folder("vit")), batch_size=2)
    features = encoder(notes)
    assert features.shape == (4, 24)
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), [1, 0, 1, 1], atol=1e-5)
    encoder.batch_size = 1
    np.testing.assert_allclose(encoder(notes[2:]), features[2:], atol=1e-5)
    assert np.abs(features[2] - features[3]).max() > 1e-3

    with pytest.raises(ValueError, match="No note has an image"):
        encoder([{"title": "a"}])
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"notes\[1\].image .*broken.jpg"):
        encoder([notes[0], {"image": str(tmp_path / "broken.jpg")}])


def dual_config(name: str, vocab_size: int, end: int) -> tuple[PreTrainedConfig, Any]:
    tokens = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    text = {**_SIZES, **tokens, "vocab_size": vocab_size, "max_position_embeddings": LENGTH}
    vision = {**_SIZES, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    if name == "clip":
        config: PreTrainedConfig = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        return config, CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=_SIZE)
    if name == "siglip":
        return SiglipConfig(text_config=text, vision_config=vision), SiglipImageProcessor(size=_SIZE)
    vision = {**_SIZES, "patch_size": PATCH_SIZE, "num_patches": NUM_PATCHES}
    return (
        Siglip2Config(text_config=text, vision_config=vision),
        Siglip2ImageProcessor(patch_size=PATCH_SIZE, max_num_patches=NUM_PATCHES),
    )


def save_dual_encoder(name: str, folder: Path) -> str:
    """A tiny CLIP, SigLIP or SigLIP 2; as in the real ones, texts end in a token that is also their padding."""
    tokenizer = byte_level_tokenizer() if name == "clip" else sentencepiece_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
    )
    config, image_processor = dual_config(name, len(tokenizer), tokenizer.eos_token_id)
    save_random_model(config, folder)
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2"])
def test_dual_encoders_give_what_their_own_forward_gives(name: str, tmp_path: Path) -> None:
    folder = save_dual_encoder(name, tmp_path)
    notes: list[dict[str, Any]] = [
        {"title": "Oak shelf", "image": random_picture(0)},
        {"title": "words " * 50},
        {"image": random_picture(1, size=(60, 25))},
        {"title": "Red shoes", "topics": ["shoes"], "image": random_picture(2)},
    ]
    encoder = DualEncoder(folder, batch_size=2)
    texts, images = encoder.texts(notes), encoder.images(notes)
    assert texts.shape == images.shape == (4, encoder.model.config.projection_dim if name == "clip" else 16)
    assert texts.dtype == images.dtype == np.float32
    assert not texts[2].any() and not images[1].any()
    encoder.batch_size = 1
    np.testing.assert_allclose(encoder.texts(notes), texts, atol=1e-5)
    np.testing.assert_allclose(encoder.images(notes), images, atol=1e-5)

    model = AutoModel.from_pretrained(folder).eval()
    for position in (0, 3):
        ids = encoder.tokenizer(note_text(notes[position]))["input_ids"]
        assert len(ids) < LENGTH
        padded = ids if name == "clip" else ids + [encoder.tokenizer.pad_token_id] * (LENGTH - len(ids))
        pixels = encoder.processor([notes[position]["image"].convert("RGB")], return_tensors="pt")
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([padded]), **pixels)
            shorter = model(input_ids=torch.tensor([ids[:-1]]), **pixels)
        np.testing.assert_allclose(texts[position], output.text_embeds[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(images[position], output.image_embeds[0].numpy(), atol=1e-5)
        assert np.abs(texts[position] - shorter.text_embeds[0].numpy()).max() > 1e-3  # the control: another text


def test_what_is_no_dual_encoder_is_refused(llm_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"clip='.*' is a llama without get_text_features: give a dual encoder"):
        DualEncoder(str(llm_folder("llama")))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_llm_gives_the_last_state_of_the_prompt(language: Any, llm_folder: Callable[[str], Path]) -> None:
    notes: list[dict[str, Any]] = [
        {"title": "Oak shelf", "content": "sanded and oiled", "image": random_picture(0)},
        {"image": random_picture(1)},
        {"content": "笔记 <IMG> 内容"},
    ]
    encoder = LLMEncoder(str(llm_folder("qwen2")), language, batch_size=2)
    states = encoder(notes)
    assert states.shape == (3, 32)
    assert states.dtype == np.float32
    assert not states[1].any()
    llm = AutoModel.from_pretrained(llm_folder("qwen2")).eval()
    for position in (0, 2):
        ids = encoder.model.processor([{k: v for k, v in notes[position].items() if k != "image"}])["input_ids"]
        with torch.inference_mode():
            hidden = llm(input_ids=ids).last_hidden_state[0]  # (T, 32)
        np.testing.assert_allclose(states[position], normalized(hidden[-1:].numpy())[0], atol=1e-5)
        assert np.abs(states[position] - normalized(hidden[-2:-1].numpy())[0]).max() > 1e-3
    words = encoder.model.processor.tokenizer.decode(ids[0])
    assert ("Compress this note into one word" in words) == (language == "en")
    assert isinstance(encoder.model, NoteLLM2Model)
    with pytest.raises(ValueError, match="No note has a text"):
        encoder(notes[1:2])
