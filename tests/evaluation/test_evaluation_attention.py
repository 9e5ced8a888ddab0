"""Attention and saliency against a Llama computed by hand, and what must not change them: padding, batches, LoRA."""

import copy
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from evaluation.attention import SPANS, AttentionCurves, PositionCurves, attention_curves, plot_attention
from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor
from tests.backbones import random_picture

# Short prompts, so that every flow can be changed a little in turn.
TEMPLATES = {"micl": "a <IMG>b<IMG_EMB>c{title} d{content} e", "basic": "a <IMG>b{title} d{content} e"}


@pytest.fixture
def pair_notes() -> list[dict[str, Any]]:
    """Eight notes of unequal length; 2i and 2i + 1 are related."""
    words = ["oak", "red shoes", "noodles", "a blue hat", "garden", "sanded, oiled and hung", "wood", "home"]
    return [
        {"title": word, "content": f"{word} {i} " * (1 + i % 3), "image": random_picture(i)}
        for i, word in enumerate(words)
    ]


PAIRED = [np.array([i ^ 1]) for i in range(8)]


def measure(model: NoteLLM2Model, notes: Sequence[Any], related: Sequence[Any] = PAIRED, **options: Any) -> Any:
    return attention_curves(model, notes, related, show_progress_bar=False, **options)


def positions_of(curves: AttentionCurves) -> list[PositionCurves]:
    return [curves.note] if curves.visual is None else [curves.note, curves.visual]


def differ(one: AttentionCurves, other: AttentionCurves, what: str) -> float:
    """The largest difference of the shares or of the saliency, relative to the largest value."""
    pairs = zip(positions_of(one), positions_of(other), strict=True)
    return max(float(np.abs(getattr(a, what) - getattr(b, what)).max() / getattr(a, what).max()) for a, b in pairs)


# By hand: a Llama of explicit matrices, one note at a time, in float64.


