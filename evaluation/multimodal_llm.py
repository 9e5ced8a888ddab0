"""Multimodal LLMs that others have pretrained, as embedding models of notes: what NoteLLM-2 is compared with.

    image ─► the model's own tower and connector ─► visual tokens ─┐
                                                                   ├─► its LLM ─► last state ─► head ─► L2 norm
    text ──────────────────────────────────────────────────────────┘

BLIP-2 (with OPT), Qwen2-VL, Qwen2.5-VL and Qwen3-VL, in the classes of transformers: zero-shot, as they were released,
or fine-tuned by `train/run.py` with NoteLLM-2's loss. Importing this module registers them with AutoConfig and
AutoModel.
"""

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    BatchFeature,
    Blip2Config,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from modeling_notellm2 import NoteLLM2Output, NoteLLM2PreTrainedModel, NoteLLM2Processor, NoteStates
from modeling_notellm2.configuration_notellm2 import check_head, sub_config
from modeling_notellm2.modeling_notellm2 import (
    adopt_config,
    last_token_states,
    load_backbone,
    refuse_unknown_settings,
)
from modeling_notellm2.processing_notellm2 import (
    IMAGE_EMBEDDING_TOKEN,
    IMAGE_TOKEN,
    EncodedNote,
    Language,
    PaddingSide,
    Prompt,
    Template,
    is_template_name,
    prompt_template,
)


