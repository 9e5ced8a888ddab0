"""Every LLM with CLIP, every tower with Llama: composed, run, saved, loaded; n_v and n_m where they belong."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BertConfig
from transformers.utils import logging as transformers_logging

from hub.tiny_backbones import save_random_model
from modeling_notellm2 import NoteLLM2Config, NoteLLM2Model
from modeling_notellm2.processing_notellm2 import IMAGE_EMBEDDING_TOKEN
from tests.backbones import LLMS, QFORMER, TOWERS, random_picture, save

Notes = list[dict[str, Any]]
Compose = Callable[..., NoteLLM2Model]


@pytest.mark.parametrize(
    ("llm", "tower"), [(llm, "clip") for llm in LLMS] + [("llama", tower) for tower in TOWERS if tower != "clip"]
)
def test_compose_save_load(compose: Compose, notes: Notes, tmp_path: Path, llm: str, tower: str) -> None:
    model = compose(llm, tower)
    embeds = model.encode(notes)
    assert embeds.shape == (len(notes), 16) and embeds.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1.0, atol=1e-6)
    assert np.abs(embeds[:, None] - embeds[None]).max(-1)[~np.eye(len(notes), dtype=bool)].min() > 1e-3
    np.testing.assert_allclose(model.encode(notes, batch_size=1), embeds, atol=1e-5)
    loaded = AutoModel.from_pretrained(save(model, tmp_path))
    assert type(loaded) is NoteLLM2Model and not loaded.training
    np.testing.assert_allclose(loaded.encode(notes), embeds, atol=1e-5)
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("llm", LLMS)
def test_backbone_weights_arrive(compose: Compose, llm_folder: Callable, tower_folder: Callable, llm: str) -> None:
    model = compose(llm, moved=False)
    assert model.vision_tower is not None
    for part, folder in ((model.language_model, llm_folder(llm)), (model.vision_tower.model, tower_folder("clip"))):
        expected = AutoModel.from_pretrained(folder).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in part.state_dict().items())


@pytest.mark.parametrize("llm", LLMS)
def test_embeddings_do_not_depend_on_padding_order_or_neighbours(compose: Compose, notes: Notes, llm: str) -> None:
    model = compose(llm)
    right = forward(model, notes, "right")
    left = forward(model, notes, "left")
    torch.testing.assert_close(left.note_embeds, right.note_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(left.visual_embeds, right.visual_embeds, atol=1e-5, rtol=0)
    order = [3, 0, 5, 1, 4, 2]
    shuffled = forward(model, [notes[i] for i in order], "right")
    torch.testing.assert_close(shuffled.note_embeds, right.note_embeds[order], atol=1e-5, rtol=0)
    for index in range(len(notes)):
        neighbour = {"title": f"another {index}", "image": random_picture(90 + index)}
        pair = forward(model, [neighbour, notes[index]], "left")
        torch.testing.assert_close(pair.note_embeds[1], right.note_embeds[index], atol=1e-5, rtol=0)


def test_a_wrong_attention_mask_shows(shared_tiny_model: NoteLLM2Model, notes: Notes) -> None:
    batch = shared_tiny_model.processor(notes, padding_side="left")
    right = forward(shared_tiny_model, notes, "right").note_embeds
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    with torch.no_grad():
        wrong = shared_tiny_model(**batch).note_embeds
    assert (wrong - right).abs().max() > 1e-3


def test_positions_that_count_padding_show(compose: Compose, notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 learns absolute positions: without position_ids, left padding would shift them."""
    model = compose("gpt2")
    model.language_model.set_attn_implementation("sdpa")  # a packed batch has no padding to count
    right = forward(model, notes, "right").note_embeds
    plain = model.language_model.forward
    monkeypatch.setattr(model.language_model, "forward", lambda position_ids, **inputs: plain(**inputs))
    assert (forward(model, notes, "left").note_embeds - right).abs().max() > 1e-3


@pytest.mark.parametrize("llm", LLMS)
def test_the_text_never_changes_the_visual_embedding(compose: Compose, llm: str) -> None:
    model = compose(llm)
    picture = random_picture(7)
    texts = [{"title": "Oak"}, {"title": "Red shoes", "content": "a blue hat " * 40}, {"topics": "<IMG_EMB>"}, {}]
    same_image = forward(model, [{**text, "image": picture} for text in texts], "right")
    visual = same_image.visual_embeds
    torch.testing.assert_close(visual, visual[:1].expand_as(visual), atol=1e-5, rtol=0)
    assert (same_image.note_embeds - same_image.note_embeds[:1])[1:].abs().amax(-1).min() > 1e-3
    other_image = forward(model, [{**text, "image": random_picture(8)} for text in texts], "right")
    assert (other_image.visual_embeds - visual).abs().amax(-1).min() > 1e-3
    assert (other_image.note_embeds - same_image.note_embeds).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("llm", ["llama", "gemma3", "gpt2"])
