"""Where the LLM looks, layer by layer: at a note's image, at its text, or elsewhere; and what of that matters.

A model that neglects images shows it in its layers: the multimodal embedding n_m is read at the prompt's last position,
and little flows to it from the visual tokens (NoteLLM-2, the saliency analysis). Two measures, for that position and
for the one of the visual embedding n_v:

- the **share of attention**: how one position's attention is divided. It says where the model looks.
- the **saliency**, I = |Σ_heads A ⊙ ∂L_m/∂A|: attention times what the loss would change with it, to first order
  (Wang et al., 2023, "Label words are anchors"). It says which of the looks matter.

A is the attention after the softmax, L_m the contrastive loss of the multimodal embeddings of a batch of pairs.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from evaluation.modality import is_blank
from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor
from modeling_notellm2.processing_notellm2 import IMAGE_TOKEN, EncodedNote
from train.losses import ContrastiveTargets, contrastive_loss
from train.related import RelatedNotes

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

SPANS = ("image", "text", "other")
"""The columns of the curves. Text is the note's title, topics and content; other is what is neither: the prompt's own
words, `<IMG_EMB>`, the begin-of-sequence token on which much attention rests, and the position itself."""

ImageSpan = Literal["tokens", "half"]


@dataclass(frozen=True)
class PositionCurves:
    """What flows to one position p, in each of L layers, as a mean over notes.

    Attributes:
        share: (L, 3) float64, the attention of p to each of `SPANS`, summed over the span, a mean over the heads. A row
            adds up to 1.
        saliency: (L, 3) float64, S_v, S_t and S_o: the mean of I over the flows from the image to p, over those from
            the text to p, and over all other flows i ─► j ≤ p, i < j. A position's flow to itself counts nowhere. Where
            a span is empty, as the text is to n_v, its mean is 0.
    """

    share: np.ndarray
    saliency: np.ndarray

    @property
    def normalized_saliency(self) -> np.ndarray:
        """(L, 3) float64, the saliency with each row divided by its sum, as the paper plots it.

        A row without any saliency is NaN, a gap in the plot: of n_v's in the last layer, which late fusion alone reads.
        """
        total = self.saliency.sum(axis=1, keepdims=True)
        return np.divide(self.saliency, total, out=np.full_like(self.saliency, np.nan), where=total != 0)


@dataclass(frozen=True)
class AttentionCurves:
    """What `attention_curves` measures.

    Attributes:
        note: of n_m's position, the prompt's last.
        visual: of n_v's position, the one before `<IMG_EMB>`; None where the prompt has none.
        num_notes: how many notes were measured.
    """

    note: PositionCurves
    visual: PositionCurves | None
    num_notes: int


def attention_curves(
    model: NoteLLM2Model,
    notes: Sequence[Mapping[str, Any]],
    related: Sequence[np.ndarray],
    *,
    batch_pairs: int = 8,
    max_pairs: int = 64,
    seed: int = 0,
    image_span: ImageSpan = "tokens",
    processor: NoteLLM2Processor | None = None,
    show_progress_bar: bool = True,
) -> AttentionCurves:
    """Measure the attention and the saliency of a model on related notes that have both image and text.

    Pairs are drawn at random such that no note is in two. L_m is the mean over the notes of a batch, at the model's
    temperature, and its negatives are the batch's other notes but the known related ones, as in training; so the shares
    do not depend on the batches, and the saliency does. Pairs that do not fill a batch are left out, unless there is no
    full one. The model runs with eager attention and without dropout, and is left as it was.

    The paper's code differs, so that its figures can be compared in shape only. It takes all that is no image for text;
    here the prompt's words are `other`. With mICL its image runs to three positions past n_v's; see `image_span`. With
    all LLMs but Qwen it multiplies the scores before the softmax; here it is always the attention. It makes NaN 0; here
    NaN stays.

    Args:
        model: any NoteLLM-2 whose prompt shows the LLM the image, on its device.
        notes: N notes; see `NoteLLM2Processor`.
        related: for each of the N notes the positions of its related notes, integers; may be empty.
        batch_pairs: pairs of a batch. Its attention, L · 2 · `batch_pairs` · heads · T² numbers, is held with its
            gradient; of the batches before, only sums are.
        max_pairs: the most pairs to measure.
        seed: of the pairs that are drawn.
        image_span: `tokens`, the visual tokens alone; `half`, with mICL, all from the first of them to `<IMG_EMB>`,
            because the words in between pass on what they have read of the image, and of nothing else.
        processor: by default the one saved beside the model.
        show_progress_bar: show one progress bar over the notes.

    Raises:
        NoteError: a note, or its image, cannot be read.
        ValueError: the prompt shows no image; an argument is out of range; no pair of notes has images and texts; a
            batch has no negatives; the LLM has no eager attention.
    """
    processor = processor or model.processor
    if model.connector is None or IMAGE_TOKEN not in processor.template:
        raise ValueError(
            f"prompt={processor.prompt!r} with connector={model.config.connector!r} shows the LLM no image, so that "
            "there is no attention to it: analyse a model with the prompt 'basic' or 'micl'."
        )
    if image_span not in get_args(ImageSpan):
        raise ValueError(f"image_span={image_span!r} is unknown: choose one of {get_args(ImageSpan)}.")
    for name, value in (("batch_pairs", batch_pairs), ("max_pairs", max_pairs)):
        if value < 2:
            raise ValueError(f"{name}={value} must be at least 2: the loss of one pair has no negatives.")
    if len(related) != len(notes):
        raise ValueError(f"related has {len(related)} entries for {len(notes)} notes: give one for each note.")
    all_pairs = _as_pairs(related)
    encoded = _choose_notes(all_pairs, notes, processor, max_pairs, seed)  # the two notes of a pair side by side
    num_notes = len(encoded) - len(encoded) % (2 * batch_pairs) if len(encoded) > 2 * batch_pairs else len(encoded)
    known = RelatedNotes(all_pairs, len(notes))
    logger.info("attention is measured on %d notes that have image and text", num_notes)

    batches: list[Tensor] = []
    with (
        _recorded_attention(model) as recorded,
        tqdm(total=num_notes, desc="attention", unit="note", disable=not show_progress_bar) as progress,
    ):
        for start in range(0, num_notes, 2 * batch_pairs):
            batch = encoded[start : min(start + 2 * batch_pairs, num_notes)]
            inputs = {name: value.to(model.device) for name, value in processor.collate(batch).items()}
            recorded.clear()
            with torch.enable_grad():
                output = model(**inputs)
                assert output.note_embeds is not None and output.logit_scale is not None
                targets = _targets(batch, known).to(model.device)
                loss = contrastive_loss(output.note_embeds, output.logit_scale, targets)
            gradients = torch.autograd.grad(loss, recorded)  # of the attention alone, not of the weights
            spans = _spans(model, inputs, batch, image_span)
            positions = _read_positions(model, inputs)
            batches.append(torch.stack([_sums(recorded, gradients, *spans, position) for position in positions]))
            progress.update(len(batch))
    means = torch.stack(batches).sum(0).numpy() / num_notes  # (1 or 2 positions, share and saliency, L, 3)
    curves = [PositionCurves(*position) for position in means]
    return AttentionCurves(curves[0], curves[1] if len(curves) > 1 else None, num_notes)


def plot_attention(curves: Mapping[str, AttentionCurves]) -> "Figure":
    """Draw one column a system, normalised saliency above, shares of attention below, layers from left to right.

    Solid lines are n_m's, dashed ones n_v's. The figure is 1,200 pixels wide; write it with `savefig`.

    Args:
        curves: name of a system ─► its curves, in the order of the columns; at least one.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there are no curves.
    """
    if not curves:
        raise ValueError("curves is empty: give the curves of one system at least.")
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("The plot needs matplotlib: pip install 'notellm2[report]'.") from error

    colors = dict(zip(SPANS, ("#d9772b", "#2a6fb0", "#777777"), strict=True))
    figure = Figure(figsize=(8.0, 5.6), dpi=150, layout="constrained")
    panels = figure.subplots(2, len(curves), squeeze=False, sharex="col", sharey="row")
    for column, (name, system) in enumerate(curves.items()):
        for position, style, width in ((system.note, "-", 2.0), (system.visual, "--", 1.2)):
            if position is None:
                continue
            layers = np.arange(1, len(position.share) + 1)
            for axes, values in zip(panels[:, column], (position.normalized_saliency, position.share), strict=True):
                for span, line in zip(SPANS, values.T, strict=True):
                    axes.plot(layers, line, style, color=colors[span], linewidth=width, marker="o", markersize=2)
        panels[0, column].set_title(f"{name} ({system.num_notes} notes)", fontsize=11)
        panels[1, column].set_xlabel("layer", fontsize=10)
    for label, row in zip(("saliency, normalised", "share of attention"), panels, strict=True):
        row[0].set_ylabel(label, fontsize=10)
        for axes in row:
            axes.set_ylim(-0.03, 1.03)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    labels = {
        "image": "from the image",
        "text": "from title, topics, content",
        "other": "other (saliency: all other flows; attention: all other tokens)",
    }
    handles = [Line2D([], [], color=colors[span], linewidth=2, label=labels[span]) for span in SPANS]
    handles += [
        Line2D([], [], color="black", linewidth=2, label="to n_m, the note's state"),
        Line2D([], [], color="black", linewidth=1.2, linestyle="--", label="to n_v, the image's state"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def _as_pairs(related: Sequence[np.ndarray]) -> np.ndarray:
    """For each note its related notes ─► (P, 2) int64 pairs a < b, each once."""
    anchors = np.repeat(np.arange(len(related)), [len(positions) for positions in related])
    positives = np.concatenate([np.asarray(positions, dtype=np.int64) for positions in (*related, [])])
    pairs = np.sort(np.stack([anchors, positives], axis=1), axis=1)
    return np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)


def _choose_notes(
    pairs: np.ndarray, notes: Sequence[Mapping[str, Any]], processor: NoteLLM2Processor, max_pairs: int, seed: int
) -> list[EncodedNote]:
    """The notes of `max_pairs` disjoint pairs at most, of those whose notes have image and text; pair after pair."""
    seen: set[int] = set()
    chosen: list[EncodedNote] = []
    for pair in np.random.default_rng(seed).permutation(pairs).tolist():
        if len(chosen) == 2 * max_pairs:
            break
        if not seen.isdisjoint(pair) or any(is_blank(notes[note]) for note in pair):
            continue
        both = [processor.encode_note(notes[note], note) for note in pair]
        if all(note.image is not None and any(note.text_mask) for note in both):
            seen.update(pair)
            chosen += both
    if not chosen:
        raise ValueError("no two related notes both have an image and a text: give notes that have, and their pairs.")
    return chosen


def _targets(notes: Sequence[EncodedNote], known: RelatedNotes) -> ContrastiveTargets:
    """What is positive and what is no negative among the notes of a batch, two neighbours being a pair."""
    rows = np.array([note.index for note in notes])
    related = known.among(rows)
    if (np.bincount(related[:, 0], minlength=len(rows)) >= len(rows) - 1).all():
        raise ValueError(
            f"notes {rows.tolist()} make a batch without negatives, all being related to one another: give more "
            "notes, or a larger batch_pairs."
        )
    places = np.arange(len(rows))
    return ContrastiveTargets.of_plan(np.stack([places, places ^ 1], axis=1), related, rows)


@contextmanager
def _recorded_attention(model: NoteLLM2Model) -> Iterator[list[Tensor]]:
    """Gives a list to which each forward pass of the model appends the attention of its LLM's layers, (B, H, T, T)."""
    recorded: list[Tensor] = []
    language_model = model.language_model

    def ask(_module: Any, arguments: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        embeds = keywords["inputs_embeds"]
        if not embeds.requires_grad:  # with all weights fixed there would be no gradient
            embeds = embeds.detach().requires_grad_()
        return arguments, {**keywords, "inputs_embeds": embeds, "output_attentions": True}

    def keep(_module: Any, _arguments: tuple, output: Any) -> None:
        if not output.attentions or any(attention is None for attention in output.attentions):
            raise ValueError(
                f"{type(language_model).__name__} returns no attention matrices with attn_implementation='eager': use "
                "an LLM with eager attention."
            )
        recorded.extend(output.attentions)

    implementation, was_training = language_model.config._attn_implementation, model.training
    hooks = [
        language_model.register_forward_pre_hook(ask, with_kwargs=True),
        language_model.register_forward_hook(keep),
    ]
    try:
        language_model.set_attn_implementation("eager")  # no other one makes the matrices
        model.eval()
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
        language_model.set_attn_implementation(implementation)


def _read_positions(model: NoteLLM2Model, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """(B,) int64 positions of n_m, and of n_v where the prompt has it; see `NoteLLM2Model.get_states`."""
    mask = inputs["attention_mask"]
    is_end = inputs["input_ids"] == model.config.image_embedding_token_id
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)
    return [last, is_end.int().argmax(-1) - 1] if bool(is_end.any()) else [last]


def _spans(
    model: NoteLLM2Model, inputs: Mapping[str, Tensor], notes: Sequence[EncodedNote], image_span: ImageSpan
) -> tuple[Tensor, Tensor, Tensor]:
    """Three (B, T) bool: which positions are the image's, which the text's, and which are of the prompt at all."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    is_image = ids == model.config.image_token_id
    if image_span == "half":
        is_end = ids == model.config.image_embedding_token_id
        # From the first visual token on, and as long as an <IMG_EMB> is still to come.
        is_image = is_image | ((is_image.cumsum(-1) > 0) & (is_end.flip(-1).cumsum(-1).flip(-1) > 0))
    is_text = torch.zeros_like(real)
    # Row by row, real positions are the notes' ids in their order, wherever the padding is.
    is_text[real] = torch.tensor([value for note in notes for value in note.text_mask], device=real.device)
    return is_image, is_text, real


def _sums(
    attentions: Sequence[Tensor],
    gradients: Sequence[Tensor],
    is_image: Tensor,
    is_text: Tensor,
    is_real: Tensor,
    position: Tensor,
) -> Tensor:
    """The `share` and the `saliency` of `PositionCurves`, summed over B notes.

    Args:
        attentions, gradients: of each of L layers, (B, H, T, T) floats.
        is_image, is_text, is_real: (B, T) bool; see `_spans`.
        position: (B,) int64, p.

    Returns:
        (2, L, 3) float64, on the CPU.
    """
    columns = torch.arange(is_real.shape[1], device=position.device)
    seen = is_real & (columns <= position.unsqueeze(1))  # (B, T): p and what lies before it
    image, text = seen & is_image, seen & is_text
    spans = torch.stack([image, text, seen & ~image & ~text]).float()  # (3, B, T)

    to_position = (columns == position.unsqueeze(1)).unsqueeze(2)  # (B, T, 1): the row of p
    flows = (seen.unsqueeze(2) & seen.unsqueeze(1)).tril(-1)  # (B, T, T): to a row, from a column before it
    from_image, from_text = (flows & to_position & span.unsqueeze(1) for span in (image, text))
    weights = torch.stack([from_image, from_text, flows & ~from_image & ~from_text]).float()  # (3, B, T, T)
    weights /= weights.sum((2, 3), keepdim=True).clamp(min=1)

    rows = torch.arange(len(position), device=position.device)
    shares, saliencies = [], []
    for attention, gradient in zip(attentions, gradients, strict=True):
        attention = attention.detach().float()
        flow = (attention * gradient.float()).sum(1).abs()  # (B, T, T), I
        shares.append(torch.einsum("bt,sbt->s", attention[rows, :, position].mean(1), spans))
        saliencies.append(torch.einsum("bij,sbij->s", flow, weights))
    return torch.stack([torch.stack(shares), torch.stack(saliencies)]).double().cpu()


__all__ = ["SPANS", "AttentionCurves", "ImageSpan", "PositionCurves", "attention_curves", "plot_attention"]
