"""Configuration of NoteLLM-2: every structural choice of the model, and nothing about how it is trained.

A checkpoint describes itself: `from_pretrained` needs no argument beyond the folder, and every ablation of the paper
(text-only LLM, late fusion only, basic, mICL, both gates) is a setting here, never another class.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from transformers import AutoConfig, Blip2QFormerConfig
from transformers.utils.versions import require_version

# Said here, before the first name that 4.57 lacks: releases in between load, and leave a CLIP tower at random.
require_version("transformers>=5.6", 'Older ones cannot read this model: pip install "transformers>=5.6".')

from transformers.configuration_utils import PreTrainedConfig  # noqa: E402

Connector = Literal["qformer", "mlp"]
LateFusion = Literal["scalar", "vector"]

MAX_VISUAL_TOKENS = 16_384
MAX_WIDTH = 1 << 20
# Far above any model that there is: beyond these the memory goes to building layers, before a weight is read. What a
# number sizes is told by its name; one of another name (`rope_theta`, `model_max_length`, a seed) sizes nothing.
_BOUNDS: tuple[tuple[re.Pattern[str], int], ...] = (
    (re.compile(r"layers|n_layer|num_blocks|depth"), 1 << 10),
    (re.compile(r"vocab|max_position|n_positions"), 1 << 24),
    (
        re.compile(
            r"(hidden|image|patch|kernel|state|input)_sizes?|embed|n_embd|n_inner|intermediate|head|ffn|expert|rank|^r$|"
            r"channels|num_features|num_quer|patches|num_(\w+_)?tokens$|dims?$|^d_\w+$|^width$"
        ),
        MAX_WIDTH,
    ),
)
# Settings by which transformers, timm and peft import a module, or read weights that are not the checkpoint's.
_REACHING = frozenset({"checkpoint_path", "megatron_config", "megatron_core", "pretrained", "use_pretrained_backbone"})
_IMPLEMENTATIONS = tuple(f"{mark}{of}_implementation" for mark in ("", "_") for of in ("attn", "experts"))


class NoteLLM2Config(PreTrainedConfig):
    """Settings of a [`NoteLLM2Model`].

    Args:
        text_config: configuration of the decoder LLM (any that `AutoModel` builds), as a config or a dictionary with
            `model_type`. Default: a Llama configuration.
        vision_config: configuration of the vision tower, likewise. `None` makes a text-only model.
        connector: what turns patch tokens into visual tokens of the LLM: `"qformer"` (BLIP-2's Q-Former, randomly
            initialised, and a two-layer projector), `"mlp"` (patches averaged to `num_visual_tokens`, then a two-layer
            projector) or `None` (no visual tokens: the image enters through late fusion alone).
        qformer_config: configuration of the Q-Former. Its `encoder_hidden_size` is always the tower's width. The
            default is the paper's code: 6 layers of width 768.
        num_visual_tokens: visual tokens an image is turned into (L_c in the paper).
        image_token_id: id of `<IMG>`, the placeholder that visual tokens replace.
        image_embedding_token_id: id of `<IMG_EMB>`, which ends the visual half of the mICL prompt.
        standardize_states: move and scale the LLM's final states before anything reads them: minus their mean over
            training notes, divided by their deviation from it, one number for all dimensions. A pretrained LLM gives
            any two notes states of cosine 0.94 or more, so that what differs is a small part of what the head sees;
            `False` is the paper. Late fusion reads the tower's vectors so, too. The warm-up of training measures all
            of them, and the checkpoint keeps them. As embeddings differ more then, `initial_temperature` should be
            higher: 0.3.
        late_fusion: `"scalar"` (NoteLLM-2, late fusion: an MLP predicts one weight a note), `"vector"` (the paper's
            code: one weight a dimension) or `None`.
        late_fusion_initial_weight: weight of the image before training, in (0, 1).
        late_fusion_normalize: bring both sides of the gate to one norm before they are mixed. An LLM's hidden state and
            a projected image feature differ by orders of magnitude; `False` is the paper's code.
        late_fusion_hidden_size: width of the scalar gate's MLP.
        embedding_dim: width of the note embedding (64 in the paper); `None` keeps the LLM's width and adds no head.
        initial_temperature: softmax temperature of the contrastive loss before training, from 0.01 to 100. The model
            keeps it as `logit_scale` = log(1 / temperature), so that it survives saving and resuming.
        learnable_temperature: whether `logit_scale` trains.
        freeze_vision_tower: keep the tower's weights and its batch statistics fixed, and build no gradient through it.
        lora: arguments of `peft.LoraConfig` for the LLM (for instance `{"r": 16, "target_modules": "all-linear"}`);
            the adapters are part of the model and of its checkpoint. `None`: no adapters.
        initializer_range: standard deviation of new weights, query tokens included.

    Raises:
        ValueError: a setting is outside its range, or contradicts another one; a backbone's configuration would run
            code or read what is not the checkpoint's, or a number is beyond all models (`refuse_outside`).

    Example:
        >>> config = NoteLLM2Config(late_fusion="scalar", late_fusion_initial_weight=0.1)
        >>> config.text_config.model_type, config.vision_config, config.initial_temperature
        ('llama', None, 0.05)
    """

    model_type = "notellm2"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig, "qformer_config": Blip2QFormerConfig}

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        connector: Connector | None = "qformer",
        qformer_config: Blip2QFormerConfig | dict[str, Any] | None = None,
        num_visual_tokens: int = 16,
        image_token_id: int | None = None,
        image_embedding_token_id: int | None = None,
        standardize_states: bool = False,
        late_fusion: LateFusion | None = "scalar",
        late_fusion_initial_weight: float = 0.1,
        late_fusion_normalize: bool = True,
        late_fusion_hidden_size: int = 128,
        embedding_dim: int | None = 64,
        initial_temperature: float = 0.05,
        learnable_temperature: bool = True,
        freeze_vision_tower: bool = True,
        lora: dict[str, Any] | None = None,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        if connector is not None and connector not in get_args(Connector):
            raise ValueError(f"connector={connector!r} is unknown: choose one of {get_args(Connector)} or None.")
        if late_fusion is not None and late_fusion not in get_args(LateFusion):
            raise ValueError(f"late_fusion={late_fusion!r} is unknown: choose one of {get_args(LateFusion)} or None.")
        if not 0.0 < late_fusion_initial_weight < 1.0:
            raise ValueError(
                f"late_fusion_initial_weight={late_fusion_initial_weight} must lie strictly between 0 and 1; "
                "set late_fusion=None to leave the image out."
            )
        if vision_config is not None and connector is None and late_fusion is None:
            raise ValueError(
                "connector=None with late_fusion=None: the image would not reach the embedding; choose one of them, or "
                "set vision_config=None."
            )
        check_head(embedding_dim, initial_temperature)
        check_num_visual_tokens(num_visual_tokens)
        _refuse_numbers("late_fusion_hidden_size", late_fusion_hidden_size)
        refuse_outside("config", {"lora": lora, **kwargs})
        for name, part in (
            ("text_config", text_config),
            ("vision_config", vision_config),
            ("qformer_config", qformer_config),
        ):
            refuse_outside(name, part.to_dict() if isinstance(part, PreTrainedConfig) else part, is_part=True)

        self.text_config = sub_config(text_config if text_config is not None else {"model_type": "llama"})
        self.vision_config = None if vision_config is None else sub_config(vision_config)
        self.connector = connector
        self.num_visual_tokens = num_visual_tokens
        self.image_token_id = image_token_id
        self.image_embedding_token_id = image_embedding_token_id
        self.standardize_states = standardize_states
        self.late_fusion = late_fusion
        self.late_fusion_initial_weight = late_fusion_initial_weight
        self.late_fusion_normalize = late_fusion_normalize
        self.late_fusion_hidden_size = late_fusion_hidden_size
        self.embedding_dim = embedding_dim
        self.initial_temperature = initial_temperature
        self.learnable_temperature = learnable_temperature
        self.freeze_vision_tower = freeze_vision_tower
        self.lora = lora
        self.initializer_range = initializer_range

        if isinstance(qformer_config, PreTrainedConfig):
            qformer_config = qformer_config.to_dict()
        # vocab_size=0: the Q-Former reads queries and patches, never text.
        qformer_settings = {"num_hidden_layers": 6, "vocab_size": 0, "pad_token_id": None, **(qformer_config or {})}
        if self.vision_config is not None:
            qformer_settings["encoder_hidden_size"] = self.vision_hidden_size
        self.qformer_config = Blip2QFormerConfig(**qformer_settings)
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the LLM."""
        return int(self.text_config.hidden_size)

    @property
    def vision_hidden_size(self) -> int:
        """Width of the tower's patch tokens and pooled vector, by what its configuration says."""
        config = self.vision_config
        if config is None:
            raise ValueError("vision_config=None: a text-only model has no vision width; compose it with a tower.")
        if getattr(config, "hidden_sizes", None):  # a pyramid of stages (ConvNeXt, ResNet): the last one is read
            return int(config.hidden_sizes[-1])
        for name in ("hidden_size", "num_features"):  # `num_features` is timm's name
            if getattr(config, name, None):
                return int(getattr(config, name))
        raise ValueError(
            f"vision_config of type {config.model_type!r} names none of hidden_sizes, hidden_size, num_features: "
            "add the width of its last feature map under one of these names."
        )

    @property
    def has_vision(self) -> bool:
        """Whether the model can read images."""
        return self.vision_config is not None


