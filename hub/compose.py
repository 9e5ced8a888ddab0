"""Join an LLM and a vision tower into an untrained NoteLLM-2 checkpoint, or take a multimodal LLM to compare it with.

    python -m hub.compose --llm LLM --vision TOWER --output DIR

The dataclass below is the one description of a composition: this command and `train/run.py` share it.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModel, HfArgumentParser

from evaluation.encoders import check_llm, check_tower
from evaluation.multimodal_llm import MultimodalLLM, MultimodalLLMProcessor
from modeling_notellm2 import NoteLLM2Model, NoteLLM2PreTrainedModel, NoteLLM2Processor
from modeling_notellm2.processing_notellm2 import Template


@dataclass
class CompositionArguments:
    """What a model is made of. Every ablation of the paper is a setting here."""

    model: str | None = field(
        default=None,
        metadata={"help": "Checkpoint to go on from (folder or Hub id), instead of --llm and all that follows here."},
    )
    llm: str | None = field(default=None, metadata={"help": "Folder or Hub id of the decoder LLM."})
    vision: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the vision tower; without one (or with an empty one) the model is text-only."
        },
    )
    multimodal_llm: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of BLIP-2 (with OPT), Qwen2-VL, Qwen2.5-VL or Qwen3-VL, to compare NoteLLM-2 "
            "with, in place of --llm and --vision. Of what follows, language, template, standardize_states, "
            "embedding_dim, the temperature, the lengths of texts and the seed are used; the prompt is the basic one."
        },
    )
    max_image_pixels: int | None = field(
        default=None,
        metadata={
            "help": "With a Qwen-VL as multimodal_llm: scale larger images down to so many pixels (448 by 448, the "
            "paper's, are 200704: 256 visual tokens of Qwen2-VL). Default: the model's own bound, often thousands of "
            "tokens an image."
        },
    )
    num_text_layers: int | None = field(
        default=None, metadata={"help": "Keep only the first so many layers of the LLM (default: all)."}
    )
    prompt: Literal["micl", "basic", "text"] = field(
        default="micl",
        metadata={
            "help": "micl: image half, then text half, each compressed into one word; basic: one prompt with the image "
            "inside (the MLRM baseline); text: no visual tokens (late fusion only)."
        },
    )
    language: Literal["en", "zh"] = field(default="en", metadata={"help": "Language of the prompt."})
    template: Template = field(
        default="paper",
        metadata={
            "help": "Words of the prompt. paper: those of NoteLLM-2; compact: the same order in a quarter of the "
            "tokens or less, faster, and to be trained with. A checkpoint keeps the words that it was made with."
        },
    )
    connector: Literal["qformer", "mlp"] = field(
        default="qformer", metadata={"help": "What turns patches into visual tokens; unused with --prompt text."}
    )
    num_visual_tokens: int = field(default=16, metadata={"help": "Visual tokens an image (L_c in the paper)."})
    qformer_layers: int = field(default=6, metadata={"help": "Layers of the Q-Former."})
    qformer_hidden_size: int = field(
        default=768, metadata={"help": "Width of the Q-Former; a multiple of 64, the width of one attention head."}
    )
    standardize_states: bool = field(
        default=False,
        metadata={
            "help": "Move and scale the LLM's states to mean 0 and deviation 1 over the training notes, which the "
            "warm-up of training measures (head_warmup_steps): what differs between notes is a small part of the "
            "states of a pretrained LLM. Start with a temperature of 0.3 or so: the embeddings differ more, too."
        },
    )
    late_fusion: Literal["scalar", "vector", "none"] = field(
        default="scalar",
        metadata={"help": "One predicted weight a note (the paper), one a dimension (the paper's code), or none."},
    )
    late_fusion_initial_weight: float = field(
        default=0.1, metadata={"help": "Weight of the image before training, between 0 and 1."}
    )
    late_fusion_normalize: bool = field(
        default=True, metadata={"help": "Bring both sides of the gate to one norm (False: the paper's code)."}
    )
    embedding_dim: int = field(
        default=64, metadata={"help": "Width of the note embedding; 0 keeps the LLM's width and adds no head."}
    )
    initial_temperature: float = field(
        default=0.05, metadata={"help": "Softmax temperature of the contrastive loss before training."}
    )
    learnable_temperature: bool = field(default=True, metadata={"help": "Whether the temperature trains."})
    max_title_tokens: int = field(default=32, metadata={"help": "Titles are cut to so many tokens."})
    max_topics_tokens: int = field(default=32, metadata={"help": "Topics are cut to so many tokens."})
    max_content_tokens: int = field(default=128, metadata={"help": "Contents are cut to so many tokens."})
    composition_seed: int = field(default=0, metadata={"help": "Seed of everything that starts at random."})


@dataclass
class OutputArguments:
    """Where the checkpoint goes."""

    output: str = field(metadata={"help": "Folder for the checkpoint: weights, config, processor, tokenizer, code."})


def compose(arguments: CompositionArguments) -> NoteLLM2PreTrainedModel:
    """Build the untrained model that `arguments` describe, with its processor (`model.processor`).

    Raises:
        OSError: a model is not to be found.
        ValueError: no LLM, settings that contradict one another, a backbone of another kind, or a `model` that is no
            NoteLLM-2 checkpoint.
    """
    if arguments.model is not None:
        loaded = AutoModel.from_pretrained(arguments.model)
        if not isinstance(loaded, NoteLLM2PreTrainedModel):
            raise ValueError(
                f"model={arguments.model!r} is a {type(loaded).__name__}: give a NoteLLM-2 checkpoint, or join two "
                "backbones with llm and vision."
            )
        return loaded
    if arguments.multimodal_llm is not None:
        return _multimodal_llm(arguments)
    if arguments.max_image_pixels is not None:
        raise ValueError(
            f"max_image_pixels={arguments.max_image_pixels} without multimodal_llm: a vision tower's image processor "
            "has a size of its own; leave it unset."
        )
    if arguments.llm is None:
        raise ValueError("llm is missing: give --llm a local folder or a Hub id of a decoder LLM.")
    if arguments.qformer_hidden_size % 64:
        raise ValueError(f"qformer_hidden_size={arguments.qformer_hidden_size} must be a multiple of 64.")
    vision = arguments.vision or None  # a YAML file's tower can only be taken back with an empty string
    check_llm(arguments.llm)
    if vision is not None:
        check_tower(vision)
    prompt = arguments.prompt if vision is not None else "text"
    processor = NoteLLM2Processor.from_backbones(
        arguments.llm,
        vision,
        prompt=prompt,
        language=arguments.language,
        template=arguments.template,
        num_visual_tokens=arguments.num_visual_tokens,
        **_text_lengths(arguments),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.composition_seed)
        return NoteLLM2Model.from_backbones(
            arguments.llm,
            vision,
            num_text_layers=arguments.num_text_layers,
            processor=processor,
            connector=None if prompt == "text" else arguments.connector,
            qformer_config={
                "num_hidden_layers": arguments.qformer_layers,
                "hidden_size": arguments.qformer_hidden_size,
                "num_attention_heads": arguments.qformer_hidden_size // 64,
                "intermediate_size": 4 * arguments.qformer_hidden_size,
            },
            standardize_states=arguments.standardize_states,
            late_fusion=None if arguments.late_fusion == "none" else arguments.late_fusion,
            late_fusion_initial_weight=arguments.late_fusion_initial_weight,
            late_fusion_normalize=arguments.late_fusion_normalize,
            embedding_dim=arguments.embedding_dim or None,
            initial_temperature=arguments.initial_temperature,
            learnable_temperature=arguments.learnable_temperature,
        )


def _multimodal_llm(arguments: CompositionArguments) -> MultimodalLLM:
    assert arguments.multimodal_llm is not None
    for name in ("llm", "vision", "num_text_layers"):
        if getattr(arguments, name):
            raise ValueError(
                f"multimodal_llm={arguments.multimodal_llm!r} with {name}={getattr(arguments, name)!r}: it has all "
                "parts of its own; give one or the other."
            )
    processor = MultimodalLLMProcessor.from_backbone(
        arguments.multimodal_llm,
        arguments.max_image_pixels,
        language=arguments.language,
        template=arguments.template,
        **_text_lengths(arguments),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.composition_seed)
        return MultimodalLLM.from_backbone(
            arguments.multimodal_llm,
            processor=processor,
            standardize_states=arguments.standardize_states,
            embedding_dim=arguments.embedding_dim or None,
            initial_temperature=arguments.initial_temperature,
            learnable_temperature=arguments.learnable_temperature,
        )


def _text_lengths(arguments: CompositionArguments) -> dict[str, int]:
    return {
        "max_title_tokens": arguments.max_title_tokens,
        "max_topics_tokens": arguments.max_topics_tokens,
        "max_content_tokens": arguments.max_content_tokens,
    }


def save_checkpoint(model: NoteLLM2PreTrainedModel, output: str | os.PathLike) -> None:
    """Write model, processor, tokenizer and (of a NoteLLM-2) code as one folder."""
    model.save_pretrained(output)
    model.processor.save_pretrained(output)


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` as in `sys.argv[1:]`."""
    kinds: Any = [CompositionArguments, OutputArguments]
    parser = HfArgumentParser(
        kinds,
        prog="python -m hub.compose",
        description="Join an LLM and a vision tower into an untrained NoteLLM-2 checkpoint.",
    )
    arguments, output = parser.parse_args_into_dataclasses(argv)
    try:
        model = compose(arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    save_checkpoint(model, output.output)
    parameters = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_children()
        if module is not None
    }
    files = sorted(path.name for path in Path(output.output).iterdir())
    sys.stdout.write(
        f"{output.output}: {', '.join(files)}\nparameters: {json.dumps(parameters)}\n"
        f"The model is untrained: only its backbones know anything yet.\n"
    )
    if isinstance(model, NoteLLM2Model):  # the only one whose folder carries its code
        sys.stdout.write(f"Check it with: python -m hub.verify {output.output}\n")


if __name__ == "__main__":
    main()
