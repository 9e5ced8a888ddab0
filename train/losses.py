"""The contrastive loss of NoteLLM-2: every one of the 2N notes of N pairs is an anchor.

Its positive is its partner, its negatives are all other notes of the batch. A note is never its own negative, wherever
else in the batch it stands, and neither are notes known to be related to the anchor.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


class RelatedNotes:
    """A set of unordered pairs of related notes that answers for whole batches at once.

    Args:
        pairs: (P, 2) int64, pairs of note indices, each in [0, num_notes).
        num_notes: how many notes there are.

    >>> related = RelatedNotes(np.array([(0, 2)]), num_notes=3)
    >>> related.matrix(torch.tensor([0, 1, 2])).int().tolist()
    [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    """

    def __init__(self, pairs: np.ndarray, num_notes: int) -> None:
        self.num_notes = num_notes
        a, b = pairs.reshape(-1, 2).astype(np.int64).T
        self._keys = torch.from_numpy(np.unique(np.concatenate([a * num_notes + b, b * num_notes + a])))

    def matrix(self, note_ids: Tensor) -> Tensor:
        """(M,) int64 note indices ─► (M, M) bool, True where the two notes are related."""
        if self._keys.device != note_ids.device:
            self._keys = self._keys.to(note_ids.device)
        wanted = note_ids.unsqueeze(1) * self.num_notes + note_ids.unsqueeze(0)
        if len(self._keys) == 0:
            return torch.zeros_like(wanted, dtype=torch.bool)
        # The keys are sorted: `torch.isin` would go through all of them, a million pairs in every step.
        found = torch.searchsorted(self._keys, wanted).clamp(max=len(self._keys) - 1)
        return self._keys[found] == wanted


def false_negative_mask(note_ids: Tensor, related: RelatedNotes | None = None) -> Tensor:
    """Which entries of the similarity matrix are no negatives.

    Args:
        note_ids: (M,) int64, the note of each row.
        related: pairs known to be related.

    Returns:
        (M, M) bool, True for the same note (the diagonal included) and for related notes.
    """
    mask = note_ids.unsqueeze(0) == note_ids.unsqueeze(1)
    return mask if related is None else mask | related.matrix(note_ids)


def contrastive_loss(embeds: Tensor, logit_scale: Tensor | float, false_negatives: Tensor | None = None) -> Tensor:
    """L = mean over the 2N anchors i of −log( e^(s·x_i·x_p(i)) / Σ_j≠i e^(s·x_i·x_j) ) (NoteLLM-2, contrastive loss).

    p(i) = (i + N) mod 2N is the partner of i, and s = 1 / temperature.

    Args:
        embeds: (2N, D) float, L2-normalised: the first notes of the N pairs, then their partners.
        logit_scale: s, a scalar that multiplies the cosine similarities.
        false_negatives: (2N, 2N) bool, from `false_negative_mask`; these entries leave the denominator. The partner
            always stays. Default: the diagonal.

    Returns:
        Scalar float32.

    Raises:
        ValueError: an odd or zero number of rows.

    >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    >>> float(contrastive_loss(torch.cat([a, b]), 20.0))  # one pair: nothing to tell it from
    0.0
    """
    rows = embeds.shape[0]
    if rows == 0 or rows % 2:
        raise ValueError(f"embeds has {rows} rows: give the first notes of all pairs, then their partners (2N rows).")
    embeds = embeds.float()
    partner = torch.arange(rows, device=embeds.device).roll(rows // 2)
    own = torch.eye(rows, dtype=torch.bool, device=embeds.device)
    masked = own if false_negatives is None else (own | false_negatives).scatter(1, partner.unsqueeze(1), False)
    logits = (embeds @ embeds.T * logit_scale).masked_fill(masked, float("-inf"))
    return functional.cross_entropy(logits, partner)


def joint_loss(
    note_embeds: Tensor,
    visual_embeds: Tensor | None,
    logit_scale: Tensor | float,
    has_image: Tensor,
    false_negatives: Tensor,
    visual_loss_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = (L_m + α·L_v) / (1 + α) (NoteLLM-2, training objective).

    L_v is taken over the pairs whose notes both have an image. L is L_m alone without `visual_embeds`, with α = 0, and
    where no pair has two images.

    Args:
        note_embeds: (2N, D) float, L2-normalised, of n_m: the first notes of the N pairs, then their partners.
        visual_embeds: (2N, D) the same of n_v, or `None` where the prompt gives none.
        logit_scale: a scalar that multiplies the cosine similarities.
        has_image: (2N,) bool, which notes have an image.
        false_negatives: (2N, 2N) bool, from `false_negative_mask`.
        visual_loss_weight: α.

    Returns:
        L, a scalar float32, and its parts, `loss_m` and, where it was taken, `loss_v`.
    """
    loss_m = contrastive_loss(note_embeds, logit_scale, false_negatives)
    first, second = has_image.chunk(2)
    rows = (first & second).repeat(2)
    if visual_embeds is None or visual_loss_weight == 0 or not bool(rows.any()):
        return loss_m, {"loss_m": loss_m}
    loss_v = contrastive_loss(visual_embeds[rows], logit_scale, false_negatives[rows][:, rows])
    loss = (loss_m + visual_loss_weight * loss_v) / (1.0 + visual_loss_weight)
    return loss, {"loss_m": loss_m, "loss_v": loss_v}


__all__ = ["RelatedNotes", "contrastive_loss", "false_negative_mask", "joint_loss"]
