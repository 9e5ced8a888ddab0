"""Tiny, randomly initialised backbones of the real classes, tokenizers of every kind, and what else tests share."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    BaseImageProcessor,
    BitImageProcessor,
    Blip2Config,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CohereConfig,
    ConvNextConfig,
    ConvNextImageProcessor,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen3Config,
    Qwen3VLConfig,
    Siglip2ImageProcessor,
    Siglip2VisionConfig,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SmolLM3Config,
    Starcoder2Config,
    TimmWrapperConfig,
    ViTConfig,
    ViTImageProcessor,
)

from hub.tiny_backbones import save_random_model, train_tokenizer
from modeling_notellm2 import NoteLLM2Model

HIDDEN_SIZE = 32
IMAGE_SIZE = 32
PATCH_SIZE = 8
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2

TEXTS = [
    "Note content: {'title': 'Oak shelf in warm light', 'topic': 'home, wood', 'content': 'sanded, oiled and hung'}",
    "Compress this note into one word: spicy noodles, garden tools, red shoes and a blue hat",
    "笔记：标题 话题 内容 压缩为一个词",
] * 10

CONTROL_TOKENS = ["<|im_end|>", "</s>"]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen's kind: no begin-of-sequence token."""
    return train_tokenizer(TEXTS, vocab_size=400)


def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 3's kind: byte-level, begin-of-sequence added by the post-processor."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def sentencepiece_tokenizer(prepend: bool = True) -> PreTrainedTokenizerFast:
    """Llama 2's kind: spaces as "▁", one put in front of every text, byte fallback, `<s>` added.

    Args:
        prepend: by the normalizer (Llama 2's older files), otherwise by a `Metaspace` pre-tokenizer.
    """
    control = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=control + byte_tokens, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["byte_fallback"] = True
    state["added_tokens"] = state["added_tokens"][: len(control)]  # bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(state))
    if prepend:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges build the control tokens out of plain letters."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for token in CONTROL_TOKENS:
        for end in range(2, len(token) + 1):
            if token[:end] not in vocab:
                merges.append((token[: end - 1], token[end - 1]))
                vocab[token[:end]] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # Like GPT-2's, its end-of-sequence token is its unknown token, too.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="</s>", additional_special_tokens=["<|im_end|>"]
    )


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """A Unigram model, whose control tokens are pieces of its vocabulary like any other."""
    letters = sorted({letter for text in TEXTS for letter in text} - {" "})
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": byte_level_tokenizer,
    "bos": bos_tokenizer,
    "prepend": sentencepiece_tokenizer,
    "metaspace": lambda: sentencepiece_tokenizer(prepend=False),
    "merging": merging_tokenizer,
    "unigram": unigram_tokenizer,
}

_LLM_SIZES = {
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# Each LLM: its configuration class, the settings of a tiny one, and a tokenizer of the kind it comes with.
LLMS: dict[str, tuple[type[PreTrainedConfig], dict, str]] = {
    "llama": (LlamaConfig, _LLM_SIZES, "byte_level"),
    "qwen2": (Qwen2Config, _LLM_SIZES, "byte_level"),
    "qwen3": (Qwen3Config, {**_LLM_SIZES, "head_dim": 8}, "byte_level"),
    # A window shorter than the prompts, on the first of the two layers.
    "gemma3": (
        Gemma3TextConfig,
        {
            **_LLM_SIZES,
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "metaspace",
    ),
    "phi3": (Phi3Config, {**_LLM_SIZES, "pad_token_id": None}, "prepend"),
    "mistral": (MistralConfig, {**_LLM_SIZES, "sliding_window": 16}, "bos"),
    # The second layer knows no positions.
    "smollm3": (SmolLM3Config, {**_LLM_SIZES, "no_rope_layers": [1, 0]}, "byte_level"),
    "gemma": (GemmaConfig, {**_LLM_SIZES, "head_dim": 8}, "metaspace"),
    "olmo2": (Olmo2Config, _LLM_SIZES, "byte_level"),
    "granite": (
        GraniteConfig,
        {**_LLM_SIZES, "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
        "byte_level",
    ),
    "starcoder2": (Starcoder2Config, {**_LLM_SIZES, "sliding_window": 16}, "byte_level"),
    "cohere": (CohereConfig, {**_LLM_SIZES, "use_qk_norm": True}, "bos"),
    "gpt2": (GPT2Config, {"n_embd": HIDDEN_SIZE, "n_layer": 2, "n_head": 4, "n_positions": 512}, "merging"),
}


def save_llm(name: str, folder: Path) -> Path:
    """Save the tiny LLM `name` of `LLMS` with its tokenizer."""
    config_class, settings, tokenizer_name = LLMS[name]
    tokenizer = TOKENIZERS[tokenizer_name]()
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    save_random_model(config_class(vocab_size=len(tokenizer), **{**tokens, "pad_token_id": None, **settings}), folder)
    tokenizer.save_pretrained(folder)
    return folder


_VIT_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
_DINO_SIZES = {key: value for key, value in _VIT_SIZES.items() if key != "intermediate_size"}
_NO_CONTROL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_SIZE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}

TOWERS: dict[str, Callable[[], tuple[PreTrainedConfig, BaseImageProcessor]]] = {
    "clip": lambda: (CLIPVisionConfig(**_VIT_SIZES), CLIPImageProcessor(size=_SIZE, crop_size=_SIZE)),
    "clip_dual": lambda: (
        CLIPConfig(
            text_config={**_VIT_SIZES, "vocab_size": 50, "max_position_embeddings": 16, **_NO_CONTROL_TOKENS},
            vision_config=_VIT_SIZES,
            projection_dim=16,
        ),
        CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=_SIZE),
    ),
    "siglip": lambda: (SiglipVisionConfig(**_VIT_SIZES), SiglipImageProcessor(size=_SIZE)),
    "siglip2": lambda: (
        Siglip2VisionConfig(**{**_VIT_SIZES, "num_patches": NUM_PATCHES}),
        Siglip2ImageProcessor(patch_size=PATCH_SIZE, max_num_patches=NUM_PATCHES),
    ),
    "dinov2": lambda: (
        Dinov2Config(**_DINO_SIZES),
        BitImageProcessor(size={"shortest_edge": 40}, crop_size=_SIZE),
    ),
    "dinov2_with_registers": lambda: (
        Dinov2WithRegistersConfig(**_DINO_SIZES, num_register_tokens=3),
        BitImageProcessor(size={"shortest_edge": 40}, crop_size=_SIZE),
    ),
    "vit": lambda: (ViTConfig(**_VIT_SIZES), ViTImageProcessor(size=_SIZE)),
    "convnext": lambda: (
        ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], image_size=64),
        ConvNextImageProcessor(size={"shortest_edge": 64}),
    ),
    "timm_cnn": lambda: _timm("test_efficientnet"),
    "timm_vit": lambda: _timm("test_vit"),  # a class token
    "timm_vit_registers": lambda: _timm("test_vit2"),  # a register, no class token
    "timm_channels_last": lambda: _timm("test_mambaout"),
}


