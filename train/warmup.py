"""Linear probing before fine-tuning: what comes after the LLM learns first, on the LLM's unchanged states.

A head that starts at random sends the LLM gradients without meaning, and the LLM's features are distorted before the
head has learned to read them (Kumar et al., arXiv 2202.10054). The LLM runs once over the notes; after that a step
costs as much as the head, so that hundreds of steps over large batches take seconds.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm, trange

from modeling_notellm2.modeling_notellm2 import NoteStates
from train.data import NoteCollator, NoteDataset, PairDataset
from train.losses import false_negative_mask, joint_loss
from train.trainer import NoteLLM2Trainer

PAIRS_PER_STEP = 64
"""More than fit through an LLM in one batch, as states are cheap: more negatives for each anchor."""

MAX_NOTES = 16_384
"""Notes whose states are kept: a head of some ten thousand weights needs no more."""


def warm_up_head(trainer: NoteLLM2Trainer) -> float:
    """Train the gate, its projection, the head and the temperature for `args.head_warmup_steps` steps.

    AdamW with `head_learning_rate` and a cosine decay to zero, on pairs drawn at random from the training pairs; the
    same loss as in training. Call it before `trainer.train()`.

    Returns:
        The mean loss of the last tenth of the steps.

    Raises:
        ValueError: the model has neither a head nor late fusion, so that there is nothing to train.
    """
    args, model, dataset = trainer.args, trainer.model, trainer.train_dataset
    assert isinstance(dataset, PairDataset)
    groups = [group for group in trainer.parameter_groups(model) if group["part"] == "head"]
    if not any(parameter is not model.logit_scale for group in groups for parameter in group["params"]):
        raise ValueError(
            f"head_warmup_steps={args.head_warmup_steps}: the model has neither a head (embedding_dim) nor late "
            "fusion, so there is nothing to warm up; set it to 0."
        )
    generator = torch.Generator().manual_seed(args.seed)
    notes, pairs = _choose_pairs(dataset, generator)
    states = _run_backbones(trainer, dataset, notes.tolist())
    row_of = torch.empty(len(dataset.notes), dtype=torch.int64)
    row_of[notes] = torch.arange(len(notes))

    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.head_warmup_steps)
    losses: list[float] = []
    for _ in trange(args.head_warmup_steps, desc="head warm-up", unit="step"):
        drawn = pairs[torch.randint(len(pairs), (PAIRS_PER_STEP,), generator=generator)]
        note_index = drawn.T.flatten()  # the first notes of all pairs, then their partners
        batch = _select(states, row_of[note_index].to(model.device))
        masked = false_negative_mask(note_index, trainer.related).to(model.device)
        loss, _ = joint_loss(model.embed_states(batch), batch.has_image, masked, args.visual_loss_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def _choose_pairs(dataset: PairDataset, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(N,) the notes to warm up on, at most `MAX_NOTES` drawn at random, and (M, 2) all pairs among them."""
    pairs = torch.tensor(dataset.pairs)
    notes = pairs.unique()
    notes = notes[torch.randperm(len(notes), generator=generator)[:MAX_NOTES]].sort().values
    return notes, pairs[torch.isin(pairs, notes).all(-1)]


@torch.no_grad()
def _run_backbones(trainer: NoteLLM2Trainer, dataset: PairDataset, notes: Sequence[int]) -> NoteStates:
    """The states of these notes, in order, with a row for every note in every field: zeros where it has nothing."""
    model, batch_size = trainer.model, trainer.args.per_device_eval_batch_size
    singles, collate = NoteDataset(dataset.notes, dataset.features), NoteCollator(model.processor)
    vision_width = model.config.vision_hidden_size if model.config.has_vision else 0
    lengths = [len(model.processor.encode_note(dataset.notes[row], row).input_ids) for row in notes]
    order = sorted(range(len(notes)), key=lengths.__getitem__, reverse=True)  # notes of like length need no padding
    was_training = model.training
    model.eval()
    parts: list[tuple[Tensor, ...]] = []
    try:
        with tqdm(total=len(notes), desc="states", unit="note") as progress:
            for start in range(0, len(order), batch_size):
                batch = collate([singles[notes[position]] for position in order[start : start + batch_size]])
                del batch["note_index"]
                with trainer.compute_loss_context_manager():
                    states = model.get_states(**{name: value.to(model.device) for name, value in batch.items()})
                visual = torch.zeros_like(states.note_states) if states.visual_states is None else states.visual_states
                pooled = states.note_states.new_zeros(len(visual), vision_width)
                if states.pooled_embeds is not None:
                    pooled[states.has_image] = states.pooled_embeds.to(pooled.dtype)
                parts.append((states.note_states, visual, states.has_visual, pooled, states.has_image))
                progress.update(len(visual))
    finally:
        model.train(was_training)
    back = torch.tensor(order).argsort()
    return NoteStates(*(torch.cat(part)[back.to(model.device)] for part in zip(*parts, strict=True)))


def _select(table: NoteStates, rows: Tensor) -> NoteStates:
    """The states of one batch, with what no note of it has left out, as `get_states` returns them."""
    assert table.visual_states is not None and table.pooled_embeds is not None
    has_visual, has_image = table.has_visual[rows], table.has_image[rows]
    return NoteStates(
        note_states=table.note_states[rows],
        visual_states=table.visual_states[rows] if bool(has_visual.any()) else None,
        has_visual=has_visual,
        pooled_embeds=table.pooled_embeds[rows[has_image]] if bool(has_image.any()) else None,
        has_image=has_image,
    )


__all__ = ["warm_up_head"]
