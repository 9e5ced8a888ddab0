"""Multimodal LLMs as embedding models: what they compute, whatever else is in the batch and whatever a note says."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Blip2Config,
    Blip2Processor,
    LlavaConfig,
    T5Config,
)

from evaluation.multimodal_llm import MultimodalLLM, MultimodalLLMConfig, MultimodalLLMProcessor
from evaluation.run import evaluate_model
from modeling_notellm2 import NoteError
from modeling_notellm2.processing_notellm2 import prompt_template
from tests.backbones import MULTIMODAL_LLMS, VISION_TOKENS, random_picture, save

NAMES = sorted(MULTIMODAL_LLMS)
QWEN = [name for name in NAMES if name.startswith("qwen")]
TEXT_NOTE = {"title": "Spicy noodles", "content": "garlic, chili and a wok"}
Load = Callable[..., MultimodalLLM]
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def load(multimodal_llm_folder: Folder) -> Load:
    """A tiny model by its name, as it was released; one for all tests, which do not change it."""

    @functools.cache
    def from_backbone(name: str) -> MultimodalLLM:
        return MultimodalLLM.from_backbone(multimodal_llm_folder(name))

    return from_backbone


def picture_note(seed: int, size: tuple[int, int] = (40, 30)) -> dict[str, Any]:
    return {"title": f"Oak shelf {seed}", "topics": ["home"], "image": random_picture(seed, size=size)}


def released_state(name: str, folder: Path, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """(1, d) the last token's final state, of unit length, by the class that the model was released in."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    inputs = {key: value for key, value in inputs.items() if key != "has_image"}
    if name.startswith("qwen"):  # the positions are the released model's own
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    elif "pixel_values" not in inputs:  # BLIP-2 asks for an image; without one it is its LLM
        model = model.language_model
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    states = getattr(output, "language_model_outputs", output).hidden_states[-1]
    return functional.normalize(states[:, -1], dim=-1).numpy()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("note", [picture_note(1), TEXT_NOTE], ids=["image", "text"])
def test_embedding_is_the_last_state_of_the_released_model(
    name: str, note: dict[str, Any], load: Load, multimodal_llm_folder: Folder
):
    model = load(name)
    expected = released_state(name, multimodal_llm_folder(name), dict(model.processor([note])))
    np.testing.assert_allclose(model.encode([note]), expected, atol=1e-5)
    assert np.abs(model.encode([{**note, "title": "A red hat"}]) - expected).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_prompt_is_the_papers_with_the_models_own_placeholders(name: str, load: Load):
    model = load(name)
    note = picture_note(1, (64, 16))
    batch = model.processor([note])
    if name != "blip-2":  # 64 by 16 pixels are 8 by 2 patches of 8, of which four make a token
        assert batch["image_grid_thw"].tolist() == [[1, 2, 8]]
        picture = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    end = "'title': 'Oak shelf 1', 'topic': 'home', 'content': ''}. Compress this note into one word: \""
    start = "<|begin_of_text|>" if name == "blip-2" else ""
    if name == "blip-2":
        expected = f"{'<image>' * 3}{start}Note content: {{{end}"
    else:
        expected = f"Note content: {{'image': '{picture}', {end}"
    assert model.processor.tokenizer.decode(batch["input_ids"][0]) == expected
    text = model.processor.tokenizer.decode(model.processor([TEXT_NOTE])["input_ids"][0])
    assert text.startswith(start + "Note content: {'title': 'Spicy noodles'") and text.endswith('one word: "')


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("template", ["paper", "compact"])
def test_blip2_reads_what_its_own_processor_makes(language: str, template: str, multimodal_llm_folder: Folder):
    """The image first, before the begin-of-sequence token; the same pixels; positions that padding does not move."""
    folder = multimodal_llm_folder("blip-2")
    processor = MultimodalLLMProcessor.from_backbone(folder, language=language, template=template)
    note, text = picture_note(1), dict(picture_note(1), image=None)
    ours = processor([note])
    prompt = processor.tokenizer.decode(processor([text])["input_ids"][0], skip_special_tokens=True)
    own = Blip2Processor(processor.image_processor, AutoTokenizer.from_pretrained(folder), num_query_tokens=3)
    theirs = own(images=[note["image"]], text=[prompt], return_tensors="pt")
    start = [processor.visual_token_id] * 3 + [processor.tokenizer.bos_token_id]
    assert ours["input_ids"][0, :4].tolist() == theirs["input_ids"][0, :4].tolist() == start
    decode = processor.tokenizer.decode  # the same words; they are cut into tokens field by field here
    assert decode(ours["input_ids"][0]) == decode(theirs["input_ids"][0])
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"])
    inside = MultimodalLLMProcessor.from_backbone(folder, template=prompt_template("basic", language, template))
    assert decode(inside([note])["input_ids"][0]) != decode(theirs["input_ids"][0])  # control


