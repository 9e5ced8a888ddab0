"""Standardisation: what a pretrained backbone says of all notes alike is taken out before anything new is trained.

The last hidden states of an LLM point nearly the same way for every note (mean cosine 0.99 for SmolLM2 on real notes),
and so do the pooled features of a CNN. Cosine similarities then hardly differ, the contrastive loss sits on the plateau
log(2N − 1), and a short training never leaves it. Not in the paper: see docs/LOG.md.
"""

import torch
from torch import Tensor, nn


class Standardizer(nn.Module):
    """(x − mean) / std, with statistics measured once over notes, never over a batch.

    The embedding of a note therefore does not depend on its neighbours, in training either. Until `fit` is called it
    changes nothing.

    Args:
        width: dimensions of x.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.mean: Tensor
        self.std: Tensor

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Change nothing."""
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.std)

    @torch.no_grad()
    def fit(self, states: Tensor) -> None:
        """Take mean and standard deviation of (N, d) states; a dimension that never varies is only centred."""
        std = states.float().std(0, correction=0)
        self.mean.copy_(states.float().mean(0))
        self.std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def forward(self, states: Tensor) -> Tensor:
        """(N, d) ─► (N, d)."""
        return (states - self.mean.to(states.dtype)) / self.std.to(states.dtype)


__all__ = ["Standardizer"]
