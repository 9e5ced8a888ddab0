"""The contrastive loss of NoteLLM-2 over the distinct notes of a batch and the related pairs among them.

Each positive (a, p) is told from the negatives of a: all other notes of the batch but those known to be related to a
and those of its group (copies of the note, or notes with the same cover image). Notes are compared in tiles, forward
and backward, so that memory grows with the notes and not with their square.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from modeling_notellm2.fusion_notellm2 import unit_length

TILE_SIZE = 2048
"""Notes on each side of a tile of the similarity matrix: 16 MB of float32."""


class ContrastiveTargets(NamedTuple):
    """What is positive and what is no negative among the M notes of a batch, by their positions in it.

    Attributes:
        positives: (P, 2) int64: an anchor and its positive. A pair of related notes stands here both ways.
        related: (K, 2) int64: an anchor and a note known to be related to it, which is then no negative. The positives
            need not be repeated here.
        groups: (M,) int64: notes with the same number are never each other's negatives.
        log_q: (M,) float32 or None: the logarithm of the probability with which a note is drawn into a batch, for the
            logQ correction.
    """

    positives: Tensor
    related: Tensor
    groups: Tensor
    log_q: Tensor | None = None

    @classmethod
    def of_pairs(cls, num_pairs: int, device: torch.device | str | None = None) -> "ContrastiveTargets":
        """The targets of 2N distinct notes: the first notes of N pairs, then their partners."""
        anchors = torch.arange(2 * num_pairs, device=device)
        positives = torch.stack([anchors, anchors.roll(num_pairs)], dim=1)
        return cls(positives, positives[:0], anchors)

    @classmethod
    def of_plan(
        cls, positives: np.ndarray, related: np.ndarray, groups: np.ndarray, log_q: np.ndarray | None = None
    ) -> "ContrastiveTargets":
        """The same from arrays.

        Raises:
            ValueError: `log_q` holds NaN or infinity, a probability of 0: a note that is never drawn is in no batch.
        """
        if log_q is not None and not np.isfinite(log_q).all():
            position = int(np.isfinite(log_q).argmin())
            raise ValueError(
                f"log_q[{position}] is {log_q[position]}: give the logarithm of a probability above 0 for every note."
            )
        weights = None if log_q is None else torch.as_tensor(log_q, dtype=torch.float32)
        return cls(torch.as_tensor(positives), torch.as_tensor(related), torch.as_tensor(groups), weights)

    def to(self, device: torch.device | str) -> "ContrastiveTargets":
        """The same on another device."""
        log_q = None if self.log_q is None else self.log_q.to(device)
        return ContrastiveTargets(self.positives.to(device), self.related.to(device), self.groups.to(device), log_q)

    def select(self, kept: Tensor) -> "ContrastiveTargets":
        """The targets of the notes where `kept` (M,) bool is True, at their new positions."""
        place = kept.cumsum(0) - 1

        def move(pairs: Tensor) -> Tensor:
            return place[pairs[kept[pairs].all(1)]]

        log_q = None if self.log_q is None else self.log_q[kept]
        return ContrastiveTargets(move(self.positives), move(self.related), self.groups[kept], log_q)


def contrastive_loss(
    embeds: Tensor,
    logit_scale: Tensor | float,
    targets: ContrastiveTargets,
    share: tuple[int, int] = (0, 1),
    tile_size: int = TILE_SIZE,
) -> Tensor:
    """L = mean over the positives (a, p) of −log( e^(s·x_a·x_p) / (e^(s·x_a·x_p) + Σ_n e^(s·x_a·x_n)) ).

    n runs over the negatives of a, and s = 1 / temperature. Where every note has one positive this is the loss of the
    paper (NoteLLM-2, contrastive loss); with more, each is told from the same negatives, and none is a negative of
    another (the multi-positive InfoNCE). With `targets.log_q`, log q of a note is taken off its logits, so that notes
    drawn often do not pay for it (Yi et al., 2019, "Sampling-bias-corrected neural modeling", here for both sides).

    Args:
        embeds: (M, D) float, L2-normalised.
        logit_scale: s, a scalar that multiplies the cosine similarities.
        targets: what is positive and what is no negative.
        share: (w, W): take the positives of every W-th anchor from the w-th, the mean still being over all positives.
            The W shares add up to the loss.
        tile_size: notes on each side of a tile; changes memory and speed alone.

    Returns:
        Scalar float32; 0 without positives.

    >>> embeds = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    >>> float(contrastive_loss(embeds, 20.0, ContrastiveTargets.of_pairs(1)))  # one pair: nothing to tell it from
    0.0
    """
    embeds = embeds.float()
    scale = torch.as_tensor(logit_scale, dtype=torch.float32, device=embeds.device)
    index, parts = share
    total = len(targets.positives)
    positives = targets.positives[targets.positives[:, 0] % parts == index] if parts > 1 else targets.positives
    anchors, row = positives[:, 0].unique(return_inverse=True)
    bias = None if targets.log_q is None else -targets.log_q
    with torch.autocast(embeds.device.type, enabled=False):
        no_negatives = _rows_of(torch.cat([targets.positives, targets.related]), anchors)
        negatives: Tensor = _NegativesLogSumExp.apply(
            embeds, scale, anchors, targets.groups, no_negatives, bias, tile_size
        )
        logits: Tensor = scale * _PairSimilarity.apply(embeds, positives, tile_size * tile_size)
        if bias is not None:
            logits = logits + bias[positives[:, 1]]
        return functional.softplus(negatives[row] - logits).sum() / max(total, 1)


def _rows_of(pairs: Tensor, anchors: Tensor) -> Tensor:
    """(K, 2) positions ─► those whose first is one of the (A,) sorted anchors: (row of the anchor, position), sorted by
    row."""
    if not len(anchors):
        return pairs[:0]
    row = torch.searchsorted(anchors, pairs[:, 0].contiguous()).clamp(max=len(anchors) - 1)
    found = anchors[row] == pairs[:, 0]
    row, column = row[found], pairs[found, 1]
    order = row.argsort(stable=True)
    return torch.stack([row[order], column[order]], dim=1)


class _NegativesLogSumExp(torch.autograd.Function):
    """(A,) log Σ_n e^(s·x_a·x_n + b_n) over the negatives n of each anchor, without the (A, M) matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        embeds: Tensor,
        scale: Tensor,
        anchors: Tensor,
        groups: Tensor,
        no_negatives: Tensor,
        bias: Tensor | None,
        tile_size: int,
    ) -> Tensor:
        result = embeds.new_full((len(anchors),), float("-inf"))
        for rows, columns, masked in _tiles(anchors, groups, no_negatives, tile_size):
            logits = embeds[anchors[rows]] @ embeds[columns].T * scale
            if bias is not None:
                logits += bias[columns]
            logits.masked_fill_(masked, float("-inf"))
            result[rows] = torch.logaddexp(result[rows], logits.logsumexp(1))
        ctx.save_for_backward(embeds, scale, anchors, groups, no_negatives, bias, result)
        ctx.tile_size = tile_size
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        embeds, scale, anchors, groups, no_negatives, bias, result = ctx.saved_tensors
        embeds_grad, scale_grad = torch.zeros_like(embeds), torch.zeros_like(scale)
        anchors_grad = embeds.new_zeros(len(anchors), embeds.shape[1])
        finite = result.masked_fill(result.isinf(), 0.0)  # an anchor without negatives has no gradient
        with torch.autocast(embeds.device.type, enabled=False):  # a caller's, which is not the forward pass's
            for rows, columns, masked in _tiles(anchors, groups, no_negatives, ctx.tile_size):
                cosines = embeds[anchors[rows]] @ embeds[columns].T
                logits = cosines * scale
                if bias is not None:
                    logits += bias[columns]
                logits.masked_fill_(masked, float("-inf"))
                weights = (logits - finite[rows, None]).exp_() * grad[rows, None]
                scale_grad += (weights * cosines).sum()
                weights *= scale
                anchors_grad[rows] += weights @ embeds[columns]
                embeds_grad[columns] += weights.T @ embeds[anchors[rows]]
        embeds_grad.index_add_(0, anchors, anchors_grad)
        return embeds_grad, scale_grad, None, None, None, None, None


