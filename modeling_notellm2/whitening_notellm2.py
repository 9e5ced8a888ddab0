"""Whitening: what a pretrained backbone says of all notes alike is taken out before anything new is trained.

The last hidden states of an LLM point nearly the same way for every note (mean cosine 0.99 for SmolLM2 on real notes),
and vary along a few directions much more than along all others; so do the pooled features of a CNN. Cosines then hardly
differ, the contrastive loss sits on the plateau log(2N − 1), and a short training never leaves it. Whitening sentence
representations is Su et al. (arXiv 2103.15316); NoteLLM-2 does not do it: see docs/LOG.md for what it changes.
"""

import torch
from torch import Tensor, nn

SHRINKAGE = 0.3
"""Weight of the identity in the estimated correlations (as Ledoit and Wolf shrink them): directions in which a sample
of notes hardly varies are not blown up, nor the LLM's rounding in them."""


class Whitener(nn.Module):
    """(x − mean) · matrix, with statistics measured once over a sample of notes, never over a batch.

    The embedding of a note therefore does not depend on its neighbours, in training either. Until `fit` is called it
    changes nothing.

    Args:
        width: dimensions of x.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("matrix", torch.eye(width))
        self.mean: Tensor
        self.matrix: Tensor

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Change nothing."""
        nn.init.zeros_(self.mean)
        nn.init.eye_(self.matrix)

    @torch.no_grad()
    def fit(self, states: Tensor) -> None:
        """Take the statistics of (N, d) states.

        matrix = D · R^(−1/2), with D = 1 / standard deviation and R the shrunk correlations (ZCA-cor whitening): the
        result has uncorrelated dimensions of variance one, and stays as near the standardised states as it can.
        """
        states = states.double()
        std = states.std(0, correction=0)
        varies = std > 1e-6 * states.abs().amax(0)  # a constant dimension is only centred
        scale = torch.where(varies, 1.0 / std, torch.ones_like(std))
        centred = (states - states.mean(0)) * scale
        correlations = (1 - SHRINKAGE) * centred.T @ centred / len(states)
        correlations.diagonal().add_(SHRINKAGE)
        values, vectors = torch.linalg.eigh(correlations)
        root = vectors * values.rsqrt() @ vectors.T
        self.mean.copy_(states.mean(0))
        self.matrix.copy_(scale.unsqueeze(1) * root)

    def forward(self, states: Tensor) -> Tensor:
        """(N, d) ─► (N, d) of the same dtype. In float32 at least: what notes differ by is small beside the mean."""
        white = (states.float() - self.mean.float()) @ self.matrix.float()
        return white.to(states.dtype)


__all__ = ["Whitener"]
