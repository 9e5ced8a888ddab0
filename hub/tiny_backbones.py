"""Tiny, randomly initialised backbones saved as ordinary Hugging Face folders.

The embedded default of `train/run.py` and the tests need an LLM and a vision tower without any download. They go
through the same loading code as real ones.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the control tokens of a chat LLM, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", additional_special_tokens=special_tokens[1:]
    )


def save_random_model(config: PreTrainedConfig, folder: str | os.PathLike, seed: int = 0) -> None:
    """Save a randomly initialised model of `config`; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModel.from_config(config).save_pretrained(folder)


def save_tiny_llm(texts: Iterable[str], folder: str | os.PathLike, hidden_size: int = 64, num_layers: int = 2) -> Path:
    """A small Llama with a tokenizer of its own, trained on `texts`. Returns the folder."""
    tokenizer = train_tokenizer(texts, vocab_size=1024)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    save_random_model(config, folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def save_tiny_vision_tower(folder: str | os.PathLike, image_size: int = 48, hidden_size: int = 64) -> Path:
    """A small CLIP-type ViT with its image processor. Returns the folder."""
    config = CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=image_size // 6,
    )
    save_random_model(config, folder)
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
    return Path(folder)