def test_positions_of_opt_are_those_without_padding(load: Load):
    """What OPT's layers are given as positions, in a batch that is padded on the left and on the right."""
    model = load("blip-2")
    seen: list[torch.Tensor] = []
    positions = model.backbone.language_model.model.decoder.embed_positions
    hook = positions.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        for side in ("left", "right"):
            batch = model.processor([picture_note(1), TEXT_NOTE, {"title": "a"}], padding_side=side)
            mask = batch["attention_mask"].bool()
            assert not mask.all()
            model(**batch)
            table = positions.weight[positions.offset :]
            for row, own in zip(seen[-1], mask, strict=True):
                torch.testing.assert_close(row[own], table[: own.sum()])
                if side == "left" and not own.all():
                    assert (row[own] - table[: len(own)][own]).abs().max() > 1e-3  # control: places in the batch
    finally:
        hook.remove()


@pytest.mark.parametrize("name", NAMES)
def test_embedding_does_not_depend_on_batch_padding_or_neighbours(
    name: str, load: Load, notes: list[dict[str, Any]], multimodal_llm_folder: Folder
):
    model = load(name)
    notes = [*notes, picture_note(7, (120, 20)), picture_note(8, (17, 90))]
    alone = model.encode(notes, batch_size=1)
    order = [3, 0, 6, 1, 5, 2, 7, 4]
    left = MultimodalLLMProcessor.from_backbone(multimodal_llm_folder(name), padding_side="left")
    for processor in (model.processor, left):
        together = model.encode(notes, batch_size=len(notes), processor=processor)
        np.testing.assert_allclose(together, alone, atol=1e-5)
        shuffled = model.encode([notes[i] for i in order], batch_size=3, processor=processor)
        np.testing.assert_allclose(shuffled, alone[order], atol=1e-5)
        # Control: padding that is not masked shows.
        batch = dict(processor(notes))
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        with torch.no_grad(), pytest.raises(AssertionError):
            np.testing.assert_allclose(model(**batch).note_embeds.numpy(), alone, atol=1e-3)
    # Control: each note's picture is its own.
    swapped = [{**notes[0], "image": notes[7]["image"]}]
    assert np.abs(model.encode(swapped) - alone[:1]).max() > 1e-3


@pytest.mark.parametrize("name", QWEN)
def test_rows_and_columns_of_an_image_are_told_apart(name: str, load: Load):
    """Multimodal rotary positions: the same patches in another grid are another picture."""
    model = load(name)
    batch = dict(model.processor([picture_note(1, (64, 16))]))
    assert batch["image_grid_thw"].tolist() == [[1, 2, 8]]
    with torch.no_grad():
        embeds = model(**batch).note_embeds
        tall = model(**{**batch, "image_grid_thw": torch.tensor([[1, 8, 2]])}).note_embeds
    assert (embeds - tall).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_text_about_tokens_is_text(name: str, load: Load):
    model = load(name)
    said = " ".join([*VISION_TOKENS, "<IMG>", "<IMG_EMB>", "<|im_end|>", "<|endoftext|>"])
    control = set(model.processor.tokenizer.added_tokens_decoder)
    with_picture, plain, text = (
        model.processor([note])["input_ids"][0].tolist()
        for note in ({**picture_note(1), "content": said}, {**picture_note(1), "content": "plain"}, {"content": said})
    )
    assert [i for i in with_picture if i in control] == [i for i in plain if i in control]
    assert model.config.backbone_config.image_token_id not in text
    assert model.config.backbone_config.image_token_id in model.processor.tokenizer(said).input_ids  # control
    assert np.isfinite(model.encode([{**picture_note(1), "content": said}])).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("embedding_dim", [None, 5])
