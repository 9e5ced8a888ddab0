"""Connectors: patch tokens of the vision tower ─► visual tokens in the LLM's embedding space.

Randomly initialised, as in the paper: NoteLLM-2 needs no multimodal pre-training.
"""

import torch
from torch import Tensor, nn
from transformers import AutoModel

from .configuration_notellm2 import NoteLLM2Config
from .vision_notellm2 import VisionFeatures


class Projector(nn.Sequential):
    """Linear, GELU, Linear into the LLM's width (the "mlp2x_gelu" of LLaVA)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features))


class QFormerConnector(nn.Module):
    """Learned queries read the patches through BLIP-2's Q-Former; a projector takes them into the LLM's width.

    The queries start as small random vectors. Zeros, BLIP-2's default for a pre-trained Q-Former, would make all visual
    tokens of an image identical until dropout happens to separate them.
    """

    def __init__(self, config: NoteLLM2Config) -> None:
        super().__init__()
        width = config.qformer_config.hidden_size
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_visual_tokens, width))
        nn.init.normal_(self.query_tokens, std=config.initializer_range)
        self.qformer = AutoModel.from_config(config.qformer_config)
        self.projector = Projector(width, config.hidden_size)

    def forward(self, features: VisionFeatures) -> Tensor:
        """(N, P, d_v) patch tokens ─► (N, num_visual_tokens, d_llm)."""
        mask = features.patch_attention_mask
        states = self.qformer(
            query_embeds=self.query_tokens.expand(features.patch_embeds.shape[0], -1, -1),
            encoder_hidden_states=features.patch_embeds,
            encoder_attention_mask=None if mask is None else mask.long(),
        ).last_hidden_state
        return self.projector(states)


class MLPConnector(nn.Module):
    """Patches averaged in raster order to `num_visual_tokens`, then projected (LLaVA's connector, shortened)."""

    def __init__(self, config: NoteLLM2Config) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool1d(config.num_visual_tokens)
        self.projector = Projector(config.vision_hidden_size, config.hidden_size)

    def forward(self, features: VisionFeatures) -> Tensor:
        """(N, P, d_v) patch tokens ─► (N, num_visual_tokens, d_llm).

        Raises:
            ValueError: the tower gives a varying number of patches, which an average in raster order would mix up.
        """
        if features.patch_attention_mask is not None:
            raise ValueError('connector="mlp" needs a tower with a fixed number of patches: use connector="qformer".')
        patches = features.patch_embeds.transpose(1, 2)  # (N, d_v, P)
        return self.projector(self.pool(patches).transpose(1, 2))


def build_connector(config: NoteLLM2Config) -> nn.Module | None:
    """The connector that `config.connector` names; `None` when no visual tokens enter the LLM."""
    if not config.has_vision or config.connector is None:
        return None
    return {"qformer": QFormerConnector, "mlp": MLPConnector}[config.connector](config)


__all__ = ["MLPConnector", "Projector", "QFormerConnector", "build_connector"]