class _Blip2:
    """BLIP-2: every image takes as many tokens as the Q-Former has queries, and stands in front of the prompt."""

    tower = "vision_model"
    connector = ("qformer.", "query_tokens", "language_projection.")

    @staticmethod
    def placeholders(config: Any) -> dict[str, Any]:
        """Settings of the processor."""
        if not config.use_decoder_only_language_model:
            raise ValueError(
                f"the language model of this BLIP-2 is {config.text_config.model_type!r}, an encoder-decoder, which "
                "has no last state of a prompt: give one with OPT, such as Salesforce/blip2-opt-2.7b."
            )
        if config.image_token_id is None:
            raise ValueError(
                "image_token_id=None in this BLIP-2's config.json, which an old release of transformers wrote: give a "
                "checkpoint with the token <image>."
            )
        return {"visual_token_id": config.image_token_id, "num_visual_tokens": config.num_query_tokens}

    @staticmethod
    def template(language: Language, template: Template) -> str:
        """Prompt of a note with an image, which BLIP-2 was trained to read first (Li et al., arXiv 2301.12597)."""
        return IMAGE_TOKEN + prompt_template("text", language, template)

    @staticmethod
    def tokens_per_image(config: Any, pixel_values: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        """(N,) int64."""
        return torch.full((len(pixel_values),), config.num_query_tokens, device=pixel_values.device)

    @staticmethod
    def visual_tokens(backbone: Any, pixel_values: Tensor, image_grid_thw: Tensor | None) -> list[Tensor]:
        """N images ─► (N, L, d_llm)."""
        weight = backbone.language_projection.weight
        states = backbone.get_qformer_features(pixel_values.to(backbone.vision_model.dtype))
        return [backbone.language_projection(states.to(weight.dtype))]

    @classmethod
    def states(
        cls,
        backbone: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None,
        image_grid_thw: Tensor | None,
    ) -> Tensor:
        """(B, T) ids ─► (B, T, d_llm) final states. `Blip2Model.forward` would compute T · vocabulary logits, too."""
        embeds = backbone.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            (visual,) = cls.visual_tokens(backbone, pixel_values, image_grid_thw)
            is_image = input_ids == backbone.config.image_token_id
            embeds = embeds.masked_scatter(is_image.unsqueeze(-1), visual.to(embeds.dtype))
        llm = backbone.language_model.base_model
        output = llm(inputs_embeds=embeds, attention_mask=attention_mask, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states

    @staticmethod
    def blank_image(config: Any) -> dict[str, Tensor]:
        """The inputs of one image that shows nothing."""
        vision = config.vision_config
        return {"pixel_values": torch.zeros(1, 3, vision.image_size, vision.image_size)}


class _QwenVL:
    """Qwen-VL: an image keeps its proportions, and takes a token for every `spatial_merge_size`² of its patches."""

    tower = "visual"
    connector = ("visual.merger.", "visual.deepstack_merger_list.")

    @staticmethod
    def placeholders(config: Any) -> dict[str, Any]:
        """Settings of the processor."""
        return {
            "visual_token_id": config.image_token_id,
            "visual_start_id": config.vision_start_token_id,
            "visual_end_id": config.vision_end_token_id,
            "num_visual_tokens": 1,
        }

    @staticmethod
    def template(language: Language, template: Template) -> str:
        """Prompt of a note with an image, which may stand anywhere."""
        return prompt_template("basic", language, template)

    @staticmethod
    def tokens_per_image(config: Any, pixel_values: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        """(N,) int64."""
        assert image_grid_thw is not None
        return image_grid_thw.prod(-1) // config.vision_config.spatial_merge_size**2

    @staticmethod
    def visual_tokens(backbone: Any, pixel_values: Tensor, image_grid_thw: Tensor | None) -> list[Tensor]:
        """N images ─► (L, d_llm) of all of them, and as many for each layer of the LLM that gets some (Qwen3-VL)."""
        output = backbone.get_image_features(pixel_values, image_grid_thw, return_dict=True)
        layers = getattr(output, "deepstack_features", None) or []
        return [torch.cat(list(tokens)) for tokens in (output.pooler_output, *layers)]

    @staticmethod
    def states(
        backbone: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None,
        image_grid_thw: Tensor | None,
    ) -> Tensor:
        """(B, T) ids ─► (B, T, d_llm) final states."""
        # Named here, as the model's own rule leaves padding out of the count only where the batch has an image.
        position_ids, _deltas = backbone.get_rope_index(
            input_ids,
            mm_token_type_ids=(input_ids == backbone.config.image_token_id).int(),
            image_grid_thw=image_grid_thw,
            attention_mask=attention_mask,
        )  # (3, B, T): time, row, column
        output = backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            use_cache=False,
        )
        states: Tensor = output.last_hidden_state
        return states

    @staticmethod
    def blank_image(config: Any) -> dict[str, Tensor]:
        """The inputs of the smallest image, which shows nothing."""
        vision = config.vision_config
        side = vision.spatial_merge_size
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {"pixel_values": torch.zeros(side * side, width), "image_grid_thw": torch.tensor([[1, side, side]])}


_Family = type[_Blip2] | type[_QwenVL]
_FAMILIES: dict[type[PreTrainedConfig], _Family] = {
    Blip2Config: _Blip2,
    Qwen2VLConfig: _QwenVL,
    Qwen2_5_VLConfig: _QwenVL,
    Qwen3VLConfig: _QwenVL,
}


def _family_of(config: PreTrainedConfig) -> _Family:
    if type(config) not in _FAMILIES:
        known = sorted(kind.model_type for kind in _FAMILIES)
        raise ValueError(
            f"a model of type {config.model_type!r} is none of {known}: give one of these, or join an LLM and a vision "
            "tower with NoteLLM2Model.from_backbones."
        )
    return _FAMILIES[type(config)]


class MultimodalLLMConfig(PreTrainedConfig):
    """Settings of a [`MultimodalLLM`].

    Args:
        backbone_config: configuration of the multimodal LLM, as a config or a dictionary with `model_type`. Default: a
            Qwen2-VL configuration.
        embedding_dim: width of the note embedding; `None` keeps the LLM's width and adds no head.
        initial_temperature, learnable_temperature, standardize_states, lora, initializer_range: as in
            `NoteLLM2Config`.
        freeze_vision_tower: keep the vision tower fixed. What follows it (the Q-Former, the patch merger) is the
            connector, and trains.

    Raises:
        ValueError: a setting is outside its range; the multimodal LLM is of no known kind.
    """

    model_type = "notellm2_multimodal_llm"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
        embedding_dim: int | None = None,
        initial_temperature: float = 0.05,
        learnable_temperature: bool = True,
        freeze_vision_tower: bool = True,
        standardize_states: bool = False,
        lora: dict[str, Any] | None = None,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        check_head(embedding_dim, initial_temperature)
        self.backbone_config = sub_config(
            backbone_config if backbone_config is not None else {"model_type": Qwen2VLConfig.model_type}
        )
        _family_of(self.backbone_config).placeholders(self.backbone_config)
        self.embedding_dim = embedding_dim
        self.initial_temperature = initial_temperature
        self.learnable_temperature = learnable_temperature
        self.freeze_vision_tower = freeze_vision_tower
        self.standardize_states = standardize_states
        self.lora = lora
        self.initializer_range = initializer_range
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the LLM."""
        return int(self.backbone_config.text_config.hidden_size)

    @property
    def vision_config(self) -> PreTrainedConfig:
        """The vision tower's configuration."""
        return self.backbone_config.vision_config

    @property
    def has_vision(self) -> bool:
        """True: every multimodal LLM reads images."""
        return True


class MultimodalLLMProcessor(NoteLLM2Processor):
    """Notes ─► the inputs of [`MultimodalLLM`]: NoteLLM-2's basic prompt, with the model's own image tokens.

    An image that the template begins with comes before the begin-of-sequence token, too, where transformers'
    `Blip2Processor` puts it.

    Args:
        image_processor, tokenizer: the multimodal LLM's.
        visual_token_id: the token that visual tokens replace.
        visual_start_id, visual_end_id: what stands around them; `None`: nothing.
        num_visual_tokens: visual tokens an image, where its size does not decide that.
        prompt: `"basic"`: mICL reads a state that only NoteLLM-2 has, and an image has no other way in than the prompt.
        kwargs: the other settings of `NoteLLM2Processor`.

    Raises:
        ValueError: as `NoteLLM2Processor`; a prompt with `<IMG_EMB>`, or without `<IMG>`.
    """

    settings = (*NoteLLM2Processor.settings, "visual_token_id", "visual_start_id", "visual_end_id")
    _auto_class = None  # this file needs the rest of the repository, so that no checkpoint can carry it

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        visual_token_id: int | None = None,
        visual_start_id: int | None = None,
        visual_end_id: int | None = None,
        prompt: Prompt = "basic",
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, prompt=prompt, **kwargs)
        if (
            prompt != "basic"
            or IMAGE_TOKEN not in self.template
            or IMAGE_EMBEDDING_TOKEN in self.template + self.text_template
        ):
            raise ValueError(
                f"prompt={prompt!r}, template={self.template!r}: a multimodal LLM's has {IMAGE_TOKEN} and no "
                f"{IMAGE_EMBEDDING_TOKEN}; use prompt='basic'."
            )
        if visual_token_id is None:
            raise ValueError("visual_token_id=None: give the id of the token that stands for a piece of an image.")
        self.visual_token_id = visual_token_id
        self.visual_start_id = visual_start_id
        self.visual_end_id = visual_end_id

    @classmethod
    def from_backbone(
        cls, backbone: str | os.PathLike, max_image_pixels: int | None = None, **settings: Any
    ) -> "MultimodalLLMProcessor":
        """Take the tokenizer and the image processor of a multimodal LLM (a local folder or Hub id).

        Args:
            backbone: the multimodal LLM.
            max_image_pixels: scale larger images down to about so many pixels; Qwen-VL makes a token of 28² of them
                (Qwen3-VL: of 32²), and by default of up to millions. `None`: the model's own bound.
            settings: of `__init__`. A template that is named has the image where the kind of model was trained with it:
                BLIP-2 in front of the text, Qwen-VL anywhere in it.

        Raises:
            ValueError: the model's images have one size; a bound below that of the smallest image.
        """
        config = AutoConfig.from_pretrained(backbone)
        family = _family_of(config)
        template = settings.get("template", "paper")
        if is_template_name(template):
            words = family.template(settings.get("language", "en"), template)
            settings = {"text_template": template, **settings, "template": words}
        processor = cls.from_backbones(backbone, backbone, **{**family.placeholders(config), **settings})
        if max_image_pixels is not None:
            size = dict(processor.image_processor.size)
            if not size.get("longest_edge") or not size.get("shortest_edge"):
                raise ValueError(
                    f"max_image_pixels={max_image_pixels}: all images of {config.model_type!r} have one size, {size}; "
                    "leave it unset."
                )
            least = (config.vision_config.patch_size * config.vision_config.spatial_merge_size) ** 2
            if max_image_pixels < least:
                raise ValueError(f"max_image_pixels={max_image_pixels}: one visual token takes {least} pixels.")
            # These two "edges" are numbers of pixels, by the names of transformers.
            shortest = min(size["shortest_edge"], max_image_pixels)
            processor.image_processor.size = {"shortest_edge": shortest, "longest_edge": max_image_pixels}
        return processor

    def collate(
        self, notes: Sequence[EncodedNote], padding_side: PaddingSide | None = None, decode_images: bool = True
    ) -> BatchFeature:
        """As `NoteLLM2Processor.collate`.

        Raises:
            ValueError: `decode_images=False`: a prompt is as long as its image has tokens.
        """
        if not decode_images:
            raise ValueError("a multimodal LLM takes pixels, not features of a tower: leave vision_features out.")
        return super().collate(notes, padding_side)

    def token_ids(self, note: EncodedNote) -> list[int]:
        """A note's prompt with the model's own tokens in place of `<IMG>`; needs the image of a note that has one."""
        if note.pixels is None:
            return note.input_ids
        visual = [self.visual_token_id]
        if "image_grid_thw" in note.pixels:
            visual *= int(note.pixels["image_grid_thw"].prod()) // self.image_processor.merge_size**2
        image = [token for token in (self.visual_start_id, *visual, self.visual_end_id) if token is not None]
        pieces = [image if token == self.image_token_id else [token] for token in note.input_ids]
        if self.template.startswith(IMAGE_TOKEN):
            pieces.sort(key=lambda piece: piece is not image)  # in front of the begin-of-sequence token
        return [token for piece in pieces for token in piece]


class MultimodalLLM(NoteLLM2PreTrainedModel):
    """A note's text and image ─► one embedding, by a pretrained multimodal LLM.

    Has what the trainer and the evaluation ask of a `NoteLLM2Model`, without mICL and late fusion.

    Args:
        config: everything structural; building a model never touches the network.
    """

    config_class = MultimodalLLMConfig
    base_model_prefix = "multimodal_llm"
    processor_class = MultimodalLLMProcessor

    def __init__(self, config: MultimodalLLMConfig) -> None:
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config)
        self.vision_tower = None  # its output is of no fixed size, and is not kept
        self.late_fusion = None
        self._family = _family_of(config.backbone_config)
        self.parts = {
            "connector": tuple(f"backbone.{name}" for name in self._family.connector),
            "head": ("head.", "logit_scale"),
            "llm": ("backbone.",),
        }
        for name, parameter in self.backbone.named_parameters():
            is_tower = name.startswith(f"{self._family.tower}.") and not name.startswith(self._family.connector)
            if is_tower and config.freeze_vision_tower:
                parameter.requires_grad_(False)
        output = self.backbone.get_output_embeddings()  # BLIP-2's; no word is predicted here
        if output is not None and not config.backbone_config.text_config.tie_word_embeddings:
            output.requires_grad_(False)
        self._complete()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike,
        *,
        processor: MultimodalLLMProcessor | None = None,
        max_image_pixels: int | None = None,
        dtype: torch.dtype = torch.float32,
        **config: Any,
    ) -> "MultimodalLLM":
        """Load a pretrained multimodal LLM. Without `embedding_dim` it is as it was released: zero-shot.

        Args:
            backbone: local folder or Hub id.
            processor: the processor to use; by default `MultimodalLLMProcessor.from_backbone` makes one.
            max_image_pixels: bound of the images' size, for that default.
            dtype: dtype of all weights.
            config: settings of [`MultimodalLLMConfig`].

        Raises:
            ValueError: a setting that `MultimodalLLMConfig` does not know; a model of no known kind, or BLIP-2 with T5;
                the folder lacks weights its configuration asks for.
        """
        refuse_unknown_settings(MultimodalLLMConfig, config)
        backbone_config = AutoConfig.from_pretrained(backbone)
        whole_config = MultimodalLLMConfig(backbone_config, **config)
        if processor is None:
            processor = MultimodalLLMProcessor.from_backbone(backbone, max_image_pixels)
        adopt_config(backbone_config, dtype)
        model = cls._from_config(whole_config, dtype=dtype)
        load_backbone(model.backbone, backbone, backbone_config, dtype)
        model._processor = processor
        return model.eval()

    @property
    def language_model(self) -> PreTrainedModel:  # type: ignore[override]  # an attribute of NoteLLM2Model
        """The LLM, without what predicts words."""
        llm: PreTrainedModel = self.backbone.language_model.base_model
        return llm

    def train(self, mode: bool = True) -> "MultimodalLLM":
        """A frozen tower stays in evaluation mode."""
        super().train(mode)
        if self.config.freeze_vision_tower:
            self.backbone.get_submodule(self._family.tower).eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        has_image: Tensor | None = None,
    ) -> NoteLLM2Output:
        """Embed B notes, N of which have an image.

        Args:
            input_ids: (B, T) int64, with the model's placeholders in each row that has an image.
            attention_mask: (B, T), 1 for real tokens; padding may be on either side.
            pixel_values: the images of the notes that have one, in order: (N, C, H, W) for BLIP-2, (P, C·t·p·p) for the
                P patches of all images for Qwen-VL.
            image_grid_thw: (N, 3) int64, Qwen-VL alone: frames, rows and columns of patches of each image.
            has_image: (B,) bool, which notes the N images belong to. Default: all.

        Returns:
            `note_embeds` (B, D) float32, L2-normalised, and `logit_scale`.

        Raises:
            ValueError: the placeholders, the images and `has_image` do not agree.
        """
        states = self.get_states(
            input_ids, attention_mask, pixel_values=pixel_values, image_grid_thw=image_grid_thw, has_image=has_image
        )
        return self.embed_states(states)

    def get_states(  # type: ignore[override]  # images are other tensors in each kind of model
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        has_image: Tensor | None = None,
    ) -> NoteStates:
        """Run the multimodal LLM and read n_m, the final state of each prompt's last token. Arguments and errors of
        `forward`."""
        if has_image is None:
            has_image = torch.full(input_ids.shape[:1], pixel_values is not None, device=input_ids.device)
        self._check_placeholders(input_ids, pixel_values, image_grid_thw, has_image)
        states = self._family.states(self.backbone, input_ids, attention_mask, pixel_values, image_grid_thw)
        note_states = last_token_states(states, attention_mask)
        if pixel_values is None and self._takes_part():
            blank = {name: value.to(self.device) for name, value in self._family.blank_image(self._kind).items()}
            tokens = self._family.visual_tokens(
                self.backbone, blank["pixel_values"].to(self.dtype), blank.get("image_grid_thw")
            )
            note_states = note_states + 0.0 * torch.stack([layer.sum() for layer in tokens]).sum().to(note_states.dtype)
        return NoteStates(note_states, None, torch.zeros_like(has_image), None, has_image)

    def embed_states(self, states: NoteStates) -> NoteLLM2Output:
        """Standardization, head and normalisation: all that comes after the LLM."""
        note_states = states.note_states
        if self.note_standardizer is not None:
            note_states = self.note_standardizer(note_states)
        return NoteLLM2Output(note_embeds=self._to_embeds(note_states), logit_scale=self._scale())

    @property
    def _kind(self) -> PreTrainedConfig:
        return self.config.backbone_config

    def _check_placeholders(
        self, input_ids: Tensor, pixel_values: Tensor | None, image_grid_thw: Tensor | None, has_image: Tensor
    ) -> None:
        counts = torch.zeros(0, dtype=torch.int64, device=input_ids.device)
        if pixel_values is not None:
            counts = self._family.tokens_per_image(self._kind, pixel_values, image_grid_thw)
        if len(counts) != int(has_image.sum()):
            raise ValueError(f"{len(counts)} images were given for {int(has_image.sum())} notes with has_image=True.")
        expected = torch.zeros_like(input_ids[:, 0]).masked_scatter(has_image, counts)
        found = (input_ids == self._kind.image_token_id).sum(-1)
        if not torch.equal(found, expected):
            row = int((found != expected).nonzero()[0])
            raise ValueError(
                f"note {row} of the batch has {int(found[row])} placeholders, but its image gives {int(expected[row])} "
                "visual tokens: build inputs with the model's own processor."
            )


AutoConfig.register(MultimodalLLMConfig.model_type, MultimodalLLMConfig)
AutoModel.register(MultimodalLLMConfig, MultimodalLLM)

__all__ = ["MultimodalLLM", "MultimodalLLMConfig", "MultimodalLLMProcessor"]