def check_head(embedding_dim: int | None, initial_temperature: float) -> None:
    """Raises ValueError for settings of what comes after the LLM that are out of range."""
    if not 0.01 <= initial_temperature <= 100.0:  # NaN, too
        raise ValueError(
            f"initial_temperature={initial_temperature} must lie between 0.01 and 100, the bounds of a learnable one."
        )
    if embedding_dim is not None and not 1 <= embedding_dim <= MAX_WIDTH:
        raise ValueError(
            f"embedding_dim={embedding_dim} must lie between 1 and {MAX_WIDTH}, or be None for the LLM's own width."
        )


def check_num_visual_tokens(num_visual_tokens: int) -> None:
    """Raises ValueError for a number of visual tokens that no prompt has."""
    if not isinstance(num_visual_tokens, int) or not 1 <= num_visual_tokens <= MAX_VISUAL_TOKENS:
        raise ValueError(
            f"num_visual_tokens={num_visual_tokens!r} must lie between 1 and {MAX_VISUAL_TOKENS}; set connector=None "
            "for no visual tokens."
        )


def refuse_outside(name: str, value: Any, is_part: bool = False) -> None:
    """Refuse what would reach beyond the checkpoint when a model is built from its configuration.

    A config.json may come from anyone. Backbones are built of transformers' and timm's own classes, on sizes that the
    config gives; some of its settings make them run code of another repository, or read weights from elsewhere.

    Args:
        name: where the value stands, for errors.
        value: a configuration, as its dictionary, or any part of one.
        is_part: whether it belongs to a backbone, whose code is never the checkpoint's.

    Raises:
        ValueError: a backbone names code (`auto_map`); anything names weights or a file elsewhere (timm's
            `checkpoint_path` and `hf-hub:` or `local-dir:` architectures, `use_pretrained_backbone`), a module to
            import (peft's `megatron_core`), a kernel of the Hub, or a number beyond all bounds where it sizes memory.
    """
    if isinstance(value, Mapping):
        for key, part in value.items():
            where = f"{name}.{key}"
            if _reaches_outside(str(key), part, is_part):
                raise ValueError(
                    f"{where}={part!r:.200} reaches beyond the checkpoint, which has all that its model needs: remove "
                    "it from config.json if you trust where it came from."
                )
            refuse_outside(where, part, is_part)
    elif isinstance(value, list | tuple):
        for part in value:
            refuse_outside(name, part, is_part)
    else:
        _refuse_numbers(name, value)