def llama_by_hand(llm: Any, states: Tensor, factors: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(T, d) embeddings ─► (K, T, d) states for K ways to change the attention, and layers of (K, H, T, T) attention.

    Args:
        factors: (K, L, T, T), what each layer's attention is multiplied with, in all heads.
    """
    config = llm.config
    heads, shared, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    length = len(states)
    assert heads == 2 * shared  # two heads read the same keys and values

    def norm(weight: Tensor, values: Tensor) -> Tensor:
        return weight * values / (values.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def rotate(values: Tensor) -> Tensor:  # (…, T, size)
        half = size // 2
        theta = config.rope_parameters["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(length, dtype=torch.float64).unsqueeze(1) * theta
        first, second = values[..., :half], values[..., half:]
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
        )

    states = states.expand(len(factors), *states.shape)
    future = torch.ones(length, length).triu(1).bool()
    attentions = []
    for number, layer in enumerate(llm.layers):
        attention, normed = layer.self_attn, norm(layer.input_layernorm.weight, states)
        query, key, value = (
            (normed @ projection.weight.T).unflatten(-1, (-1, size)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = rotate(query), rotate(key).repeat_interleave(2, dim=1)
        scores = (query @ key.transpose(2, 3) / math.sqrt(size)).masked_fill(future, -math.inf)
        weights = scores.softmax(-1) * factors[:, number].unsqueeze(1)
        attentions.append(weights)
        mixed = (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2).flatten(2)
        states = states + mixed @ attention.o_proj.weight.T
        normed = norm(layer.post_attention_layernorm.weight, states)
        gate = functional.silu(normed @ layer.mlp.gate_proj.weight.T)
        states = states + (gate * (normed @ layer.mlp.up_proj.weight.T)) @ layer.mlp.down_proj.weight.T
    return norm(llm.norm.weight, states), attentions


@torch.no_grad()
def curves_by_hand(model: NoteLLM2Model, notes: Sequence[Any]) -> list[list[np.ndarray]]:
    """Share and saliency of each position, for one batch of notes whose texts are digits; 2i and 2i + 1 are a pair.

    A factor 1 + ε on one entry (i, j) of all heads changes the loss by ε · Σ_heads A ⊙ ∂L/∂A: no gradient is needed.
    """
    processor, step = model.processor, 1e-4
    double = copy.deepcopy(model).double()
    prompts, embeds, reads, pooled = [], [], [], []
    for note in notes:
        batch = processor([note])
        ids = batch["input_ids"][0]
        features = double.get_image_features(batch["pixel_values"].double())
        table = double.get_input_embeddings().weight
        is_image, is_end = ids == processor.image_token_id, ids == processor.image_embedding_token_id
        rows = table[ids.masked_fill(is_image | is_end, 0)].clone()
        rows[is_image] = double.connector(features)[0]
        rows[is_end] = double.image_embedding
        prompts.append(ids)
        embeds.append(rows)
        pooled.append(features.pooled_embeds)
        reads.append([len(ids) - 1] + ([int(is_end.nonzero()) - 1] if is_end.any() else []))

    def embed(number: int, factors: Tensor) -> Tensor:  # (K, D)
        states, _ = llama_by_hand(double.language_model, embeds[number], factors)
        result = states[:, reads[number][0]]
        if double.late_fusion is not None:
            visual = double.late_fusion.project(pooled[number])
            weight = double.late_fusion.weight(visual.expand(len(states), -1), states[:, reads[number][-1]])
            result = double.late_fusion.fuse(weight, visual, result)
        return functional.normalize(double.head(result), dim=-1)

    layers = len(double.language_model.layers)
    unchanged = [torch.ones(1, layers, len(ids), len(ids), dtype=torch.float64) for ids in prompts]
    fixed = torch.cat([embed(number, factors) for number, factors in enumerate(unchanged)])
    scale = math.exp(float(double.logit_scale))

    def loss(number: int, changed: Tensor) -> Tensor:  # (K, D) embeddings of one note ─► (K,) losses
        values = fixed.expand(len(changed), *fixed.shape).clone()
        values[:, number] = changed
        logits = (scale * values @ values.transpose(1, 2)).masked_fill(torch.eye(len(fixed)).bool(), -math.inf)
        return -logits.log_softmax(-1)[:, range(len(fixed)), [i ^ 1 for i in range(len(fixed))]].mean(-1)

    share = np.zeros((len(reads[0]), layers, 3))
    saliency = np.zeros((len(reads[0]), layers, 3))
    for number, ids in enumerate(prompts):
        flows = [(layer, i, j) for layer in range(layers) for i in range(len(ids)) for j in range(i)]
        factors = unchanged[number].repeat(2 * len(flows), 1, 1, 1)
        for row, (layer, i, j) in enumerate(flows):
            factors[row, layer, i, j] += step
            factors[len(flows) + row, layer, i, j] -= step
        losses = loss(number, embed(number, factors))
        slopes = ((losses[: len(flows)] - losses[len(flows) :]) / (2 * step)).abs().tolist()
        importance = dict(zip(flows, slopes, strict=True))
        attentions = llama_by_hand(double.language_model, embeds[number], unchanged[number])[1]

        tokens = processor.tokenizer.convert_ids_to_tokens(ids.tolist())
        kinds = [0 if token == "<IMG>" else 1 if token.isdigit() else 2 for token in tokens]  # texts are digits here
        for place, p in enumerate(reads[number]):
            for layer in range(layers):
                for j in range(p + 1):
                    share[place, layer, kinds[j]] += float(attentions[layer][0, :, p, j].mean()) / len(prompts)
                sums: list[list[float]] = [[], [], []]
                for i in range(p + 1):
                    for j in range(i):
                        sums[kinds[j] if i == p else 2].append(importance[layer, i, j])
                for kind in range(3):
                    if sums[kind]:
                        saliency[place, layer, kind] += sum(sums[kind]) / len(sums[kind]) / len(prompts)
    return [[share[place], saliency[place]] for place in range(len(reads[0]))]


@pytest.mark.parametrize(("prompt", "late_fusion"), [("micl", "scalar"), ("basic", None), ("basic", "vector")])
def test_equals_a_llama_computed_by_hand(compose: Callable[..., NoteLLM2Model], prompt: str, late_fusion: Any) -> None:
    model = compose(processor={"prompt": prompt, "template": TEMPLATES[prompt]}, late_fusion=late_fusion)
    notes = [
        {"title": title, "content": content, "image": random_picture(seed)}
        for seed, (title, content) in enumerate([("12", "7"), ("345", ""), ("6", "7812"), ("90", "41")])
    ]
    curves = measure(model, notes, PAIRED[:4], batch_pairs=2)
    assert curves.num_notes == 4
    expected = curves_by_hand(model, notes)
    assert len(positions_of(curves)) == len(expected) == (2 if prompt == "micl" else 1)
    for curve, (share, saliency) in zip(positions_of(curves), expected, strict=True):
        np.testing.assert_allclose(curve.share, share, atol=1e-5)
        np.testing.assert_allclose(curve.saliency, saliency, rtol=1e-4, atol=1e-5 * saliency.max())
        np.testing.assert_allclose(curve.share.sum(1), 1.0, atol=1e-6)
    # Controls: the layers differ, and so do the spans.
    share, saliency = expected[0]
    assert np.abs(share[0] - share[1]).max() > 1e-3
    assert np.abs(saliency[0] - saliency[1]).max() > 1e-2 * saliency.max()
    assert np.ptp(saliency, axis=1).min() > 1e-2 * saliency.max()


@pytest.mark.parametrize("llm", ["llama", "qwen2", "gemma3", "gpt2"])
@pytest.mark.parametrize("prompt", ["micl", "basic"])
def test_padding_does_not_matter(
    compose: Callable[..., NoteLLM2Model], pair_notes: list[dict[str, Any]], llm: str, prompt: str
) -> None:
    model = compose(llm, processor={"prompt": prompt})
    right = measure(model, pair_notes)
    model.processor.padding_side = "left"
    left = measure(model, pair_notes)
    assert len(right.note.share) == 2  # layers
    assert (right.visual is not None) == (prompt == "micl")
    for what in ("share", "saliency"):
        assert differ(left, right, what) < 1e-4
        assert differ(measure(model, [{**note, "title": "x"} for note in pair_notes]), right, what) > 1e-3
    for position in positions_of(right):
        np.testing.assert_allclose(position.share.sum(1), 1.0, atol=1e-5)
    if right.visual is not None:  # what n_v must not see
        assert not right.visual.share[:, SPANS.index("text")].any()
        assert not right.visual.saliency[:, SPANS.index("text")].any()


def test_a_sliding_window_shorter_than_the_prompt_hides_the_image(
    compose: Callable[..., NoteLLM2Model], pair_notes: list[dict[str, Any]]
) -> None:
    curves = measure(compose("gemma3"), pair_notes).note
    image = SPANS.index("image")
    assert curves.share[0, image] == 0.0 == curves.saliency[0, image]
    assert curves.share[1, image] > 0.0 < curves.saliency[1, image]


def test_batches(shared_tiny_model: NoteLLM2Model, pair_notes: list[dict[str, Any]]) -> None:
    """Shares are each note's own. The saliency, of losses with other negatives, is the mean over the batches."""
    whole = measure(shared_tiny_model, pair_notes, batch_pairs=4)
    halves = measure(shared_tiny_model, pair_notes, batch_pairs=2)
    assert whole.num_notes == halves.num_notes == 8
    assert differ(halves, whole, "share") < 1e-5
    assert differ(halves, whole, "saliency") > 1e-2

    def of_pairs(pairs: Sequence[int]) -> AttentionCurves:
        related = [partner if i // 2 in pairs else partner[:0] for i, partner in enumerate(PAIRED)]
        curves = measure(shared_tiny_model, pair_notes, related, batch_pairs=2)
        assert curves.num_notes == 4
        return curves

    distances = []
    for partner in (1, 2, 3):  # three ways to halve four pairs, of which one was drawn
        first = of_pairs([0, partner])
        second = of_pairs([pair for pair in (1, 2, 3) if pair != partner])
        mean = np.mean([first.note.saliency, second.note.saliency], axis=0)
        distances.append(float(np.abs(mean - halves.note.saliency).max() / mean.max()))
    distances.sort()
    assert distances[0] < 1e-4
    assert distances[1] > 1e-2


def test_pairs_are_drawn_by_the_seed(shared_tiny_model: NoteLLM2Model, pair_notes: list[dict[str, Any]]) -> None:
    options = {"batch_pairs": 2, "max_pairs": 2}
    first, again = (measure(shared_tiny_model, pair_notes, seed=1, **options) for _ in range(2))
    assert first.num_notes == 4
    assert differ(first, again, "share") == differ(first, again, "saliency") == 0.0
    others = [measure(shared_tiny_model, pair_notes, seed=seed, **options) for seed in (2, 3, 4)]
    assert max(differ(first, other, "share") for other in others) > 1e-3
    # Three pairs: what does not fill a batch of two is left out.
    assert measure(shared_tiny_model, pair_notes, [*PAIRED[:6], [], []], batch_pairs=2).num_notes == 4


def test_known_related_notes_are_no_negatives(
    shared_tiny_model: NoteLLM2Model, pair_notes: list[dict[str, Any]]
) -> None:
    notes = pair_notes[:4]
    plain = measure(shared_tiny_model, notes, PAIRED[:4])
    # 0 and 2 are related, too. They could be drawn as the only pair; with this seed they are not.
    related = [np.array([1, 2]), np.array([0]), np.array([3, 0]), np.array([2])]
    curves = measure(shared_tiny_model, notes, related, seed=1)
    assert curves.num_notes == 4
    assert differ(curves, plain, "share") < 1e-5
    assert differ(curves, plain, "saliency") > 1e-2


def test_notes_without_image_or_text_are_left_out(
    shared_tiny_model: NoteLLM2Model, pair_notes: list[dict[str, Any]]
) -> None:
    expected = measure(shared_tiny_model, pair_notes[:6], PAIRED[:6])
    more = [{"image": random_picture(9)}, {"title": "red", "image": random_picture(10)}, {"content": ""}]
    notes = [*pair_notes[:6], {**pair_notes[6], "image": None}, pair_notes[7], *more]
    related = [*PAIRED, np.array([9]), np.array([8, 9, 10]), np.array([9])]  # 9 to itself, too, which is no pair
    curves = measure(shared_tiny_model, notes, related)
    assert curves.num_notes == expected.num_notes == 6
    assert differ(curves, expected, "share") < 1e-5
    assert differ(curves, expected, "saliency") < 1e-4


@pytest.mark.parametrize("fixed", [True, False])
def test_with_lora_and_the_model_is_left_as_it_was(
    compose: Callable[..., NoteLLM2Model], pair_notes: list[dict[str, Any]], fixed: bool
) -> None:
    model = compose(late_fusion=None)
    plain = measure(model, pair_notes)
    model.add_lora(r=2, target_modules="all-linear", lora_dropout=0.5)
    if fixed:  # nothing trains, and there are gradients of the attention all the same
        model.requires_grad_(False)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.language_model.config._attn_implementation
    assert implementation != "eager"
    with torch.no_grad():
        untrained = measure(model, pair_notes)
    for what in ("share", "saliency"):  # adapters start at zero, and dropout is off
        assert differ(untrained, plain, what) < 1e-5
        assert differ(measure(model, pair_notes), untrained, what) == 0.0
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
            before[name] = parameter.detach().clone()
    adapted = measure(model, pair_notes)
    for what in ("share", "saliency"):
        assert differ(adapted, plain, what) > 1e-3

    assert model.training
    assert model.language_model.config._attn_implementation == implementation
    assert model.config.text_config._attn_implementation == implementation
    assert not model.language_model._forward_hooks and not model.language_model._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    batch = model.processor(pair_notes)
    assert model.language_model(input_ids=torch.ones_like(batch["input_ids"])).attentions is None


def test_the_model_is_left_as_it_was_after_an_error(
    tiny_model: NoteLLM2Model, pair_notes: list[dict[str, Any]]
) -> None:
    implementation = tiny_model.language_model.config._attn_implementation
    tiny_model.train()
    with pytest.raises(ValueError, match="image"):
        measure(tiny_model, [{**note, "image": b"no image"} for note in pair_notes])
    assert tiny_model.training
    assert tiny_model.language_model.config._attn_implementation == implementation
    assert not tiny_model.language_model._forward_pre_hooks


def test_image_span(compose: Callable[..., NoteLLM2Model], pair_notes: list[dict[str, Any]]) -> None:
    image, text, other = range(3)
    micl = compose()
    tokens, half = (measure(micl, pair_notes, image_span=span) for span in ("tokens", "half"))
    # Words move from other to image, and the text keeps its own.
    assert (half.note.share[:, image] > tokens.note.share[:, image] + 1e-3).all()
    assert (half.note.share[:, other] < tokens.note.share[:, other] - 1e-3).all()
    np.testing.assert_array_equal(half.note.share[:, text], tokens.note.share[:, text])
    np.testing.assert_array_equal(half.note.saliency[:, text], tokens.note.saliency[:, text])
    basic = compose(processor={"prompt": "basic"})
    tokens, half = (measure(basic, pair_notes, image_span=span) for span in ("tokens", "half"))
    assert differ(tokens, half, "share") == differ(tokens, half, "saliency") == 0.0


def test_normalized_saliency() -> None:
    curves = PositionCurves(np.zeros((3, 3)), np.array([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [1e-9, 3e-9, 0.0]]))
    expected = [[0.25, 0.5, 0.25], [np.nan] * 3, [0.25, 0.75, 0.0]]
    np.testing.assert_allclose(curves.normalized_saliency, expected)


def test_nothing_reads_n_v_in_the_last_layer_but_late_fusion(
    compose: Callable[..., NoteLLM2Model], pair_notes: list[dict[str, Any]]
) -> None:
    for late_fusion, reads in ((None, False), ("scalar", True)):
        visual = measure(compose(late_fusion=late_fusion), pair_notes).visual
        assert visual is not None
        assert visual.saliency[0].any()
        assert bool(visual.saliency[-1].any()) is reads
        assert visual.share[-1, 0] > 0.0


def test_refusals(
    compose: Callable[..., NoteLLM2Model], shared_tiny_model: NoteLLM2Model, pair_notes: list[dict[str, Any]]
) -> None:
    no_image = compose(processor={"prompt": "text"}, connector=None)
    text_only = compose(tower=None, late_fusion=None, connector=None)
    for model in (no_image, text_only):
        with pytest.raises(ValueError, match="prompt='text'.*no image.*'basic' or 'micl'"):
            measure(model, pair_notes)
    text_processor = NoteLLM2Processor(
        shared_tiny_model.processor.image_processor, copy.deepcopy(shared_tiny_model.processor.tokenizer), prompt="text"
    )
    with pytest.raises(ValueError, match="prompt='text'"):
        measure(shared_tiny_model, pair_notes, processor=text_processor)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"batch_pairs": 1}, "batch_pairs=1 must be at least 2"),
        ({"max_pairs": 1}, "max_pairs=1 must be at least 2"),
        ({"image_span": "words"}, "image_span='words'.*'tokens', 'half'"),
        ({"related": PAIRED[:3]}, "3 entries for 8 notes"),
        ({"related": [[]] * 8}, "no two related notes"),
        ({"related": [*PAIRED[:2], *[[]] * 6]}, r"notes \[\d, \d\] .*without negatives"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            measure(shared_tiny_model, pair_notes, **options)


def test_an_llm_without_eager_attention_is_refused(
    tiny_model: NoteLLM2Model, pair_notes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_model.language_model, "set_attn_implementation", lambda _name: None)  # as such LLMs do
    with pytest.raises(ValueError, match="LlamaModel returns no attention matrices"):
        measure(tiny_model, pair_notes)


def test_plot_attention(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    rng = np.random.default_rng(0)

    def curves() -> PositionCurves:
        return PositionCurves(rng.dirichlet(np.ones(3), 5), rng.random((5, 3)))

    systems = {"basic": AttentionCurves(curves(), None, 8), "mICL": AttentionCurves(curves(), curves(), 16)}
    figure = plot_attention(systems)
    assert figure.get_figwidth() * figure.dpi == 1200
    panels = figure.get_axes()
    assert [axes.get_title() for axes in panels] == ["basic (8 notes)", "mICL (16 notes)", "", ""]
    assert [len(axes.get_lines()) for axes in panels] == [3, 6, 3, 6]
    drawn = [np.asarray(line.get_ydata()) for line in panels[1].get_lines()[:3]]
    np.testing.assert_allclose(np.stack(drawn, axis=1), systems["mICL"].note.normalized_saliency)
    drawn = [np.asarray(line.get_ydata()) for line in panels[2].get_lines()]
    np.testing.assert_allclose(np.stack(drawn, axis=1), systems["basic"].note.share)
    figure.savefig(tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 10_000

    with pytest.raises(ValueError, match="curves is empty"):
        plot_attention({})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"notellm2\[report\]"):
        plot_attention(systems)
