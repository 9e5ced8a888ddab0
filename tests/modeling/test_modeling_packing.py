"""A packed batch gives what a padded one gives, and computes less."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, Gemma2Config
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_notellm2 import NoteLLM2Config, NoteLLM2Model
from modeling_notellm2 import modeling_notellm2 as modeling
from modeling_notellm2.packing_notellm2 import (
    PACKABLE_MODEL_TYPES,
    PACKED_ATTENTION,
    PackedBatch,
    pack,
    packed_attention,
)
from tests.backbones import LLMS, random_picture, save

Notes = list[dict[str, Any]]

IMAGE = 99


@pytest.fixture
def registry() -> Iterator[type[AttentionInterface]]:
    """Where attention functions are registered, which has the package's own again afterwards."""
    yield AttentionInterface
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)


def states(model: NoteLLM2Model, notes: Notes, padding_side: Any = "right") -> Tensor:
    batch = model.processor(notes, padding_side=padding_side)
    found = model.get_states(**batch)
    assert found.visual_states is not None
    return torch.cat([found.note_states, found.visual_states[found.has_visual]])


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize(("llm", "template"), [*((llm, "paper") for llm in LLMS), ("llama", "compact")])
def test_packed_is_padded(
    compose: Callable, notes: Notes, llm: str, template: str, padding_side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sliding windows shorter than a note (Mistral, Gemma 3, Starcoder 2) among them; weights far from zero, so that
    what a note sees matters."""
    model = compose(llm, processor={"template": template})
    is_packed = model.language_model.config._attn_implementation == PACKED_ATTENTION
    assert is_packed == (model.language_model.config.model_type in PACKABLE_MODEL_TYPES)
    with torch.no_grad():
        packed = states(model, notes, padding_side)
        model.language_model.set_attn_implementation("sdpa")
        padded = states(model, notes, padding_side)
        torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)
        if not is_packed:
            return
        # Control: a note that saw its neighbour's tokens would differ.
        model.language_model.set_attn_implementation(PACKED_ATTENTION)
        rows = pack(**_ids(model, notes, padding_side), image_token_id=model.config.image_token_id).rows
        wrong = rows.roll(1, 0)
        monkeypatch.setattr(modeling, "pack", lambda *arguments: pack(*arguments)._replace(rows=wrong))
        assert (states(model, notes, padding_side) - padded).abs().max() > 1e-3


def _ids(model: NoteLLM2Model, notes: Notes, padding_side: Any) -> dict[str, Tensor]:
    batch = model.processor(notes, padding_side=padding_side)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def test_gradients_are_those_of_padded_notes(compose: Callable, notes: Notes) -> None:
    found = []
    for attention in (PACKED_ATTENTION, "sdpa"):
        model = compose("qwen2").requires_grad_(True)
        model.language_model.set_attn_implementation(attention)
        weights = torch.randn(16, generator=torch.Generator().manual_seed(0))
        (model(**model.processor(notes)).note_embeds @ weights).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert max(float(gradient.abs().max()) for gradient in found[1].values()) > 1e-3
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("left", [False, True])
def test_a_plan_by_hand(left: bool) -> None:
    """Two notes with an image, which begin with 1, 2, and two without, which begin with 5; 0 is padding."""
    rows = [[1, 2, IMAGE, 3, 4], [1, 2, IMAGE, 3], [5, 6, 7], [5, 6]]
    input_ids, mask = torch.zeros(4, 6, dtype=torch.int64), torch.zeros(4, 6, dtype=torch.int64)
    for note, ids in enumerate(rows):
        span = slice(6 - len(ids), 6) if left else slice(len(ids))
        input_ids[note, span], mask[note, span] = torch.tensor(ids), 1
    plan = pack(input_ids, mask, IMAGE)
    # The images end the common beginning, and the last token is a note's own: 6 is computed twice.
    assert input_ids.flatten()[plan.tokens].tolist() == [1, 2, IMAGE, 3, 4, IMAGE, 3, 5, 6, 7, 6]
    assert plan.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 1]]
    parts = [plan.rows[note, : len(ids)].tolist() for note, ids in enumerate(rows)]
    assert parts == [[0, 1, 2, 3, 4], [0, 1, 5, 6], [7, 8, 9], [7, 10]]
    assert plan.rows.flatten()[plan.places].tolist() == list(range(11))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_a_mask_may_have_any_dtype(tiny_model: NoteLLM2Model, notes: Notes, dtype: torch.dtype) -> None:
    batch = tiny_model.processor(notes, padding_side="left")
    with torch.no_grad():
        expected = tiny_model(**batch).note_embeds
        batch["attention_mask"] = batch["attention_mask"].to(dtype)
        torch.testing.assert_close(tiny_model(**batch).note_embeds, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("llm", [llm for llm in LLMS if LLMS[llm][0].model_type in PACKABLE_MODEL_TYPES])
def test_an_attention_that_is_not_told_of_the_packing_gives_no_number(
    compose: Callable, notes: Notes, llm: str, registry: type[AttentionInterface]
) -> None:
    """In one layer: without a mask, notes would see one another, and nobody would notice."""
    model, calls = compose(llm), []

    def forgetful(*arguments: Any, packed: Any = None, **kwargs: Any) -> Any:
        calls.append(packed)
        return packed_attention(*arguments, packed=packed if len(calls) > 1 else None, **kwargs)

    registry.register(PACKED_ATTENTION, forgetful)
    with torch.no_grad():
        assert states(model, notes).isnan().all() and calls[0] is not None
        assert not states(model, notes).isnan().any()  # control: called with it, all layers


def test_each_batch_brings_its_own_code(
    tiny_model: NoteLLM2Model,
    notes: Notes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    registry: type[AttentionInterface],
) -> None:
    """A published folder of another release registers the same name; both models must go on."""
    folder, expected = save(tiny_model, tmp_path / "other"), tiny_model.encode(notes)
    code = folder / "packing_notellm2.py"
    code.write_text(re.sub(r"\brows\b", "grid", code.read_text()))
    monkeypatch.delitem(sys.modules, "transformers_modules", raising=False)  # that of another cache
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    other = get_class_from_dynamic_module("modeling_notellm2.NoteLLM2Model", str(folder)).from_pretrained(folder)
    assert type(other) is not type(tiny_model) and registry()[PACKED_ATTENTION] is not packed_attention
    for model in (other, tiny_model):
        np.testing.assert_allclose(model.encode(notes), expected, atol=1e-6)


def test_what_sdpa_would_leave_out_is_refused() -> None:
    """Soft caps and attention sinks: "sdpa" takes them as keywords, and does not look at them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    llm = Gemma2Config(**sizes, vocab_size=20, num_hidden_layers=1, head_dim=8)
    config = NoteLLM2Config(text_config=llm, image_token_id=18, image_embedding_token_id=19, embedding_dim=8)
    model = NoteLLM2Model(config).eval()
    assert llm.attn_logit_softcapping and model.language_model.config._attn_implementation != PACKED_ATTENTION
    ids = torch.randint(1, 18, (2, 7))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        model.language_model.set_attn_implementation(PACKED_ATTENTION)
        with pytest.raises(ValueError, match="Gemma2Attention attends with softcap, which packing does not know"):
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    plan, states = pack(ids, torch.ones_like(ids), IMAGE), torch.randn(1, 2, 14, 4)
    with pytest.raises(ValueError, match="attends with s_aux"):
        plan.attend(torch.nn.Identity(), states, states, states, s_aux=torch.ones(2))


def test_layers_share_the_mask_of_a_window(compose: Callable, notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once a batch, and only for a batch with a note that is longer."""
    plans: list[PackedBatch] = []

    def watched(*arguments: Any) -> PackedBatch:
        plans.append(pack(*arguments))
        return plans[-1]

    monkeypatch.setattr(modeling, "pack", watched)
    model = compose("mistral")
    with torch.no_grad():
        model(**model.processor(notes))
    longest = plans[0].rows.shape[1]
    (mask,) = plans[0].masks.values()
    expected = torch.ones(longest, longest, dtype=torch.bool).tril() & torch.ones(longest, longest).triu(-15).bool()
    assert list(plans[0].masks) == [16] and longest > 16 and torch.equal(mask, expected)
    short = pack(torch.arange(32).view(2, 16), torch.ones(2, 16, dtype=torch.int64), IMAGE)
    assert short._mask(16) is None and short._mask(None) is None and short._mask(15) is short._mask(15) is not None


def test_one_note_has_no_common_beginning() -> None:
    plan = pack(torch.tensor([[4, 5, 6]]), torch.ones(1, 3, dtype=torch.int64), IMAGE)
    assert plan.tokens.tolist() == plan.rows[0].tolist() == [0, 1, 2]


def test_the_llm_reads_no_padding(tiny_model: NoteLLM2Model, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    forward = tiny_model.language_model.forward

    def count(*arguments: Any, **kwargs: Any) -> Any:
        read.append(kwargs["inputs_embeds"].shape[:2].numel())
        return forward(*arguments, **kwargs)

    monkeypatch.setattr(tiny_model.language_model, "forward", count)
    notes = [{"title": "oak " * count, "image": random_picture(count)} for count in (1, 20)]
    lengths = [len(tiny_model.processor.encode_note(note).input_ids) for note in notes]
    tiny_model.encode(notes)
    assert max(lengths) < read[0] < sum(lengths)  # less than both, by the beginning of the prompt
    tiny_model.language_model.set_attn_implementation("sdpa")
    tiny_model.encode(notes)
    assert read[1] == 2 * max(lengths)


def test_a_note_that_repeats_is_encoded_once(
    tiny_model: NoteLLM2Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in another window, under another name, and with its image in another file."""
    encoded = []
    forward = tiny_model.forward

    def count(*arguments: Any, **kwargs: Any) -> Any:
        encoded.append(len(kwargs["input_ids"]))
        return forward(*arguments, **kwargs)

    def file(seed: int, name: str) -> str:
        random_picture(seed).save(tmp_path / name)
        return str(tmp_path / name)

    notes: Notes = [{"title": f"note {i}", "image": file(i, f"{i}.png") if i % 3 else None} for i in range(20)]
    notes += [{"title": "twice", "image": file(5, "a.png")}, {"title": "twice", "image": file(6, "b.png")}]
    expected = tiny_model.encode(notes)
    repeated = [{**note, "note_id": f"copy of {i}"} for i, note in enumerate(notes)]
    repeated[20]["image"] = file(5, "c.png")
    order = np.random.default_rng(0).permutation(2 * len(notes))
    both = [(notes + repeated)[i] for i in order]
    monkeypatch.setattr(tiny_model, "forward", count)
    embeds = tiny_model.encode(both, batch_size=2)
    assert sum(encoded) == len(notes)
    np.testing.assert_allclose(embeds, np.concatenate([expected, expected])[order], atol=1e-5)
    assert np.abs(expected[20] - expected[21]).max() > 1e-3  # the picture tells them apart
    encoded.clear()
    in_memory = [tiny_model.processor.encode_note({"title": "twice", "image": random_picture(i)}, 0) for i in (5, 6)]
    np.testing.assert_allclose(tiny_model.encode(in_memory), expected[20:], atol=1e-5)  # of one index, too
    assert sum(encoded) == 2


def test_notes_whose_features_are_given_are_told_apart(shared_tiny_model: NoteLLM2Model, notes: Notes) -> None:
    """Their images are not read, so that nothing says which of them repeat; an index may be anything."""
    processor = shared_tiny_model.processor
    encoded = [processor.encode_note(note, index=0) for note in notes]

    def features(some: Any) -> dict[str, Tensor]:
        pixels = processor.collate(some).get("pixel_values")
        if pixels is None:
            return {}
        found = shared_tiny_model.get_image_features(pixels)
        return {"patch_embeds": found.patch_embeds, "pooled_embeds": found.pooled_embeds}

    embeds = shared_tiny_model.encode(encoded, vision_features=features)
    np.testing.assert_allclose(embeds, shared_tiny_model.encode(notes), atol=1e-5)