def test_saved_checkpoint_gives_the_same_embeddings(
    name: str, embedding_dim: int | None, notes: list[dict[str, Any]], multimodal_llm_folder: Folder, tmp_path: Path
):
    folder = multimodal_llm_folder(name)
    processor = MultimodalLLMProcessor.from_backbone(folder, max_content_tokens=9)
    settings = {"embedding_dim": embedding_dim, "initial_temperature": 0.2}
    model = MultimodalLLM.from_backbone(folder, processor=processor, **settings)
    model.add_lora(r=2, target_modules="all-linear", init_lora_weights=False)
    expected = model.encode(notes)
    loaded = AutoModel.from_pretrained(save(model, tmp_path / "saved"))
    assert isinstance(loaded, MultimodalLLM) and loaded.temperature == pytest.approx(0.2)
    np.testing.assert_allclose(loaded.encode(notes), expected, atol=1e-5)
    assert loaded.encode(notes[:1]).shape == (1, embedding_dim or 32)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert not list((tmp_path / "saved").glob("*.py"))  # its code needs the rest of the repository
    released = MultimodalLLM.from_backbone(folder, processor=processor)
    if embedding_dim is None:
        assert np.abs(released.encode(notes) - expected).max() > 1e-3  # control: the adapters tell
    loaded.merge_lora()
    np.testing.assert_allclose(loaded.encode(notes), expected, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_tower_is_frozen_and_connector_trains_unless_asked(name: str, load: Load, multimodal_llm_folder: Folder):
    model = load(name)
    tower = "backbone.vision_model." if name == "blip-2" else "backbone.visual."
    connector = model.parts["connector"]
    of_tower = {n for n, _ in model.named_parameters() if n.startswith(tower) and not n.startswith(connector)}
    fixed = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert of_tower and fixed == of_tower
    assert any(n.startswith(connector) for n, _ in model.named_parameters())
    thawed = MultimodalLLM.from_backbone(multimodal_llm_folder(name), freeze_vision_tower=False)
    assert all(p.requires_grad for p in thawed.parameters())
    assert thawed.train().backbone.get_submodule(tower.split(".")[1]).training
    model.train()
    assert not model.backbone.get_submodule(tower.split(".")[1]).training and model.language_model.training
    model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_every_part_has_a_gradient_also_where_no_note_has_an_image(name: str, multimodal_llm_folder: Folder):
    """Other processes of a run may have images, and wait for the gradients of what reads them."""
    model = MultimodalLLM.from_backbone(multimodal_llm_folder(name), embedding_dim=4, learnable_temperature=False)
    batch = dict(model.processor([TEXT_NOTE, "a blue hat"]))
    expected = model(**batch).note_embeds
    model.train()
    embeds = model(**batch).note_embeds
    torch.testing.assert_close(embeds, expected)
    embeds[:, 0].sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    connector = [p for n, p in trained.items() if n.startswith(model.parts["connector"])]
    assert all(not p.grad.any() for p in connector)
    model(**dict(model.processor([picture_note(1)]))).note_embeds[:, 0].sum().backward()
    assert any(p.grad.any() for p in connector)  # control: an image trains them


def test_larger_images_are_scaled_down_to_a_bound(multimodal_llm_folder: Folder, tmp_path: Path):
    folder = multimodal_llm_folder("qwen2_vl")
    note = picture_note(1, (200, 200))
    counts = []
    for bound in (None, 32 * 32):
        model = MultimodalLLM.from_backbone(folder, max_image_pixels=bound)
        loaded = AutoModel.from_pretrained(save(model, tmp_path / str(bound)))
        counts.append(int((loaded.processor([note])["input_ids"] == model.config.backbone_config.image_token_id).sum()))
    assert counts == [16, 4]  # of 16 by 16 pixels each
    with pytest.raises(ValueError, match="max_image_pixels=9: one visual token takes 256 pixels"):
        MultimodalLLM.from_backbone(folder, max_image_pixels=9)
    with pytest.raises(ValueError, match="max_image_pixels=900: all images of 'blip-2' have one size"):
        MultimodalLLM.from_backbone(multimodal_llm_folder("blip-2"), max_image_pixels=900)


def test_blip2_with_an_encoder_decoder_is_refused():
    config = Blip2Config(text_config=T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1), image_token_index=9)
    with pytest.raises(ValueError, match="is 't5', an encoder-decoder.*give one with OPT"):
        MultimodalLLMConfig(config)