def _reaches_outside(key: str, value: Any, is_part: bool) -> bool:
    if key == "auto_map":
        return is_part and bool(value)
    if key in _IMPLEMENTATIONS:
        return "/" in str(value)  # a kernel of the Hub, which transformers fetches and runs
    if key == "architecture":
        return ":" in str(value)  # timm reads the rest as a repository or a folder
    return key in _REACHING and bool(value)


def _refuse_numbers(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return
    last = name.rpartition(".")[2]
    bound = next((bound for sizing, bound in _BOUNDS if sizing.search(last)), None)
    if bound is None:
        return
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:  # a word
        return
    if not number <= bound:  # NaN, too
        raise ValueError(f"{name}={value!r:.200} is beyond all models (at most {bound}): take another checkpoint.")


def sub_config(config: PreTrainedConfig | dict[str, Any]) -> PreTrainedConfig:
    """A backbone's configuration, or the dictionary of one. Raises ValueError for a dictionary without `model_type`."""
    if isinstance(config, PreTrainedConfig):
        return config
    if "model_type" not in config:
        raise ValueError("a backbone's configuration needs `model_type`; pass the dictionary of a saved config.json.")
    return AutoConfig.for_model(**config)


NoteLLM2Config.register_for_auto_class()

__all__ = ["NoteLLM2Config", "check_head", "check_num_visual_tokens", "refuse_outside", "sub_config"]