def test_n_v_and_n_m_are_read_at_the_right_tokens(compose: Compose, notes: Notes, llm: str, side: str) -> None:
    """Recomputed from the LLM's hidden states, at positions found in the decoded tokens of each note."""
    model = compose(llm, late_fusion=None, embedding_dim=None)
    model.language_model.set_attn_implementation("sdpa")  # the places of a packed batch are others
    batch = model.processor(notes, padding_side=side)
    states: list[Tensor] = []
    handle = model.language_model.register_forward_hook(lambda _, __, output: states.append(output.last_hidden_state))
    with torch.no_grad():
        output = model(**batch)
    handle.remove()
    tokenizer = model.processor.tokenizer
    for row, note in enumerate(notes):
        real = batch["attention_mask"][row].nonzero().flatten().tolist()
        tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][row, real].tolist())
        assert tokenizer.decode(batch["input_ids"][row, real]).endswith('Compress this note into one word: "')
        last = real[-1]
        torch.testing.assert_close(output.note_embeds[row], unit(states[0][row, last]))
        if note.get("image") is None:
            assert IMAGE_EMBEDDING_TOKEN not in tokens and not output.visual_embeds[row].any()
            continue
        assert tokens.count(IMAGE_EMBEDDING_TOKEN) == 1  # also where the title says it
        end = tokens.index(IMAGE_EMBEDDING_TOKEN)
        before = tokenizer.decode(batch["input_ids"][row, real[:end]])
        assert before.endswith("'}. Compress this note into one word: \"") and "title" not in before
        torch.testing.assert_close(output.visual_embeds[row], unit(states[0][row, real[end - 1]]))
        assert (output.visual_embeds[row] - unit(states[0][row, real[end]])).abs().max() > 1e-4


def test_the_image_embedding_token_trains_and_the_embedding_matrix_does_not(
    tiny_model: NoteLLM2Model, notes: Notes
) -> None:
    tiny_model.language_model.requires_grad_(False)
    output = tiny_model.train()(**tiny_model.processor(notes))
    (output.note_embeds.sum() + output.visual_embeds[:, 0].sum()).backward()
    assert tiny_model.get_input_embeddings().weight.grad is None
    for name in ("image_embedding", "connector.query_tokens", "connector.projector.0.weight", "head.weight"):
        gradient = tiny_model.get_parameter(name).grad
        assert gradient is not None and gradient.abs().max() > 0, name


def test_full_tuning_gives_the_placeholders_rows_no_gradient(tiny_model: NoteLLM2Model, notes: Notes) -> None:
    """Row 0 stands in for `<IMG>`, `<IMG_EMB>` and padding; none of them may train it."""
    batch = tiny_model.processor(notes, padding_side="left")
    real = batch["attention_mask"].bool()
    assert 0 not in batch["input_ids"][real] and not real.all()
    tiny_model(**batch).note_embeds[:, 0].sum().backward()
    gradient = tiny_model.get_input_embeddings().weight.grad
    assert not gradient[0].any() and gradient.any()