def _timm(architecture: str) -> tuple[PreTrainedConfig, BaseImageProcessor]:
    import timm
    from transformers import TimmWrapperImageProcessor

    model = timm.create_model(architecture, pretrained=False)
    settings = {**model.pretrained_cfg, "input_size": [3, 64, 64], "crop_pct": 1.0}
    model_args = {"img_size": 64} if "vit" in architecture else None
    config = TimmWrapperConfig(architecture=architecture, model_args=model_args)
    config.pretrained_cfg = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    config.num_features = model.num_features
    return config, TimmWrapperImageProcessor(pretrained_cfg=config.pretrained_cfg, architecture=architecture)


def save_tower(name: str, folder: Path) -> Path:
    """Save the tiny vision tower `name` of `TOWERS` with its image processor."""
    config, image_processor = TOWERS[name]()
    save_random_model(config, folder)
    image_processor.save_pretrained(folder)
    assert AutoModel.from_pretrained(folder).config.model_type == config.model_type
    return folder


VISION_TOKENS = ["<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_QWEN_TEXT = {**_LLM_SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": PATCH_SIZE, "in_channels": 3}
_QWEN_WIDTHS = {"hidden_size": 16, "out_hidden_size": HIDDEN_SIZE, "intermediate_size": 32}
# Each multimodal LLM: its configuration class, and the settings of its two halves.
MULTIMODAL_LLMS: dict[str, tuple[type[PreTrainedConfig], dict, dict]] = {
    "blip-2": (
        Blip2Config,
        {**_LLM_SIZES, "ffn_dim": 64, "word_embed_proj_dim": HIDDEN_SIZE, "dropout": 0.0, "model_type": "opt"},
        {**_VIT_SIZES, "attention_dropout": 0.0},
    ),
    "qwen2_vl": (Qwen2VLConfig, _QWEN_TEXT, {**_QWEN_VISION, "embed_dim": 16, "hidden_size": HIDDEN_SIZE}),
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        _QWEN_TEXT,
        {**_QWEN_VISION, **_QWEN_WIDTHS, "window_size": 4 * PATCH_SIZE, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": (
        Qwen3VLConfig,
        {**_QWEN_TEXT, "head_dim": 8},
        {**_QWEN_VISION, **_QWEN_WIDTHS, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    ),
}


def save_multimodal_llm(name: str, folder: Path) -> Path:
    """Save the tiny model `name` of `MULTIMODAL_LLMS` as it would be released: with its words' head, its tokenizer and
    its image processor."""
    config_class, text_config, vision_config = MULTIMODAL_LLMS[name]
    tokenizer = bos_tokenizer() if name == "blip-2" else byte_level_tokenizer()
    tokenizer.add_tokens(VISION_TOKENS, special_tokens=True)
    ids = dict(zip(VISION_TOKENS, tokenizer.convert_tokens_to_ids(VISION_TOKENS), strict=True))
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    text_config = {**text_config, **tokens, "vocab_size": len(tokenizer) + 3}
    image_processor: BaseImageProcessor
    if name == "blip-2":
        qformer = {**QFORMER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "vocab_size": 30}
        settings = {"qformer_config": qformer, "num_query_tokens": 3, "image_token_index": ids["<image>"]}
        image_processor = BlipImageProcessor(size=_SIZE)
    else:
        names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
        names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
        settings = {f"{part}_token_id": ids[token] for part, token in names.items()}
        size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}  # these are areas
        image_processor = Qwen2VLImageProcessor(patch_size=PATCH_SIZE, size=size)
    config = config_class(text_config=text_config, vision_config=vision_config, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():  # the query tokens start at zero, and would hide what follows them
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return folder


QFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def random_picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture of random colours in large spots, so that resizing does not average it to grey."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    spots = np.random.default_rng(seed).integers(0, 256, (3, 4, channels), dtype=np.uint8)
    picture = Image.fromarray(spots.squeeze(-1) if channels == 1 else spots, mode=None if channels < 4 else mode)
    return picture.resize(size, Image.Resampling.NEAREST)


def move(model: NoteLLM2Model) -> None:
    """Add noise to every parameter of every part, the backbones included."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.add_(0.1 * torch.randn_like(parameter))


def save(model: NoteLLM2Model, folder: Path) -> Path:
    """Save a model and its processor."""
    model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder
