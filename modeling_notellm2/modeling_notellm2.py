"""NoteLLM-2 (arXiv 2405.16789): any decoder LLM and any vision tower joined into one note embedding.

    image ─► VisionTower ─┬► connector ─► visual tokens ─┐
                          │                              ├─► LLM ─┬► n_v, the state just before <IMG_EMB>
    text ─────────────────┼──────────────────────────────┘        └► n_m, the state of the last token
                          └► LateFusion: w · v + (1 − w) · n ─► head ─► L2 norm

The model sees tensors only: `NoteLLM2Processor` makes them from notes, and the losses live with the trainer.
"""

import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, is_peft_available, logging

from .configuration_notellm2 import NoteLLM2Config
from .connector_notellm2 import QFormerConnector, build_connector
from .fusion_notellm2 import GateOutput, LateFusion, unit_length

# Not used here: transformers 5.6 to 5.9 takes out of a local folder what this file names, and no more.
from .image_notellm2 import ImageError  # noqa: F401
from .packing_notellm2 import PACKABLE_MODEL_TYPES, PACKED_ATTENTION, pack, packed_states
from .processing_notellm2 import EncodedNote, NoteLLM2Processor
from .vision_notellm2 import VisionFeatures, VisionTower

if is_peft_available():
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

logger = logging.get_logger(__name__)

MAX_LOGIT_SCALE = math.log(100.0)
"""Upper bound of `logit_scale`: the temperature never falls below 0.01 (the bound CLIP introduced). Its negative is the
lower bound: at a temperature of 100 all notes are alike, and far beyond it the scale would be 0."""

Part = Literal["connector", "head", "llm"]

WINDOW_BATCHES = 8
"""`encode` sorts notes by length within so many batches: more would pad little less, and hold more decoded pictures."""

PROCESSOR_TOKENS = 2048
"""Tokens a forward pass of `encode` on a processor, at most: what lies between two layers then stays in its caches."""


@dataclass
class NoteLLM2Output(ModelOutput):
    """What the model returns for B notes.

    Attributes:
        note_embeds: (B, D) float32, L2-normalised; the embedding to use.
        visual_embeds: (B, D) float32, L2-normalised, the embedding of n_v; zero for a note without `<IMG_EMB>`, `None`
            when no note has one. Used in training only.
        fusion_weight: weight of the image, (B, 1) for the scalar gate, (B, d_llm) for the vector gate, 0 for a note
            without image; `None` without late fusion.
        logit_scale: scalar float32, exp of the learnable scale: 1 / temperature.
    """

    note_embeds: Tensor | None = None
    visual_embeds: Tensor | None = None
    fusion_weight: Tensor | None = None
    logit_scale: Tensor | None = None


class NoteStates(NamedTuple):
    """What the two backbones say of B notes, N of which have an image.

    Attributes:
        note_states: (B, d_llm), n_m: the last hidden state of each prompt.
        visual_states: (B, d_llm), n_v: the hidden state just before `<IMG_EMB>`, arbitrary in rows without one; `None`
            when no row has one.
        has_visual: (B,) bool, which rows have an n_v.
        pooled_embeds: (N, d_v), the tower's embeddings of the images, in the order of the notes that have one; `None`
            when none has, or the model makes no use of them.
        has_image: (B,) bool, which rows have an image.
    """

    note_states: Tensor
    visual_states: Tensor | None
    has_visual: Tensor
    pooled_embeds: Tensor | None
    has_image: Tensor


SAME_STATES = 1e-6
"""A deviation of states, relative to their mean's size, that float32 arithmetic makes of equal notes."""


class StateStandardizer(nn.Module):
    """(B, d) states of an LLM ─► (x − mean) · scale, one scale for all dimensions; the identity until `fit`.

    Each dimension's own scale would turn directions in which notes hardly differ into noise.

    Args:
        width: d.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(1))

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` has run, here or before the checkpoint was saved."""
        return bool(self.mean.any()) or bool(self.scale != 1)  # a mean may be zero

    @torch.no_grad()
    def fit(self, states: Tensor) -> None:
        """Measure (N, d) states of at least two different notes: they come out with mean 0 and root mean square 1.

        Raises:
            ValueError: all states are equal, or differ by rounding alone, or by less than float32 has normal numbers
                for; one is not finite.
        """
        if not bool(states.isfinite().all()):
            broken = int((~states.isfinite().all(1)).sum())
            raise ValueError(
                f"the states of {broken} of {len(states)} notes hold NaN or infinity, and cannot be standardized: "
                "check the LLM's weights, or compute them in float32."
            )
        states = states.double()
        mean = states.mean(0)
        deviation = (states - mean).square().mean().sqrt()
        least = (SAME_STATES * mean.square().mean().sqrt()).clamp(min=torch.finfo(torch.float32).tiny)
        if not deviation > least:  # NaN of no states, too
            raise ValueError(f"the states of {len(states)} notes do not differ, and cannot be standardized.")
        self.mean.copy_(mean)
        self.scale.copy_(1 / deviation)

    def forward(self, states: Tensor) -> Tensor:
        """(B, d) ─► (B, d), of the same dtype."""
        return ((states.float() - self.mean.float()) * self.scale.float()).to(states.dtype)

    def reset_parameters(self) -> None:
        """The identity."""
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.scale)


class NonFiniteError(ValueError):
    """Numbers that are NaN or infinite. The message says whose they are, and the remedy."""


class NoteEncoderMixin:
    """Notes ─► embeddings, batch by batch: the loop behind `encode`, which models and their exported graphs share.

    A subclass has `config`, `processor` and `device`, as `NoteLLM2Model` has them, and `_embed_batch`.
    """

    config: Any
    processor: Any
    device: Any

    def _embed_batch(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the processor made of B notes, on `device` ─► (B, D) float32, L2-normalised."""
        raise NotImplementedError

    def _encode_all(
        self,
        notes: Iterable[Any],
        batch_size: int,
        show_progress_bar: bool,
        truncate_dim: int | None,
        processor: NoteLLM2Processor | None = None,
        vision_features: Callable[[Sequence[EncodedNote]], Mapping[str, Tensor]] | None = None,
        check_finite: bool = True,
    ) -> Tensor:
        """(N, D) float32 on `device`; arguments and errors are those of `NoteLLM2PreTrainedModel.encode`."""
        if isinstance(notes, str | Mapping | Image.Image):
            raise ValueError("encode takes a sequence of notes, and got a single one: pass [note].")
        if hasattr(notes, "columns"):  # iterating over a data frame gives its column names
            raise ValueError(f'notes is a {type(notes).__name__}: pass its rows, notes.to_dict("records").')
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        dim = self.config.embedding_dim or self.config.hidden_size
        if truncate_dim is not None and not 1 <= truncate_dim <= dim:
            raise ValueError(f"truncate_dim={truncate_dim} must lie between 1 and the embedding's width, {dim}.")
        processor = processor or self.processor
        total = len(notes) if isinstance(notes, Sized) else None
        embeds: list[Tensor] = []
        rows: list[int] = []  # of each note, among those that are encoded
        row_of: dict[bytes | int, int] = {}  # what tells a note from others ─► its row
        with tqdm(total=total, desc="encode", unit="note", disable=not show_progress_bar) as progress:
            stream = (processor.encode_note(note, index) for index, note in enumerate(notes))
            # Notes of like length share a batch.
            while window := list(islice(stream, WINDOW_BATCHES * batch_size)):
                new = []
                for note in window:
                    known = len(row_of)
                    # With features given, an image is not read.
                    content = note.content_digest() if vision_features is None else None
                    rows.append(row_of.setdefault(len(rows) if content is None else content, known))
                    if len(row_of) > known:
                        new.append(note)
                if new:
                    embeds.append(self._encode_window(new, batch_size, processor, vision_features, progress))
                progress.update(len(window) - len(new))
        result = torch.cat(embeds) if embeds else torch.empty(0, dim, device=self.device)
        if len(rows) > len(result):
            result = result[rows]
        if check_finite and not bool((is_finite := result.isfinite().all(1)).all()):
            broken = (~is_finite).nonzero().flatten().tolist()
            raise NonFiniteError(
                f"the embeddings of {len(broken)} of {len(result)} notes are not finite, that of notes[{broken[0]}] "
                "first: compute in float32 or bfloat16, or check the model's weights."
            )
        if truncate_dim is not None:
            result = unit_length(result[:, :truncate_dim])
        return result

    def _encode_window(
        self,
        window: list[EncodedNote],
        batch_size: int,
        processor: NoteLLM2Processor,
        vision_features: Callable[[Sequence[EncodedNote]], Mapping[str, Tensor]] | None,
        progress: tqdm,
    ) -> Tensor:
        lengths = [len(processor.token_ids(note)) for note in window]
        max_tokens = PROCESSOR_TOKENS if self.device.type == "cpu" else sum(lengths)
        result: Tensor | None = None
        for picked in _batches(lengths, batch_size, max_tokens):
            notes = [window[i] for i in picked]
            batch = dict(processor.collate(notes, decode_images=vision_features is None))
            if vision_features is not None:
                batch |= vision_features(notes)
            embeds = self._embed_batch({name: value.to(self.device) for name, value in batch.items()})
            if result is None:
                result = embeds.new_empty(len(window), embeds.shape[1])
            result[torch.tensor(picked, device=result.device)] = embeds
            progress.update(len(picked))
        assert result is not None  # a window is never empty
        return result


class NoteLLM2PreTrainedModel(PreTrainedModel, NoteEncoderMixin):
    """What models of notes share: the head and the temperature, `encode`, LoRA, loading, saving and initialisation.

    A subclass has a `language_model`, `get_states` and `embed_states`, and calls `_complete` last in its `__init__`.
    Its config has `hidden_size`, `has_vision`, `embedding_dim`, `initial_temperature`, `learnable_temperature` and
    `lora`, as `NoteLLM2Config` has them.

    Attributes:
        processor_class: the processor saved beside the model.
        parts: how the names of the parameters begin that come before the LLM ("connector"), after it ("head"), and of
            the LLM and the vision tower ("llm"). The first part that fits is meant.
        vision_tower: a tower whose output can be kept and given to `forward` in place of pixels; `None` without.
        late_fusion: how the tower's output joins the LLM's; `None` if it does not.
    """

    base_model_prefix = "notellm2"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # bfloat16 would round a mean that is a hundred times what differs.
    _keep_in_fp32_modules_strict = ["note_standardizer", "visual_standardizer", "pooled_standardizer"]

    processor_class: ClassVar[type[NoteLLM2Processor]] = NoteLLM2Processor
    parts: Mapping[Part, tuple[str, ...]] = {
        "connector": ("connector.", "image_embedding"),
        "head": ("late_fusion.", "head.", "logit_scale"),
        "llm": ("language_model.", "vision_tower."),
    }
    language_model: PreTrainedModel
    vision_tower: VisionTower | None
    late_fusion: LateFusion | None

    def _complete(self) -> None:
        """The end of `__init__`: head, temperature, adapters, and a record of what is fixed."""
        config = self.config
        self.note_standardizer = StateStandardizer(config.hidden_size) if config.standardize_states else None
        self.head = (
            nn.Identity()
            if config.embedding_dim is None
            else nn.Linear(config.hidden_size, config.embedding_dim, bias=False)
        )
        # One dimension: DeepSpeed and FSDP do not take parameters of none.
        initial_scale = torch.tensor([-math.log(config.initial_temperature)])
        self.logit_scale = nn.Parameter(initial_scale, requires_grad=config.learnable_temperature)
        self._processor: NoteLLM2Processor | None = None
        self.post_init()
        if config.lora is not None:  # after post_init, which would undo LoRA's own initialisation
            self._inject_lora(config.lora)
        self._fixed = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NoteLLM2PreTrainedModel):
            nn.init.constant_(module.logit_scale, -math.log(self.config.initial_temperature))
        if isinstance(module, NoteLLM2Model):
            nn.init.normal_(module.image_embedding, std=self.config.initializer_range)
        elif isinstance(module, QFormerConnector):
            nn.init.normal_(module.query_tokens, std=self.config.initializer_range)
        elif isinstance(module, GateOutput | StateStandardizer):
            module.reset_parameters()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint as every model of transformers does; what the config says is fixed stays fixed.

        Raises:
            OSError: the weights are not safetensors, or an adapter lies beside them, which would change them.
        """
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if source is not None:
            refuse_pickles(Path(source) / kwargs.get("subfolder", ""))
        if (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path") is not None:
            raise OSError(
                f"{str(source)!r} holds an adapter_config.json: the adapters of this model are in its own config and "
                "weights (lora); remove the file."
            )
        loaded = super().from_pretrained(*args, **{**kwargs, "use_safetensors": True})
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with output_loading_info=True
        for name in model._fixed:  # loading made new parameters, all of which train
            model.get_parameter(name).requires_grad_(False)
        return loaded

    @property
    def processor(self) -> NoteLLM2Processor:
        """The processor saved beside the model, loaded on first use.

        Raises:
            ValueError: the model was not loaded from a folder or repository and knows no processor.
        """
        if self._processor is None:
            if not self.name_or_path:
                raise ValueError(
                    "this model was built from a config and knows no processor: pass encode(…, processor=…), or load "
                    "the model with from_pretrained."
                )
            commit = getattr(self.config, "_commit_hash", None)
            self._processor = self.processor_class.from_pretrained(self.name_or_path, revision=commit or "main")
        return self._processor

    @property
    def temperature(self) -> float:
        """The softmax temperature of the contrastive loss, 1 / exp(logit_scale)."""
        return 1.0 / float(self._scale().detach())

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_states(self, input_ids: Tensor, attention_mask: Tensor, **images: Tensor | None) -> NoteStates:
        """Run the backbones: the first half of `forward`, whose arguments it takes."""
        raise NotImplementedError

    def embed_states(self, states: NoteStates) -> NoteLLM2Output:
        """All that comes after the LLM: the second half of `forward`."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(
        self,
        notes: Iterable[Any],
        batch_size: int = 32,
        show_progress_bar: bool = False,
        convert_to_tensor: bool = False,
        truncate_dim: int | None = None,
        processor: NoteLLM2Processor | None = None,
        vision_features: Callable[[Sequence[EncodedNote]], Mapping[str, Tensor]] | None = None,
        check_finite: bool = True,
    ) -> np.ndarray | Tensor:
        """Notes ─► embeddings, in the notes' order.

        The model computes as in evaluation mode, without dropout, whatever its mode, which it has again afterwards.
        Several threads may encode with one model at once; none may train it meanwhile.

        Args:
            notes: mappings with `title`, `topics`, `content`, `image` (each optional), strings (a note's content) or
                PIL images; a list, a `datasets.Dataset`, any iterable.
            batch_size: notes a forward pass, at most; on a processor fewer where they are long. The embeddings do not
                depend on it. A note that repeats is encoded once, unless its picture is in memory.
            show_progress_bar: show one progress bar over all notes.
            convert_to_tensor: return a tensor on the model's device instead of a NumPy array.
            truncate_dim: keep the first so many dimensions and normalise again.
            processor: the processor to use; by default the one saved beside the model.
            vision_features: gives, for some notes, the frozen tower's output for their images as `forward` takes it
                (`patch_embeds`, `pooled_embeds`, …), in place of running the tower; `index` is a note's position.
            check_finite: refuse to return an embedding that is not finite; otherwise look for them yourself.

        Returns:
            (N, D) float32, L2-normalised; zero where the state of a note is, which has no direction.

        Raises:
            NoteError: a note that cannot be read; names its index, the field and the remedy.
            NonFiniteError: an embedding is NaN or infinite; names its note.
            ValueError: `notes` is a single note; `batch_size` or `truncate_dim` out of range.
        """
        with _evaluation_mode(self):
            embeds = self._encode_all(
                notes, batch_size, show_progress_bar, truncate_dim, processor, vision_features, check_finite
            )
        return embeds if convert_to_tensor else embeds.cpu().numpy()

    def _embed_batch(self, batch: Mapping[str, Tensor]) -> Tensor:
        note_embeds: Tensor = self(**batch).note_embeds
        return note_embeds

    def add_lora(self, **settings: Any) -> None:
        """Add LoRA adapters to the LLM; they become part of the config and of every checkpoint.

        Args:
            settings: arguments of `peft.LoraConfig`.

        Raises:
            ValueError: the model has adapters already.
        """
        if self.config.lora is not None:
            raise ValueError("this model has LoRA adapters already: call merge_lora() before adding new ones.")
        self._inject_lora(settings)
        self.config.lora = settings

    def merge_lora(self) -> None:
        """Fold the adapters into the LLM's weights: the same embeddings, and peft is no longer needed.

        Raises:
            ValueError: the model has no adapters.
        """
        if self.config.lora is None:
            raise ValueError("this model has no LoRA adapters to merge (config.lora is None).")
        adapted = [
            (name, layer) for name, layer in self.language_model.named_modules() if isinstance(layer, BaseTunerLayer)
        ]
        for name, layer in adapted:
            layer.merge()
            self.language_model.set_submodule(name, layer.get_base_layer())
        del self.language_model.peft_config  # peft's mark of a model with adapters
        self.config.lora = None

    def _inject_lora(self, settings: dict[str, Any]) -> None:
        if not is_peft_available():
            raise ImportError(
                'this model has LoRA adapters (config.lora): install peft with `pip install "peft>=0.17"`.'
            )
        inject_adapter_in_model(LoraConfig(**settings), self.language_model)
        for name, parameter in self.language_model.named_parameters():
            if "lora_" in name:  # not the whole module: a cast would also round the rotary frequencies
                parameter.data = parameter.data.to(self.dtype)

    def _takes_part(self) -> bool:
        """Whether what reads images runs, to no effect, where a batch has none: other processes may have some, and
        wait for a gradient of every weight; with ZeRO-3, which gathers weights where they are used, in any pass."""
        return (self.training and torch.is_grad_enabled()) or is_deepspeed_zero3_enabled()

    def fit_standardizers(self, states: NoteStates) -> None:
        """Measure the states of notes for `config.standardize_states`, without which this does nothing.

        Args:
            states: of some hundred training notes or more, as the LLM gives them before it trains.

        Raises:
            ValueError: all states are equal.
        """
        if self.note_standardizer is not None:
            self.note_standardizer.fit(states.note_states)

    def _to_embeds(self, states: Tensor) -> Tensor:
        return unit_length(self.head(states).float())

    def _scale(self) -> Tensor:
        scale = self.logit_scale.float().squeeze(0)
        # The bounds without their dead gradient: a clamped parameter could never come back.
        bounded = scale.detach().clamp(-MAX_LOGIT_SCALE, MAX_LOGIT_SCALE)
        return (bounded + (scale - scale.detach())).exp()


class NoteLLM2Model(NoteLLM2PreTrainedModel):
    """A note's text and image ─► one embedding.

    Args:
        config: everything structural; building a model never touches the network.
    """

    config_class = NoteLLM2Config

    def __init__(self, config: NoteLLM2Config) -> None:
        super().__init__(config)
        self.language_model = AutoModel.from_config(config.text_config)
        if config.text_config.model_type in PACKABLE_MODEL_TYPES and _attention(self.language_model) == "sdpa":
            self.language_model.set_attn_implementation(PACKED_ATTENTION)
        self._max_tokens = _listed_positions(self.language_model)
        self.vision_tower = None
        if config.vision_config is not None:
            self.vision_tower = VisionTower(config.vision_config, config.freeze_vision_tower)
        self.connector = build_connector(config)
        self.late_fusion = LateFusion(config) if config.has_vision and config.late_fusion else None
        # <IMG_EMB> has its own vector: the LLM's embedding matrix stays as it is, and need not train.
        self.image_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        # n_v stands elsewhere in the prompt, and around a mean of its own.
        self.visual_standardizer = None
        if config.standardize_states and self.connector is not None:
            self.visual_standardizer = StateStandardizer(config.hidden_size)
        # What a tower sees of any picture has a mean, too, which would make late fusion alike for all of them.
        self.pooled_standardizer = None
        if config.standardize_states and self.late_fusion is not None:
            self.pooled_standardizer = StateStandardizer(config.vision_hidden_size)
        self._complete()

    @classmethod
    def from_backbones(
        cls,
        llm: str | os.PathLike,
        vision: str | os.PathLike | None = None,
        *,
        num_text_layers: int | None = None,
        processor: NoteLLM2Processor | None = None,
        dtype: torch.dtype = torch.float32,
        **config: Any,
    ) -> "NoteLLM2Model":
        """Join a pretrained LLM and a pretrained vision tower; all that lies between them starts at random.

        Args:
            llm: local folder or Hub id of a decoder LLM.
            vision: local folder or Hub id of a vision encoder; the vision half is taken of a dual encoder such as CLIP.
                `None` makes a text-only model.
            num_text_layers: keep only the first so many layers of the LLM.
            processor: the processor to use; by default `NoteLLM2Processor.from_backbones(llm, vision)`.
            dtype: dtype of all weights.
            config: settings of [`NoteLLM2Config`]. `num_visual_tokens` defaults to the processor's.

        Raises:
            ValueError: a setting that `NoteLLM2Config` does not know; a backbone's folder lacks weights its
                configuration asks for; the LLM is no decoder; `num_text_layers` out of range.
        """
        refuse_unknown_settings(NoteLLM2Config, config)
        if processor is None:
            # The prompt must have a place for visual tokens just when the connector makes some.
            prompt: dict[str, Any] = {"prompt": "text"} if config.get("connector", "qformer") is None else {}
            if "num_visual_tokens" in config:
                prompt["num_visual_tokens"] = config["num_visual_tokens"]
            processor = NoteLLM2Processor.from_backbones(llm, vision, **prompt)
        text_config = AutoConfig.from_pretrained(llm, trust_remote_code=False).get_text_config(decoder=True)
        if num_text_layers is not None:
            _keep_layers(text_config, num_text_layers)
        vision_config = None
        if vision is not None:
            whole = AutoConfig.from_pretrained(vision, trust_remote_code=False)
            vision_config = getattr(whole, "vision_config", whole)
        for part in (text_config, vision_config):
            if part is not None:
                adopt_config(part, dtype)
        settings = {
            "num_visual_tokens": processor.num_visual_tokens,
            **config,
            "image_token_id": processor.image_token_id,
            "image_embedding_token_id": processor.image_embedding_token_id,
        }
        whole_config = NoteLLM2Config(text_config=text_config, vision_config=vision_config, **settings)
        adopt_config(whole_config.qformer_config, dtype)
        # Built in `dtype`, not cast to it: a cast would also round the LLM's rotary frequencies.
        model = cls._from_config(whole_config, dtype=dtype)
        load_backbone(model.language_model, llm, text_config, dtype)
        if model.vision_tower is not None and vision is not None and vision_config is not None:
            load_backbone(model.vision_tower.model, vision, vision_config, dtype)
        model.eval()
        _refuse_two_way_attention(model.language_model, llm)
        embeddings = model.get_input_embeddings()
        assert isinstance(embeddings, nn.Embedding)
        with torch.no_grad():
            # Through the module, not its matrix: some LLMs (Gemma) scale what they look up.
            everything = torch.arange(embeddings.weight.shape[0])
            model.image_embedding.copy_(embeddings(everything).mean(0))
        model._processor = processor
        return model

    def get_image_features(
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
    ) -> VisionFeatures:
        """Run the vision tower on N images; see [`VisionFeatures`] for the shapes.

        Raises:
            ValueError: the model is text-only.
        """
        if self.vision_tower is None:
            raise ValueError("pixel_values were given to a text-only model (vision_config=None): leave images out.")
        return self.vision_tower(pixel_values, pixel_attention_mask, spatial_shapes)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        patch_embeds: Tensor | None = None,
        pooled_embeds: Tensor | None = None,
        patch_attention_mask: Tensor | None = None,
        has_image: Tensor | None = None,
    ) -> NoteLLM2Output:
        """Embed B notes, N of which have an image.

        Args:
            input_ids: (B, T) int64, with `num_visual_tokens` placeholders `<IMG>` in each row that has an image.
            attention_mask: (B, T), 1 for real tokens; padding may be on either side.
            pixel_values: (N, C, H, W) images of the notes that have one, in order.
            pixel_attention_mask, spatial_shapes: for towers of variable resolution; see [`VisionTower`].
            patch_embeds, pooled_embeds, patch_attention_mask: the tower's output for these images, instead of
                `pixel_values`: the fields of [`VisionFeatures`].
            has_image: (B,) bool, which notes the N images belong to. Default: all.

        Raises:
            ValueError: the placeholders, the images and `has_image` do not agree.
        """
        states = self.get_states(
            input_ids,
            attention_mask,
            pixel_values=pixel_values,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            patch_embeds=patch_embeds,
            pooled_embeds=pooled_embeds,
            patch_attention_mask=patch_attention_mask,
            has_image=has_image,
        )
        return self.embed_states(states)

    def get_states(self, input_ids: Tensor, attention_mask: Tensor, **images: Tensor | None) -> NoteStates:
        """Run the tower, the connector and the LLM, and read n_m and n_v: the first half of `forward`.

        Args:
            input_ids, attention_mask: as in `forward`.
            images: the other arguments of `forward`.

        Raises:
            ValueError: the placeholders, the images and `has_image` do not agree; a prompt is longer than the LLM's
                table of positions.
        """
        if self._max_tokens is not None and input_ids.shape[1] > self._max_tokens:
            raise ValueError(
                f"a note's prompt has {input_ids.shape[1]} tokens, and the LLM knows {self._max_tokens} positions: "
                "lower the processor's max_content_tokens, max_title_tokens or max_topics_tokens."
            )
        features, has_image = self._vision_inputs(input_ids, **images)
        inputs_embeds = self._embed(input_ids, features, has_image)
        if _attention(self.language_model) == PACKED_ATTENTION:
            batch = pack(input_ids, attention_mask, self.config.image_token_id)
            states = packed_states(self.language_model, inputs_embeds, batch)
        else:
            # Positions count real tokens only, so that left padding does not shift them.
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            states = self.language_model(
                inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            ).last_hidden_state  # (B, T, d_llm)
        note_states = last_token_states(states, attention_mask)  # n_m
        rows = torch.arange(states.shape[0], device=states.device)

        is_end = input_ids == self.config.image_embedding_token_id  # (B, T)
        has_visual = is_end.any(-1)
        visual_states = states[rows, is_end.int().argmax(-1) - 1] if bool(has_visual.any()) else None  # n_v
        pooled_embeds = None if features is None else features.pooled_embeds
        return NoteStates(note_states, visual_states, has_visual, pooled_embeds, has_image)

    def embed_states(self, states: NoteStates) -> NoteLLM2Output:
        """Standardization, late fusion, head and normalisation: the second half of `forward`, all that comes after the
        LLM."""
        states = self._standardized(states)
        note_states, visual_states, fusion_weight = states.note_states, states.visual_states, None
        if self.late_fusion is not None:
            note_states, visual_states, fusion_weight = self._fuse(states)
        visual_embeds = None
        if visual_states is not None:
            visual_embeds = self._to_embeds(visual_states) * states.has_visual.unsqueeze(-1)
        return NoteLLM2Output(
            note_embeds=self._to_embeds(note_states),
            visual_embeds=visual_embeds,
            fusion_weight=fusion_weight,
            logit_scale=self._scale(),
        )

    def fit_standardizers(self, states: NoteStates) -> None:
        super().fit_standardizers(states)
        of_images: list[tuple[str, StateStandardizer | None, Tensor | None]] = [
            ("n_v", self.visual_standardizer, states.visual_states),
            ("pooled_embeds", self.pooled_standardizer, states.pooled_embeds),
        ]
        for name, standardizer, found in of_images:
            if standardizer is None or found is None:
                continue
            try:
                standardizer.fit(found[states.has_visual] if name == "n_v" else found)
            except ValueError as error:  # one image, or everywhere the same: no reason to refuse the notes' texts
                logger.warning("%s are left as they are: %s", name, error)

    def _standardized(self, states: NoteStates) -> NoteStates:
        if self.note_standardizer is None:
            return states
        visual_states, pooled_embeds = states.visual_states, states.pooled_embeds
        if visual_states is not None and self.visual_standardizer is not None:
            visual_states = self.visual_standardizer(visual_states)
        if pooled_embeds is not None and self.pooled_standardizer is not None:
            pooled_embeds = self.pooled_standardizer(pooled_embeds)
        note_states = self.note_standardizer(states.note_states)
        return states._replace(note_states=note_states, visual_states=visual_states, pooled_embeds=pooled_embeds)

    def _vision_inputs(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        patch_embeds: Tensor | None = None,
        pooled_embeds: Tensor | None = None,
        patch_attention_mask: Tensor | None = None,
        has_image: Tensor | None = None,
    ) -> tuple[VisionFeatures | None, Tensor]:
        """The inputs of `forward` that concern images ─► the tower's output, and which notes it belongs to."""
        if (patch_embeds is None) != (pooled_embeds is None):
            raise ValueError("patch_embeds and pooled_embeds go together: pass both, or pixel_values.")
        features: VisionFeatures | None = None
        if patch_embeds is not None and pooled_embeds is not None:
            features = VisionFeatures(patch_embeds, pooled_embeds, patch_attention_mask)
        elif pixel_values is not None:
            features = self.get_image_features(pixel_values, pixel_attention_mask, spatial_shapes)
        if has_image is None:
            has_image = torch.full(input_ids.shape[:1], features is not None, device=input_ids.device)
        num_images = 0 if features is None else features.pooled_embeds.shape[0]
        if num_images != int(has_image.sum()):
            raise ValueError(f"{num_images} images were given for {int(has_image.sum())} notes with has_image=True.")
        return features, has_image

    def _embed(self, input_ids: Tensor, features: VisionFeatures | None, has_image: Tensor) -> Tensor:
        """(B, T) ids ─► (B, T, d_llm): the LLM's embeddings, `<IMG_EMB>`'s own, and visual tokens for `<IMG>`."""
        is_image = input_ids == self.config.image_token_id
        is_end = input_ids == self.config.image_embedding_token_id
        # Neither token has a row in the LLM's matrix; any row will do where it is replaced.
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image | is_end, 0))
        embeds = torch.where(is_end.unsqueeze(-1), self.image_embedding.to(embeds.dtype), embeds)

        expected = has_image * (self.config.num_visual_tokens if self.connector is not None else 0)
        found = is_image.sum(-1)
        if not torch.equal(found, expected):
            row = int((found != expected).nonzero()[0])
            raise ValueError(
                f"note {row} of the batch has {int(found[row])} <IMG> placeholders, but its image gives "
                f"{int(expected[row])} visual tokens: build inputs with the model's own processor (prompt, "
                "num_visual_tokens)."
            )
        if self.connector is None:
            return embeds
        if features is None:
            if not self._takes_part():
                return embeds
            blank = self.image_embedding.new_ones(1, self.config.vision_hidden_size)
            return embeds + 0.0 * self.connector(VisionFeatures(blank.unsqueeze(1), blank)).sum().to(embeds.dtype)
        parameter = next(self.connector.parameters())
        visual = self.connector(features._replace(patch_embeds=features.patch_embeds.to(parameter.dtype)))
        return embeds.masked_scatter(is_image.unsqueeze(-1), visual.to(embeds.dtype))

    def _fuse(self, states: NoteStates) -> tuple[Tensor, Tensor | None, Tensor]:
        """Late fusion of the notes that have an image; the others keep their states and get weight 0."""
        assert self.late_fusion is not None
        note_states, visual_states, has_visual, pooled_embeds, has_image = states
        gate_states = note_states
        if visual_states is not None:
            gate_states = torch.where(has_visual.unsqueeze(-1), visual_states, note_states)
        width = 1 if self.config.late_fusion == "scalar" else note_states.shape[-1]
        weights = note_states.new_zeros(note_states.shape[0], width)
        if pooled_embeds is None:
            if self._takes_part():
                visual = self.late_fusion.project(note_states.new_ones(1, self.config.vision_hidden_size))
                unused = self.late_fusion.weight(visual, note_states[:1].to(visual.dtype)).sum() + visual.sum()
                note_states = note_states + 0.0 * unused.to(note_states.dtype)
            return note_states, visual_states, weights
        visual = self.late_fusion.project(pooled_embeds)
        weight = self.late_fusion.weight(visual, gate_states[has_image])

        def fuse(states: Tensor) -> Tensor:
            fused = self.late_fusion.fuse(weight, visual, states[has_image])  # type: ignore[union-attr]
            return states.masked_scatter(has_image.unsqueeze(-1), fused.to(states.dtype))

        weights = weights.masked_scatter(has_image.unsqueeze(-1), weight.to(weights.dtype))
        return fuse(note_states), None if visual_states is None else fuse(visual_states), weights


_MODES_LOCK = Lock()
# model ─► how many threads have it in evaluation mode, and the modules that were training before the first did. Not an
# attribute of the model, which copies and saved objects would take along.
_MODES: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, until the last thread that is in such a context has left it; then each of its
    modules in the mode that it had."""
    with _MODES_LOCK:
        threads, trained = _MODES.get(model, (0, []))
        if not threads:
            trained = [module for module in model.modules() if module.training]
            for module in trained:
                module.training = False
        _MODES[model] = (threads + 1, trained)
    try:
        yield
    finally:
        with _MODES_LOCK:
            threads, trained = _MODES.pop(model)
            if threads > 1:
                _MODES[model] = (threads - 1, trained)
            else:
                for module in trained:
                    module.training = True


def refuse_unknown_settings(config_class: type[PreTrainedConfig], settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting that the config's class does not name: the config itself would keep it, as every
    config of transformers does."""
    unknown = sorted(set(settings) - set(inspect.signature(config_class.__init__).parameters))
    if unknown:
        raise ValueError(
            f"{unknown[0]}={settings[unknown[0]]!r} is no setting of {config_class.__name__}; see its docstring."
        )


def _attention(model: PreTrainedModel) -> str | None:
    """The attention implementation of a model. Where none was asked for, transformers takes "sdpa", and `NoteLLM2Model`
    the packed one in its place."""
    return getattr(model.config, "_attn_implementation", None)


def _listed_positions(language_model: PreTrainedModel) -> int | None:
    """How many positions an LLM has that looks them up in a table (GPT-2, OPT); None where it computes them."""
    limit = getattr(language_model.config, "max_position_embeddings", None)
    tables = [module for module in language_model.modules() if isinstance(module, nn.Embedding)]
    tables = [table for table in tables if table is not language_model.get_input_embeddings()]
    # OPT's has two rows more than positions.
    return limit if limit and any(0 <= table.num_embeddings - limit <= 2 for table in tables) else None


def adopt_config(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Make a backbone's configuration a part of ours: one dtype, as each was saved with its own, no folder of this
    machine, which has no place in a checkpoint, and no code, as the backbone is built of a class of transformers."""
    config.dtype = dtype
    vars(config).pop("auto_map", None)
    if os.path.isdir(config._name_or_path):
        config._name_or_path = ""
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            adopt_config(part, dtype)


def _batches(lengths: Sequence[int], batch_size: int, max_tokens: int) -> Iterator[list[int]]:
    """Positions of notes, the longest first, in batches of at most so many notes and, beyond one note, tokens.

    >>> list(_batches([5, 9, 5, 4], batch_size=3, max_tokens=12))
    [[1], [0, 2], [3]]
    """
    batch: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda position: lengths[position], reverse=True):
        # The first is the longest, to which the others are padded where they are not packed.
        if len(batch) == batch_size or (batch and lengths[batch[0]] * (len(batch) + 1) > max_tokens):
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


def last_token_states(states: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T, d) states ─► (B, d), those of each row's last real token; padding may be on either side."""
    rows = torch.arange(states.shape[0], device=states.device)
    columns = torch.arange(states.shape[1], device=states.device)
    return states[rows, (attention_mask * columns).argmax(-1)]


def _keep_layers(config: PreTrainedConfig, num_layers: int) -> None:
    """Shorten a decoder's configuration to its first layers, per-layer lists (`layer_types`) included."""
    available = config.num_hidden_layers
    if not 1 <= num_layers <= available:
        raise ValueError(f"num_text_layers={num_layers} must lie between 1 and the LLM's {available} layers.")
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == available:
            setattr(config, name, value[:num_layers])
    config.num_hidden_layers = num_layers


def refuse_pickles(source: str | os.PathLike) -> None:
    """Raises OSError for a local folder whose weights are in pickles alone. Where there are safetensors, these are
    read; of a Hub id, transformers says that it has none."""
    folder = Path(source)
    pickles = sorted(path.name for path in folder.glob("*.bin") if path.name.startswith("pytorch_model"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise OSError(
            f"{str(source)!r} holds its weights as pickles ({pickles[0]}), which can run code when they are loaded: "
            "take a checkpoint with safetensors, or convert it where you trust it (save_pretrained writes them)."
        )


def load_backbone(target: nn.Module, source: str | os.PathLike, config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Copy a pretrained backbone's weights into the model; refuse a folder that lacks some.

    A weight that transformers could not find stays random with no more than a warning: never what a user wants here. A
    pooler is the exception (ViT checkpoints often lack theirs), as the class token is read instead.
    """
    verbosity = logging.get_verbosity()
    refuse_pickles(source)
    logging.set_verbosity_error()  # what is left over (a language-model head, the text half of CLIP) needs no warning
    try:
        backbone, info = AutoModel.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True, trust_remote_code=False
        )
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(
            f"{str(source)!r} lacks {len(missing)} weights of its own configuration, {missing[0]!r} first: use a "
            "complete checkpoint whose config.json belongs to its weights."
        )
    target.load_state_dict(backbone.state_dict())


@torch.no_grad()
def _refuse_two_way_attention(language_model: nn.Module, source: str | os.PathLike) -> None:
    """n_v must not see the text that follows it, so that the LLM has to be causal. Tried out: configurations do not
    say it in one way."""
    ids = torch.tensor([[1, 2], [1, 3]])
    first_states = language_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0].float()
    if not torch.allclose(first_states[0], first_states[1], atol=1e-3):
        raise ValueError(
            f"llm={str(source)!r} lets a token see the ones after it: give a decoder, whose attention is causal."
        )


NoteLLM2Model.register_for_auto_class("AutoModel")

__all__ = [
    "NonFiniteError",
    "NoteLLM2Model",
    "NoteLLM2Output",
    "NoteLLM2PreTrainedModel",
    "NoteStates",
    "Part",
    "adopt_config",
    "last_token_states",
    "load_backbone",
    "refuse_pickles",
    "refuse_unknown_settings",
]