def _tiles(anchors: Tensor, groups: Tensor, no_negatives: Tensor, size: int) -> Any:
    """The tiles of the (A, M) matrix of anchors and notes: rows, columns, and which entries are no negatives."""
    edges = torch.arange(0, len(anchors) + size, size, device=anchors.device)
    bounds = torch.searchsorted(no_negatives[:, 0].contiguous(), edges).tolist()
    for number, start in enumerate(range(0, len(anchors), size)):
        rows = slice(start, min(start + size, len(anchors)))
        listed = no_negatives[bounds[number] : bounds[number + 1]]
        for first in range(0, len(groups), size):
            columns = slice(first, min(first + size, len(groups)))
            masked = groups[anchors[rows]].unsqueeze(1) == groups[columns]
            row, column = listed[(listed[:, 1] >= first) & (listed[:, 1] < columns.stop)].T
            masked[row - start, column - first] = True
            yield rows, columns, masked


class _PairSimilarity(torch.autograd.Function):
    """(P,) x_a · x_p of pairs of positions, `numbers` numbers of gathered rows at a time."""

    @staticmethod
    def forward(ctx: Any, embeds: Tensor, pairs: Tensor, numbers: int) -> Tensor:
        ctx.save_for_backward(embeds, pairs)
        ctx.size = max(1, numbers // embeds.shape[1])
        parts = [(embeds[some[:, 0]] * embeds[some[:, 1]]).sum(1) for some in pairs.split(ctx.size)]
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        embeds, pairs = ctx.saved_tensors
        result = torch.zeros_like(embeds)
        for some, weights in zip(pairs.split(ctx.size), grad.unsqueeze(1).split(ctx.size), strict=True):
            result.index_add_(0, some[:, 0], weights * embeds[some[:, 1]])
            result.index_add_(0, some[:, 1], weights * embeds[some[:, 0]])
        return result, None, None


def joint_loss(
    note_embeds: Tensor,
    visual_embeds: Tensor | None,
    logit_scale: Tensor | float,
    has_image: Tensor,
    targets: ContrastiveTargets,
    visual_loss_weight: float,
    dims: tuple[int, ...] | None = None,
    share: tuple[int, int] = (0, 1),
    tile_size: int = TILE_SIZE,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = (L_m + α·L_v) / (1 + α) (NoteLLM-2, training objective).

    L_v is taken over the notes that have an image and the positives among them. L is L_m alone without `visual_embeds`,
    with α = 0, and where no positive has two images.

    Args:
        note_embeds: (M, D) float, L2-normalised, of n_m.
        visual_embeds: (M, D) the same of n_v, or `None` where the prompt gives none.
        logit_scale: a scalar that multiplies the cosine similarities.
        has_image: (M,) bool, which notes have an image.
        targets: what is positive and what is no negative.
        visual_loss_weight: α.
        dims: leading dimensions that are to be embeddings of their own; both losses are means over them (Kusupati et
            al., 2022, "Matryoshka representation learning", with equal weights). None: all D alone.
        share, tile_size: as in `contrastive_loss`.

    Returns:
        L, a scalar float32, and its parts, `loss_m` and, where it was taken, `loss_v`.
    """

    def nested(embeds: Tensor, targets: ContrastiveTargets) -> Tensor:
        losses = [
            contrastive_loss(leading_dimensions(embeds, dim), logit_scale, targets, share, tile_size)
            for dim in dims or (embeds.shape[1],)
        ]
        return torch.stack(losses).mean()

    loss_m = nested(note_embeds, targets)
    if visual_embeds is None or visual_loss_weight == 0:
        return loss_m, {"loss_m": loss_m}
    with_image = targets.select(has_image)
    if not len(with_image.positives):
        return loss_m, {"loss_m": loss_m}
    loss_v = nested(visual_embeds[has_image], with_image)
    loss = (loss_m + visual_loss_weight * loss_v) / (1.0 + visual_loss_weight)
    return loss, {"loss_m": loss_m, "loss_v": loss_v}


def leading_dimensions(embeds: Tensor, dim: int) -> Tensor:
    """(M, D) ─► (M, dim): the first dimensions, normalised again."""
    return embeds if dim == embeds.shape[1] else unit_length(embeds[:, :dim])


__all__ = ["ContrastiveTargets", "contrastive_loss", "joint_loss", "leading_dimensions"]
