"""Hard negatives: notes that the model takes for related though no view says so."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from modeling_notellm2 import NonFiniteError, NoteLLM2PreTrainedModel
from train.data import NoteReader
from train.distributed import gather_rows, world
from train.finite import refused_by_all
from train.related import RelatedNotes
from train.states import NoteStateTable

logger = logging.getLogger(__name__)

NOTES_AT_ONCE = 8192
"""Notes whose states are kept at a time, and columns of the similarity matrix that are looked at at a time."""

ROWS_AT_ONCE = 1024
"""Rows of the similarity matrix that are looked at at a time, by one process."""


@torch.no_grad()
def mine_hard_negatives(
    model: NoteLLM2PreTrainedModel,
    reader: NoteReader,
    related: RelatedNotes,
    count: int,
    max_similarity: float,
    image_groups: np.ndarray | None = None,
    batch_size: int = 32,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    show_progress_bar: bool = True,
) -> np.ndarray:
    """For each note the most similar others that are not known to be related, exactly, on the notes as they are (text
    and image). The processes of a run share the work, and must all call this.

    Args:
        model: the model that judges.
        reader: reads the notes.
        related: pairs that are no negatives.
        count: how many to find for each note.
        max_similarity: leave out notes that are more similar than this (a cosine): they are likely to be related,
            although nobody has viewed both.
        image_groups: (N,) int64, for each note the number of its cover image: notes with one cover are then left out.
        batch_size: notes a forward pass.
        autocast: the mixed precision of that pass.
        show_progress_bar: show progress bars.

    Returns:
        (N, count) int64 rows, the most similar first; −1 where there are no more, and for notes that cannot be read.
    """
    embeds = embed_notes(model, reader, batch_size, autocast, show_progress_bar)
    readable = embeds.isfinite().all(1)
    total, device = len(embeds), embeds.device
    best = np.full((total, count), -1)
    candidates = embeds.nan_to_num()
    groups = torch.as_tensor(np.arange(total) if image_groups is None else image_groups, device=device)
    rank, processes = world()
    blocks = range(rank * ROWS_AT_ONCE, total, processes * ROWS_AT_ONCE)
    for start in tqdm(blocks, desc="hard negatives", unit="block", disable=not show_progress_bar):
        rows = torch.arange(start, min(start + ROWS_AT_ONCE, total))
        rows = rows.to(device)
        scores = torch.empty(len(rows), 0, device=device)
        found = torch.empty(len(rows), 0, dtype=torch.int64, device=device)
        own = [related.of(row) for row in rows.tolist()]
        excluded = torch.as_tensor(
            np.stack([np.repeat(np.arange(len(rows)), [len(near) for near in own]), np.concatenate(own)]), device=device
        )
        for first in range(0, total, NOTES_AT_ONCE):
            columns = torch.arange(first, min(first + NOTES_AT_ONCE, total), device=device)
            tile = candidates[rows] @ candidates[columns].T
            tile[tile > max_similarity] = -torch.inf
            tile[:, ~readable[columns]] = -torch.inf
            tile[groups[rows].unsqueeze(1) == groups[columns]] = -torch.inf  # the note itself, too
            row, column = excluded[:, (excluded[1] >= first) & (excluded[1] <= int(columns[-1]))]
            tile[row, column - first] = -torch.inf
            scores, found = torch.cat([scores, tile], 1), torch.cat([found, columns.expand(len(rows), -1)], 1)
            scores, order = scores.topk(min(count, scores.shape[1]), dim=1)
            found = found.gather(1, order)
        found[scores.isinf() | ~readable[rows].unsqueeze(1)] = -1
        best[start : start + len(rows), : found.shape[1]] = found.cpu().numpy()
    if not (best >= 0).any():
        logger.warning("No hard negative: no two notes that are not related are at most %s alike.", max_similarity)
    owner = np.arange(total) // ROWS_AT_ONCE % processes
    shared = gather_rows(torch.from_numpy(best[owner == rank]).to(model.device)).cpu().numpy()
    best[np.argsort(owner, kind="stable")] = shared  # one process's rows after another's
    return best


@torch.no_grad()
def embed_notes(
    model: NoteLLM2PreTrainedModel,
    reader: NoteReader,
    batch_size: int = 32,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    show_progress_bar: bool = True,
) -> Tensor:
    """(N, D) float32 embeddings of all notes of a table; NaN for those of which the reader leaves nothing.

    The processes of a run share the work, and must all call this.

    Raises:
        NonFiniteError: the model gives a note an embedding that is not finite.
    """
    total = len(reader.notes)
    rank, processes = world()
    own = torch.arange(rank, total, processes)
    width = model.config.embedding_dim or model.config.hidden_size
    result = torch.full((len(own), width), torch.nan, device=model.device)
    was_training = model.training
    model.eval()
    try:
        with refused_by_all(model.device):
            for rows in own.split(NOTES_AT_ONCE):
                table = NoteStateTable(model, reader, rows, batch_size, autocast, show_progress_bar)
                for some in rows[table.kept[rows]].split(batch_size):
                    if not len(some):  # what nothing is split into
                        continue
                    embeds = model.embed_states(table.select(some)).note_embeds
                    assert embeds is not None
                    if not bool((is_finite := embeds.isfinite().all(1)).all()):  # NaN would say: it cannot be read
                        raise NonFiniteError(
                            f"the embedding of note {int(some[int(is_finite.int().argmin())])} is not finite: check "
                            "the model's weights, or train with bf16 in place of fp16."
                        )
                    result[some // processes] = embeds.float()
    finally:
        model.train(was_training)
    order = torch.cat([torch.arange(first, total, processes) for first in range(processes)])
    embeds_of_all = torch.empty(total, width, device=model.device)
    embeds_of_all[order.to(model.device)] = gather_rows(result)
    return embeds_of_all


def write_hard_negatives(file: Path, negatives: np.ndarray) -> None:
    """Write what `mine_hard_negatives` found: the file is whole or absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    with unfinished.open("wb") as stream:
        np.save(stream, negatives)
    unfinished.replace(file)


__all__ = ["embed_notes", "mine_hard_negatives", "write_hard_negatives"]
