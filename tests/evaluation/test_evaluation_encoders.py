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
    BartConfig,
    BertConfig,
    CLIPConfig,
    CLIPImageProcessor,
    PreTrainedConfig,
    Siglip2Config,
    Siglip2ImageProcessor,
    SiglipConfig,
    SiglipImageProcessor,
    T5Config,
)

from evaluation.encoders import (
    DualEncoder,
    ImageEncoder,
    LLMEncoder,
    TextEncoder,
    check_clip,
    check_llm,
    check_tower,
    count_parameters,
    normalized,
)
from evaluation.lexical import note_text
from hub.tiny_backbones import save_random_model
from modeling_notellm2 import NoteLLM2Model
from tests.backbones import (
    IMAGE_SIZE,
    LLMS,
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


@pytest.mark.parametrize("name", ["vit", "clip", "clip_dual", "timm_cnn"])
def test_a_tower_is_no_llm(name: str, tower_folder: Callable[[str], Path]) -> None:
    folder = str(tower_folder(name))
    for check in (check_llm, LLMEncoder):
        with pytest.raises(
            ValueError, match=f"llm={folder!r} is a '.*', no decoder LLM: give one .* belongs to vision"
        ):
            check(folder)
    check_tower(folder)  # control; a dual encoder has a tower


def test_an_llm_is_no_tower(llm_folder: Callable[[str], Path], multimodal_llm_folder: Callable[[str], Path]) -> None:
    folder = str(llm_folder("llama"))
    for check in (check_tower, ImageEncoder):
        with pytest.raises(ValueError, match=f"vision={folder!r} is a 'llama', no vision tower: .* belongs to llm"):
            check(folder)
    for name in LLMS:
        check_llm(str(llm_folder(name)))  # control
    whole = str(multimodal_llm_folder("qwen2_vl"))
    check_llm(whole)
    with pytest.raises(ValueError, match="is a 'qwen2_vl', whose tower does not load without the rest of it"):
        check_tower(whole)


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16),
        BartConfig(vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1),
        T5Config(vocab_size=50, d_model=16, num_layers=1, num_heads=2),
    ],
    ids=lambda config: config.model_type,
)
def test_encoders_and_encoder_decoders_are_no_llms(config: PreTrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=f"is a {config.model_type!r}, no decoder LLM: .* a sentence encoder to text_encoder"
    ):
        check_llm(str(tmp_path))


def test_neither_is_a_dual_encoder(tower_folder: Callable[[str], Path], llm_folder: Callable[[str], Path]) -> None:
    for kind, folder in (("clip_vision_model", tower_folder("clip")), ("llama", llm_folder("llama"))):
        for check in (check_clip, DualEncoder):
            with pytest.raises(ValueError, match=f"clip={str(folder)!r} is a {kind!r} without get_text_features: give"):
                check(str(folder))
    check_clip(str(tower_folder("clip_dual")))  # control


def test_parameters_are_counted_once() -> None:
    layer = torch.nn.Linear(3, 2)
    assert count_parameters(torch.nn.ModuleList([layer, layer, torch.nn.BatchNorm1d(4)])) == 3 * 2 + 2 + 2 * 4


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
    with pytest.raises(ValueError, match=r"notes\[1\].image: .*broken.jpg"):
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encoders_in_half_precision(
    dtype: torch.dtype, llm_folder: Callable[[str], Path], tower_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    notes = [{"title": f"note {i} " * (1 + i % 3), "image": random_picture(i)} for i in range(4)]
    dual = save_dual_encoder("clip", tmp_path / "dual")
    pairs = {
        "llm": [LLMEncoder(str(llm_folder("llama")), dtype=kind) for kind in (torch.float32, dtype)],
        "image": [ImageEncoder(str(tower_folder("clip")), dtype=kind) for kind in (torch.float32, dtype)],
        "clip-text": [DualEncoder(dual, dtype=kind).texts for kind in (torch.float32, dtype)],
        "clip-image": [DualEncoder(dual, dtype=kind).images for kind in (torch.float32, dtype)],
    }
    for name, (full, half) in pairs.items():
        expected, found = full(notes), half(notes)  # type: ignore[operator]
        assert found.dtype == np.float32
        assert (expected * found).sum(axis=1).min() > 0.99, name
        assert abs(expected - found).max() > 1e-5, name  # it was in half precision
