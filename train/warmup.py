"""A warm-up of what comes after the LLM, on the LLM's unchanged states, before everything trains.

A head that starts at random may send the LLM gradients without meaning and distort its features before the head has
learned to read them: linear probing, then fine-tuning (Kumar et al., arXiv 2202.10054). The backbones run once over the
notes; after that a step costs as much as the head. The connector is still untrained meanwhile: of the image, only late
fusion learns.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from modeling_notellm2 import NoteLLM2PreTrainedModel
from modeling_notellm2.modeling_notellm2 import MAX_LOGIT_SCALE
from train.batches import distinct_notes
from train.data import NoteReader
from train.finite import refuse_non_finite_gradients, refuse_non_finite_loss
from train.losses import ContrastiveTargets, joint_loss
from train.related import RelatedNotes
from train.states import NoteStateTable

PAIRS_PER_STEP = 64
"""More than fit through an LLM in one batch, as states are cheap: more negatives for each anchor."""

MAX_NOTES = 16_384
"""Notes whose states are kept. 150 steps see 19,200 notes at most."""


def warm_up_head(
    model: NoteLLM2PreTrainedModel,
    reader: NoteReader,
    pairs: np.ndarray,
    groups: list[dict[str, Any]],
    *,
    steps: int,
    visual_loss_weight: float,
    seed: int,
    dims: tuple[int, ...] | None = None,
    batch_size: int = 32,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    show_progress_bar: bool = True,
    table: NoteStateTable | None = None,
) -> float:
    """Train the parameters of `groups` with AdamW, at a rate that decays to zero by a cosine, on the loss of training.

    A model with `config.standardize_states` measures the states first, those of `MAX_NOTES` at most; one that has done
    so keeps what its head has learned to read.

    Args:
        model: the model; its gate, projection, head and temperature are what `groups` may hold.
        reader: reads the training notes.
        pairs: (P, 2) int64 rows of related notes; `PAIRS_PER_STEP` a step are drawn at random.
        groups: parameter groups of the optimizer, each with its rate.
        steps: number of steps, at least 1.
        visual_loss_weight: α of `joint_loss`.
        seed: of the pairs that are drawn.
        dims: as in `joint_loss`.
        batch_size: notes a forward pass of the backbones.
        autocast: the mixed precision of that pass.
        show_progress_bar: show progress bars of the pass and of the steps.
        table: the states of all notes of `pairs`, where they are known from before: no pass is made.

    Returns:
        The mean loss of the last tenth of the steps.

    Raises:
        ValueError: no pair is left, as no image can be read; the states of all notes are equal, and are to be
            standardized.
        NonFiniteError: the loss or a gradient is NaN or infinite.
    """
    generator = torch.Generator().manual_seed(seed)
    notes, chosen = _choose_pairs(torch.from_numpy(pairs), generator)
    if table is None:
        table = NoteStateTable(model, reader, notes, batch_size, autocast, show_progress_bar)
    chosen = chosen[table.kept[chosen].all(1)]
    if not len(chosen):
        raise ValueError("no pair is left to warm up on: no image of the training notes can be read.")
    if model.note_standardizer is not None and not model.note_standardizer.is_fitted:
        model.fit_standardizers(table.select(notes[table.kept[notes]]))
    related = RelatedNotes(pairs, len(reader.notes))
    head = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    with tqdm(total=steps, desc="head warm-up", unit="step", disable=not show_progress_bar) as progress:
        for step in range(steps):
            drawn = chosen[torch.randint(len(chosen), (PAIRS_PER_STEP,), generator=generator)]
            rows, positives = distinct_notes(drawn.unique(dim=0).numpy())
            targets = ContrastiveTargets.of_plan(positives, related.among(rows), rows)
            states = table.select(torch.from_numpy(rows))
            output = model.embed_states(states)
            assert output.note_embeds is not None and output.logit_scale is not None
            loss, parts = joint_loss(
                output.note_embeds,
                output.visual_embeds,
                output.logit_scale,
                states.has_image,
                targets.to(model.device),
                visual_loss_weight,
                dims,
            )
            place = f"step {step + 1} of the head's warm-up"
            refuse_non_finite_loss(loss, parts, place)
            loss.backward()
            refuse_non_finite_gradients(head, place)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(-MAX_LOGIT_SCALE, MAX_LOGIT_SCALE)  # as training does: see `TemperatureBound`
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
            progress.update()
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def _choose_pairs(pairs: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(M, 2) pairs ─► (N,) the notes of pairs drawn at random, `MAX_NOTES` at most, and all pairs among these notes.

    Drawing notes instead would leave most of them without a partner.
    """
    order = torch.randperm(len(pairs), generator=generator)
    notes = pairs[order[: MAX_NOTES // 2]].unique()
    return notes, pairs[torch.isin(pairs, notes).all(-1)]


__all__ = ["warm_up_head"]
