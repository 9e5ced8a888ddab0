"""Any vision tower of `transformers`, reduced to patch tokens and one pooled vector.

What kind of output a tower has is read from its output and its configuration (feature map or token sequence, patch
size, prefix tokens), never from the spelling of its name.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.configuration_utils import PreTrainedConfig

PROCESSOR_IMAGES = 4
"""Images that go through a frozen tower at a time on a processor: their feature maps then stay in its caches."""


class VisionFeatures(NamedTuple):
    """What the rest of the model reads from N images.

    Attributes:
        patch_embeds: (N, P, d_v), the patches in raster order, without class or register tokens.
        pooled_embeds: (N, d_v), one vector an image: the class token, else the tower's own pooling, else the mean
            patch.
        patch_attention_mask: (N, P) bool, True where a patch is real; `None` when all are.
    """

    patch_embeds: Tensor
    pooled_embeds: Tensor
    patch_attention_mask: Tensor | None = None


class VisionTower(nn.Module):
    """A vision encoder behind one interface; frozen unless told otherwise.

    Args:
        config: the encoder's configuration.
        freeze: keep weights and batch statistics fixed and build no gradient (NoteLLM-2: "the visual encoder is
            frozen").
    """

    def __init__(self, config: PreTrainedConfig, freeze: bool = True) -> None:
        super().__init__()
        self.freeze = freeze
        self.model = AutoModel.from_config(config)
        self.model.requires_grad_(not freeze)
        self.train(self.training)

    def train(self, mode: bool = True) -> "VisionTower":
        """A frozen tower stays in evaluation mode: batch norm would otherwise drift, and dropout add noise."""
        return super().train(mode and not self.freeze)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
    ) -> VisionFeatures:
        """Encode N images.

        Args:
            pixel_values: (N, C, H, W), or (N, P, C·p·p) for towers of variable resolution (SigLIP2 NaFlex).
            pixel_attention_mask: (N, P), 1 where a patch is real; variable resolution only.
            spatial_shapes: (N, 2), rows and columns of patches; variable resolution only.
        """
        inputs: dict[str, Tensor] = {"pixel_values": pixel_values.to(dtype=self.model.dtype)}
        if pixel_attention_mask is not None and spatial_shapes is not None:
            inputs |= {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            if not self.freeze or pixel_values.device.type != "cpu" or torch.compiler.is_compiling():
                return self._encode(**inputs)
            parts = zip(*(value.split(PROCESSOR_IMAGES) for value in inputs.values()), strict=True)
            outputs = [self._encode(**dict(zip(inputs, part, strict=True))) for part in parts]
        masks = [output.patch_attention_mask for output in outputs if output.patch_attention_mask is not None]
        return VisionFeatures(
            torch.cat([output.patch_embeds for output in outputs]),
            torch.cat([output.pooled_embeds for output in outputs]),
            torch.cat(masks) if masks else None,
        )

    def _encode(self, pixel_values: Tensor, **inputs: Tensor) -> VisionFeatures:
        output = self.model(pixel_values=pixel_values, **inputs)
        return self._reduce(output, pixel_values, inputs.get("pixel_attention_mask"))

    def _reduce(self, output: object, pixel_values: Tensor, pixel_attention_mask: Tensor | None) -> VisionFeatures:
        states: Tensor = output.last_hidden_state  # type: ignore[attr-defined]
        pooler: Tensor | None = getattr(output, "pooler_output", None)
        timm_model = getattr(self.model, "timm_model", None)
        if states.dim() == 4:  # a feature map: ConvNeXt, EfficientNet, ResNet
            channels_last = str(getattr(timm_model, "output_fmt", "NCHW")) == "NHWC"
            patches = states.flatten(1, 2) if channels_last else states.flatten(2).transpose(1, 2)  # (N, P, d_v)
            # Some heads widen the pooled vector; only one of the patches' width is the same kind of feature.
            if pooler is None or pooler.flatten(1).shape[-1] != patches.shape[-1]:
                return VisionFeatures(patches, patches.mean(1))
            return VisionFeatures(patches, pooler.flatten(1))
        if pixel_attention_mask is not None:
            mask = pixel_attention_mask.bool()
            if pooler is None:
                weights = mask.unsqueeze(-1).to(states.dtype)
                pooler = (states * weights).sum(1) / weights.sum(1)
            return VisionFeatures(states, pooler, mask)
        if timm_model is not None:
            # timm's transformers count their prefix tokens; whether one is a class token their own pooling knows.
            num_prefix, has_class_token = int(getattr(timm_model, "num_prefix_tokens", 0)), False
        else:
            num_prefix = max(0, states.shape[1] - self._num_patches(pixel_values))
            has_class_token = num_prefix > 0  # the class token comes first, registers (DINOv2) after it
        patches = states[:, num_prefix:]
        if has_class_token:
            return VisionFeatures(patches, states[:, 0])
        return VisionFeatures(patches, pooler if pooler is not None else patches.mean(1))

    def _num_patches(self, pixel_values: Tensor) -> int:
        patch_size = self.model.config.patch_size
        rows, columns = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        return int(pixel_values.shape[-2] // rows) * int(pixel_values.shape[-1] // columns)


__all__ = ["VisionFeatures", "VisionTower"]