def test_a_batch_without_images_beside_one_with(shared_tiny_model: NoteLLM2Model, notes: Notes) -> None:
    output = forward(shared_tiny_model, [notes[1]], "right")
    assert output.visual_embeds is None and torch.equal(output.fusion_weight, torch.zeros(1, 1))
    mixed = forward(shared_tiny_model, notes, "right")
    torch.testing.assert_close(mixed.note_embeds[1], output.note_embeds[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tower", ["clip", "siglip2"])
def test_the_towers_output_instead_of_pixels(compose: Compose, notes: Notes, tower: str) -> None:
    model = compose("llama", tower)
    batch = model.processor(notes)
    pixels = {name: value for name, value in batch.items() if name.startswith(("pixel", "spatial"))}
    encoded = [model.processor.encode_note(note) for note in notes]
    without_pixels = model.processor.collate(encoded, decode_images=False)
    assert without_pixels.keys() == batch.keys() - pixels.keys()
    with torch.no_grad():
        expected = model(**batch)
        features = model.get_image_features(**pixels)
        torch.testing.assert_close(model(**without_pixels, **features._asdict()), expected)
        with pytest.raises(ValueError, match="patch_embeds and pooled_embeds go together"):
            model(**without_pixels, patch_embeds=features.patch_embeds)


def test_ablations(compose: Compose, notes: Notes, tmp_path: Path) -> None:
    """Text-only, late fusion alone, basic, no fusion, no head: settings of one class, each a checkpoint."""
    text_only = compose(tower=None)
    late = compose(connector=None, processor={"prompt": "text"})
    basic = compose(processor={"prompt": "basic"})
    early = compose(late_fusion=None, processor={"prompt": "basic"})
    headless = compose(embedding_dim=None)
    pictures = [note for note in notes if note["note_id"] != "image"]
    for name, model in {"text": text_only, "late": late, "basic": basic, "early": early, "wide": headless}.items():
        embeds = model.encode(pictures)
        assert embeds.shape == (5, 32 if name == "wide" else 16)
        loaded = AutoModel.from_pretrained(save(model, tmp_path / name))
        np.testing.assert_allclose(loaded.encode(pictures), embeds, atol=1e-5)
        output = forward(model, pictures, "right")
        assert (output.visual_embeds is None) == (name != "wide")
        assert (output.fusion_weight is None) == (name in ("text", "early"))
        blank = [{**note, "image": None} for note in pictures]
        if name == "text":
            np.testing.assert_array_equal(model.encode(blank), embeds)
        else:
            assert np.abs(model.encode(blank) - embeds)[0].max() > 1e-3


def test_unknown_settings_are_refused(llm_folder: Callable) -> None:
    with pytest.raises(ValueError, match="late_fusoin='vector' is no setting of NoteLLM2Config"):
        NoteLLM2Model.from_backbones(llm_folder("llama"), late_fusoin="vector")


def test_from_backbones_without_a_connector_needs_no_processor(llm_folder: Callable, tower_folder: Callable) -> None:
    model = NoteLLM2Model.from_backbones(llm_folder("llama"), tower_folder("clip"), connector=None)
    assert model.processor.prompt == "text" and model.connector is None
    assert model.encode([{"title": "Oak", "image": random_picture(0)}]).shape == (1, 64)


def test_first_layers_of_an_llm(compose: Compose, llm_folder: Callable, notes: Notes, tmp_path: Path) -> None:
    """The kept layers are the first ones, and `layer_types` is cut with them."""
    for llm in ("gemma3", "gpt2"):
        model = NoteLLM2Model.from_backbones(llm_folder(llm), num_text_layers=1)
        whole = AutoModel.from_pretrained(llm_folder(llm)).state_dict()
        assert all(torch.equal(value, whole[name]) for name, value in model.language_model.state_dict().items())
        assert model.config.text_config.num_hidden_layers == 1
        loaded = AutoModel.from_pretrained(save(model, tmp_path / llm))
        np.testing.assert_allclose(loaded.encode(["oak"]), model.encode(["oak"]), atol=1e-6)
    for layers in (0, 3):
        with pytest.raises(ValueError, match=f"num_text_layers={layers} must lie between 1 and the LLM's 2"):
            NoteLLM2Model.from_backbones(llm_folder("llama"), num_text_layers=layers)


def test_a_backbone_that_lacks_weights_is_refused(llm_folder: Callable, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(llm_folder("llama"))
    kept = {name: value for name, value in model.state_dict().items() if "layers.1" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    NoteLLM2Model.from_backbones(llm_folder("llama")).processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \d+ weights of its own configuration, 'layers\.1\."):
        NoteLLM2Model.from_backbones(tmp_path)


def test_composing_and_loading_warn_of_nothing(
    llm_folder: Callable,
    tower_folder: Callable,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """A causal LM's head, CLIP's text half and an optional pooler are left over: that is as it should be."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    causal = tmp_path / "causal"
    language_model = AutoModelForCausalLM.from_pretrained(llm_folder("llama"))
    language_model.save_pretrained(causal)
    NoteLLM2Model.from_backbones(llm_folder("llama")).processor.tokenizer.save_pretrained(causal)
    tower = tower_folder("clip_dual")
    caplog.clear()
    recwarn.clear()
    verbosity = transformers_logging.get_verbosity()
    model = NoteLLM2Model.from_backbones(causal, tower, qformer_config=QFORMER)
    loaded = AutoModel.from_pretrained(save(model, tmp_path / "checkpoint"))
    assert loaded.encode([{"title": "oak", "image": random_picture(0)}]).shape == (1, 64)
    assert caplog.messages == [] and [str(w.message) for w in recwarn] == []
    assert transformers_logging.get_verbosity() == verbosity
    expected = language_model.model.state_dict()
    assert all(torch.equal(v, expected[name]) for name, v in model.language_model.state_dict().items())


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model: NoteLLM2Model, notes: Notes) -> None:
    batch = tiny_model.processor(notes)

    def gradients() -> dict[str, Tensor]:
        tiny_model.zero_grad()
        torch.manual_seed(0)
        output = tiny_model.train()(**batch)
        (output.note_embeds[:, 0].sum() + output.visual_embeds[:, 1].sum()).backward()
        return {name: p.grad.clone() for name, p in tiny_model.named_parameters() if p.grad is not None}

    for module in tiny_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = gradients()
    tiny_model.gradient_checkpointing_enable()
    assert tiny_model.is_gradient_checkpointing
    torch.testing.assert_close(gradients(), plain)


@pytest.mark.parametrize("llm", ["llama", "gemma3", "gpt2"])
def test_bfloat16(compose: Compose, notes: Notes, tmp_path: Path, llm: str) -> None:
    """Weights or autocast in bfloat16: embeddings leave in float32, normalised, and near the float32 ones."""
    model = compose(llm)
    expected = model.encode(notes)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.encode(notes)
    loaded = AutoModel.from_pretrained(save(model, tmp_path), dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    for embeds in (mixed, loaded.encode(notes)):
        assert embeds.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1.0, atol=1e-6)
        assert (embeds * expected).sum(1).min() > 0.98
    loaded.train()(**loaded.processor(notes)).note_embeds[:, 0].sum().backward()


def test_from_backbones_in_bfloat16(llm_folder: Callable, tower_folder: Callable, tmp_path: Path) -> None:
    folders = llm_folder("llama"), tower_folder("clip")
    model = NoteLLM2Model.from_backbones(*folders, dtype=torch.bfloat16, qformer_config=QFORMER)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    note = {"title": "oak", "image": random_picture(0)}
    loaded = AutoModel.from_pretrained(save(model, tmp_path))
    assert loaded.dtype == torch.bfloat16  # a checkpoint keeps its dtype
    np.testing.assert_array_equal(loaded.encode([note]), model.encode([note]))
    widened = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in widened.parameters()} == {torch.float32}
    assert (widened.encode([note]) * model.encode([note])).sum() > 0.99


def test_attention_implementations_agree(compose: Compose, tiny_checkpoint: Path, notes: Notes) -> None:
    eager = AutoModel.from_pretrained(tiny_checkpoint, attn_implementation="eager")
    sdpa = AutoModel.from_pretrained(tiny_checkpoint, attn_implementation="sdpa")
    assert eager.language_model.config._attn_implementation == "eager"
    np.testing.assert_allclose(eager.encode(notes), sdpa.encode(notes), atol=1e-5)


def test_the_temperature_lives_in_the_checkpoint(tiny_model: NoteLLM2Model, tmp_path: Path) -> None:
    assert tiny_model.temperature == pytest.approx(0.05)
    with torch.no_grad():
        tiny_model.logit_scale.fill_(3.5)
    loaded = AutoModel.from_pretrained(save(tiny_model, tmp_path))
    assert loaded.temperature == pytest.approx(np.exp(-3.5))
    with torch.no_grad():
        tiny_model.logit_scale.fill_(50.0)
    assert tiny_model.temperature == pytest.approx(0.01)
    text_config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9}
    fixed = NoteLLM2Model(NoteLLM2Config(text_config=text_config, learnable_temperature=False))
    assert not fixed.logit_scale.requires_grad


def forward(model: NoteLLM2Model, notes: Notes, side: str) -> Any:
    with torch.no_grad():
        return model(**model.processor(notes, padding_side=side))


def unit(state: Tensor) -> Tensor:
    return state / state.norm()


def test_an_encoder_is_refused_as_llm(llm_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """BERT's attention runs both ways: n_v would see the text."""
    config = BertConfig(
        vocab_size=600, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    save_random_model(config, tmp_path)
    AutoTokenizer.from_pretrained(llm_folder("llama")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lets a token see the ones after it"):
        NoteLLM2Model.from_backbones(tmp_path)


def test_folders_of_this_machine_stay_out_of_the_checkpoint(
    tiny_checkpoint: Path, llm_folder: Callable[[str], Path], tower_folder: Callable[[str], Path]
) -> None:
    text = "".join(path.read_text() for path in tiny_checkpoint.glob("*.json"))
    for folder in (llm_folder("llama"), tower_folder("clip"), tiny_checkpoint):
        assert str(folder.parent) not in text