def test_what_cannot_be_used_is_named(multimodal_llm_folder: Folder, llm_folder: Folder, tmp_path: Path):
    folder = multimodal_llm_folder("qwen2_vl")
    with pytest.raises(ValueError, match="'llava' is none of"):
        MultimodalLLMConfig(LlavaConfig())
    with pytest.raises(ValueError, match="'llama' is none of"):
        MultimodalLLM.from_backbone(llm_folder("llama"))
    with pytest.raises(ValueError, match="embeding_dim=4 is no setting of MultimodalLLMConfig"):
        MultimodalLLM.from_backbone(folder, embeding_dim=4)
    with pytest.raises(ValueError, match="embedding_dim=0 must lie between 1"):
        MultimodalLLM.from_backbone(folder, embedding_dim=0)
    for prompt in ("micl", "text"):
        with pytest.raises(ValueError, match=f"prompt='{prompt}'.*use prompt='basic'"):
            MultimodalLLMProcessor.from_backbone(folder, prompt=prompt)
    settings = json.loads((multimodal_llm_folder("blip-2") / "config.json").read_text())
    with pytest.raises(ValueError, match="image_token_id=None"):
        MultimodalLLMConfig({**settings, "image_token_index": None})


def test_incomplete_weights_are_refused(multimodal_llm_folder: Folder, tmp_path: Path):
    source = multimodal_llm_folder("qwen2_vl")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    lacking = next(name for name in weights if "merger.mlp" in name)
    del weights[lacking]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of its own configuration, 'visual.merger.mlp"):
        MultimodalLLM.from_backbone(tmp_path)


def test_images_and_placeholders_must_agree(load: Load):
    model = load("qwen2_vl")
    batch = dict(model.processor([picture_note(1), TEXT_NOTE]))
    with pytest.raises(ValueError, match="1 images were given for 2 notes"):
        model(**{**batch, "has_image": torch.tensor([True, True])})
    with pytest.raises(ValueError, match="note 0 of the batch has 4 placeholders, but its image gives 1 visual tokens"):
        short = {"pixel_values": batch["pixel_values"][:4], "image_grid_thw": torch.tensor([[1, 2, 2]])}
        model(**{**batch, **short})
    with pytest.raises(ValueError, match="takes pixels, not features"):
        model.encode([picture_note(1)], vision_features=lambda notes: {})
    with pytest.raises(NoteError, match=r"notes\[0\].image of 1000x4 pixels was refused by the image processor"):
        model.encode([picture_note(1, (1000, 4))])


@pytest.mark.parametrize("name", ["blip-2", "qwen2_5_vl"])
def test_is_evaluated_in_each_modality(name: str, load: Load, notes: list[dict[str, Any]]):
    related = [np.array([(i + 1) % len(notes)]) for i in range(len(notes))]
    rows = evaluate_model(load(name), notes, related, name=name, ks=(2,))
    assert [row.modality for row in rows] == ["both", "text", "image"]
    assert all(0 <= row.metrics["recall@2"] <= 1 for row in rows)


def test_configuration_survives_saving(multimodal_llm_folder: Folder, tmp_path: Path):
    backbone = AutoConfig.from_pretrained(multimodal_llm_folder("qwen3_vl"))
    config = MultimodalLLMConfig(backbone, embedding_dim=8, learnable_temperature=False)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MultimodalLLMConfig) and type(loaded.backbone_config) is type(backbone)
    assert loaded.embedding_dim == 8 and loaded.hidden_size == 32 and loaded.has_vision
    assert loaded.vision_config.to_dict() == backbone.vision_config.to_dict()
