"""Late fusion: the frozen visual embedding joins the LLM's representation directly (NoteLLM-2, late fusion).

    v = W_v · pooled                       the frozen tower's vector, linearly projected
    w = σ(MLP([v; n_v]))   or   σ(W [v; n_v] + b)
    fused = w · v + (1 − w) · n

The paper describes a scalar w; its code uses one weight a dimension. Without the mICL prompt n_m stands in for n_v.
"""

import math

import torch
from torch import Tensor, nn

from .configuration_notellm2 import NoteLLM2Config

SHORTEST = 1e-12
"""Vectors that are shorter have no direction."""


def unit_length(vectors: Tensor) -> Tensor:
    """(…, d) float ─► (…, d) float32 (float64 of float64) of length 1; a vector without a direction becomes zero, and
    gets no gradient.

    `functional.normalize` gives such a vector a gradient of 10^12, which clipping would make the only one, and NaN in
    float16, where its epsilon is zero.
    """
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    lengths = vectors.norm(dim=-1, keepdim=True)
    is_zero = lengths < SHORTEST
    return (vectors / lengths.masked_fill(is_zero, 1.0)).masked_fill(is_zero, 0.0)


class GateOutput(nn.Linear):
    """The gate's last layer: it knows where the gate starts.

    A module of its own because transformers initialises remote code module by module, and only modules that hold
    weights.

    Args:
        in_features: width of its input.
        out_features: weights a note has.
        initial_weight: weight of the image before training.
    """

    def __init__(self, in_features: int, out_features: int, initial_weight: float) -> None:
        self.initial_bias = math.log(initial_weight / (1.0 - initial_weight))
        super().__init__(in_features, out_features)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Let the gate start at the initial weight.

        The scalar gate starts with zero weights, so that every note starts exactly there; the vector gate keeps the
        Xavier-normal matrix of the paper's code and starts there on average.
        """
        if self.out_features == 1:
            nn.init.zeros_(self.weight)
        else:
            nn.init.xavier_normal_(self.weight)
        nn.init.constant_(self.bias, self.initial_bias)


class LateFusion(nn.Module):
    """The projection of the visual embedding and the gate, shared by n_m and n_v.

    Both sides are brought to one norm first (`late_fusion_normalize`): otherwise the weight says little about how much
    of the image is in the result. The norm is √d, which keeps the gate's inputs near one.
    """

    def __init__(self, config: NoteLLM2Config) -> None:
        super().__init__()
        width, initial_weight = config.hidden_size, config.late_fusion_initial_weight
        self.normalize = config.late_fusion_normalize
        self.projection = nn.Linear(config.vision_hidden_size, width, bias=False)
        self.gate: nn.Module
        if config.late_fusion == "scalar":
            hidden = config.late_fusion_hidden_size
            output = GateOutput(hidden, 1, initial_weight)
            self.gate = nn.Sequential(nn.Linear(2 * width, hidden), nn.GELU(), output)
        else:
            self.gate = GateOutput(2 * width, width, initial_weight)

    def project(self, pooled_embeds: Tensor) -> Tensor:
        """(N, d_v) pooled visual embeddings ─► (N, d_llm)."""
        return self._scale(self.projection(pooled_embeds.to(self.projection.weight.dtype)))

    def weight(self, visual: Tensor, states: Tensor) -> Tensor:
        """Weight of the image: (N, 1) for the scalar gate, (N, d_llm) for the vector gate, in (0, 1).

        Args:
            visual: (N, d_llm), from `project`.
            states: (N, d_llm), n_v, or n_m where the prompt has no `<IMG_EMB>`.
        """
        return torch.sigmoid(self.gate(torch.cat([visual, self._scale(states)], dim=-1)))

    def fuse(self, weight: Tensor, visual: Tensor, states: Tensor) -> Tensor:
        """w · v + (1 − w) · n, (N, d_llm)."""
        return weight * visual + (1.0 - weight) * self._scale(states)

    def _scale(self, states: Tensor) -> Tensor:
        if not self.normalize:
            return states
        return (unit_length(states) * math.sqrt(states.shape[-1])).to(states.dtype)


__all__ = ["GateOutput", "LateFusion", "unit_length"]
