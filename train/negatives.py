"""Hard negatives: notes that the model takes for related though no view says so."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from modeling_notellm2 import NoteLLM2Model
from train.data import NoteReader
from train.related import RelatedNotes
from train.states import NoteStateTable

NOTES_AT_ONCE = 8192
"""Notes whose states are kept at a time, and columns of the similarity matrix that are looked at at a time."""


@torch.no_grad()
def mine_hard_negatives(
    model: NoteLLM2Model,
    reader: NoteReader,
    related: RelatedNotes,
    count: int,
    max_similarity: float,
    batch_size: int = 32,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    show_progress_bar: bool = True,
) -> np.ndarray:
    """For each note the most similar others that are not known to be related, exactly, on the notes as they are (text
    and image).

    Args:
        model: the model that judges.
        reader: reads the notes.
        related: pairs that are no negatives.
        count: how many to find for each note.
        max_similarity: leave out notes that are more similar than this (a cosine): they are likely to be related,
            although nobody has viewed both.
        batch_size: notes a forward pass.
        autocast: the mixed precision of that pass.
        show_progress_bar: show progress bars.

    Returns:
        (N, count) int64 rows, the most similar first; −1 where there are no more, and for notes that cannot be read.
    """
    embeds = embed_notes(model, reader, batch_size, autocast, show_progress_bar)
    readable = embeds.isfinite().all(1)
    total = len(embeds)
    best = np.full((total, count), -1)
    candidates = embeds.nan_to_num()
    for start in tqdm(range(0, total, 1024), desc="hard negatives", unit="block", disable=not show_progress_bar):
        rows = torch.arange(start, min(start + 1024, total))
        scores, found = torch.empty(len(rows), 0), torch.empty(len(rows), 0, dtype=torch.int64)
        own = [related.of(row) for row in rows.tolist()]
        excluded = torch.as_tensor(
            np.stack([np.repeat(np.arange(len(rows)), [len(near) for near in own]), np.concatenate(own)])
        )
        for first in range(0, total, NOTES_AT_ONCE):
            columns = torch.arange(first, min(first + NOTES_AT_ONCE, total))
            tile = (candidates[rows] @ candidates[columns].T).float().cpu()
            tile[tile > max_similarity] = -torch.inf
            tile[:, ~readable[columns].cpu()] = -torch.inf
            tile[rows.unsqueeze(1) == columns] = -torch.inf
            row, column = excluded[:, (excluded[1] >= first) & (excluded[1] <= int(columns[-1]))]
            tile[row, column - first] = -torch.inf
            scores, found = torch.cat([scores, tile], 1), torch.cat([found, columns.expand(len(rows), -1)], 1)
            scores, order = scores.topk(min(count, scores.shape[1]), dim=1)
            found = found.gather(1, order)
        found[scores.isinf() | ~readable[rows].cpu().unsqueeze(1)] = -1
        best[start : start + len(rows), : found.shape[1]] = found.numpy()
    return best


@torch.no_grad()
def embed_notes(
    model: NoteLLM2Model,
    reader: NoteReader,
    batch_size: int = 32,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    show_progress_bar: bool = True,
) -> Tensor:
    """(N, D) float32 embeddings of all notes of a table; NaN for those of which the reader leaves nothing."""
    result: Tensor | None = None
    total = len(reader.notes)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, total, NOTES_AT_ONCE):
            rows = torch.arange(start, min(start + NOTES_AT_ONCE, total))
            table = NoteStateTable(model, reader, rows, batch_size, autocast, show_progress_bar)
            rows = rows[table.kept[rows]]
            for some in rows.split(batch_size):
                embeds = model.embed_states(table.select(some)).note_embeds
                assert embeds is not None
                if result is None:
                    result = embeds.new_full((total, embeds.shape[1]), torch.nan)
                result[some] = embeds
    finally:
        model.train(was_training)
    assert result is not None, "no note can be read"
    return result


__all__ = ["embed_notes", "mine_hard_negatives"]
