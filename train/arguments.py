"""Settings of a training run, each with its meaning for `--help`, and how a YAML file and the command line meet."""

import json
import os
import sys
from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser, TrainingArguments

from hub.compose import CompositionArguments
from pairs.command import CommandParser
from pairs.query import Direction, PairOptions, Score
from pairs.simulate import SimulationOptions
from pairs.split import SplitBy, SplitOptions
from train.batches import BatchKind, BatchOptions
from train.data import BadImages
from train.losses import TILE_SIZE

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "simulated.yaml"


@dataclass
class DataArguments:
    """Which notes to train on, and what makes two of them related."""

    notes: str | None = field(
        default=None,
        metadata={
            "help": "Table of notes (CSV, JSON lines, Parquet, a folder or Hub id): note_id, title, topics, content, "
            "image. Without one the simulated world is used."
        },
    )
    image_root: str | None = field(
        default=None,
        metadata={
            "help": "Folder that images must lie in; by default that of the table of notes, which could else name any "
            "file of this machine. / for anywhere."
        },
    )
    views: str | None = field(
        default=None,
        metadata={"help": "Log of views: user_id, note_id, timestamp; a file, a pattern, a folder or a URL."},
    )
    splits: str | None = field(
        default=None,
        metadata={
            "help": "Folder that python -m pairs.split wrote (there with all its options, and on Spark, too), in place "
            "of notes and views, over which it wins; the pair and split settings here are then not used."
        },
    )
    num_simulated_notes: int = field(default=2000, metadata={"help": "Size of the simulated world."})
    num_simulated_subjects: int = field(
        default=12, metadata={"help": "Subjects of the simulated world: what a note's text tells."}
    )
    num_simulated_looks: int = field(
        default=8, metadata={"help": "Looks of the simulated world: what a note's picture tells."}
    )
    pair_window_days: float = field(
        default=7.0, metadata={"help": "A user views two related notes within this many days."}
    )
    pair_direction: Direction = field(
        default="both", metadata={"help": "Whether the order of two views matters (forward) or not."}
    )
    pair_score: Score = field(
        default="cosine", metadata={"help": "How related notes are ranked: python -m pairs.build --help explains each."}
    )
    pair_min_score: float = field(default=0.0, metadata={"help": "Drop pairs that score lower."})
    pair_max_score: float | None = field(default=None, metadata={"help": "Drop pairs that score higher."})
    pair_min_count: int = field(default=1, metadata={"help": "Drop pairs that fewer users viewed."})
    pair_min_note_users: int = field(default=1, metadata={"help": "Leave out of pairs what fewer users viewed."})
    pair_top_k: int = field(default=10, metadata={"help": "Related notes kept of each note."})
    pair_max_as_related: int | None = field(
        default=None, metadata={"help": "A note is the related note of at most so many others."}
    )
    split_by: SplitBy = field(
        default="note", metadata={"help": "note: test notes are new; time: test pairs are of the last days; both."}
    )
    validation_share: float = field(default=0.1, metadata={"help": "Share of the notes kept for validation."})
    test_share: float = field(default=0.25, metadata={"help": "Share of the notes kept for the test."})
    validation_days: float = field(
        default=3.0, metadata={"help": "Days before the test's for validation (split_by time or both)."}
    )
    test_days: float = field(default=7.0, metadata={"help": "Last days, for the test (split_by time or both)."})
    split_seed: int = field(default=0, metadata={"help": "Seed of the split of notes."})

    def __post_init__(self) -> None:
        if (self.notes is None) != (self.views is None):
            missing = "notes" if self.notes is None else "views"
            raise ValueError(f"notes and views go together, and {missing} is not given: give both, or neither.")
        if self.splits is not None:
            self.notes = self.views = None

    @property
    def pair_options(self) -> PairOptions:
        """The pair settings as `pairs.query` takes them."""
        return PairOptions(
            window_days=self.pair_window_days,
            direction=self.pair_direction,
            score=self.pair_score,
            min_score=self.pair_min_score,
            max_score=self.pair_max_score,
            min_count=self.pair_min_count,
            min_note_users=self.pair_min_note_users,
            top_k=self.pair_top_k,
            max_as_related=self.pair_max_as_related,
        )

    @property
    def split_options(self) -> SplitOptions:
        """The split settings as `pairs.split` takes them."""
        return SplitOptions(
            by=self.split_by,
            validation=self.validation_share,
            test=self.test_share,
            validation_days=self.validation_days,
            test_days=self.test_days,
            seed=self.split_seed,
        )

    @property
    def simulation_options(self) -> SimulationOptions:
        """The simulated world to use where there are no notes."""
        return SimulationOptions(
            notes=self.num_simulated_notes, subjects=self.num_simulated_subjects, looks=self.num_simulated_looks
        )


@dataclass
class NoteLLM2TrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, and what NoteLLM-2 adds."""

    output_dir: str = field(default="runs/notellm2", metadata={"help": "Folder of checkpoints, logs, data and report."})
    llm_tuning: Literal["frozen", "lora", "full"] = field(
        default="frozen",
        metadata={
            "help": "frozen: train connector, fusion, <IMG_EMB> and head only (the paper's description); lora: also "
            "LoRA adapters on the LLM; full: the whole LLM (the paper's code)."
        },
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the LoRA adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the LoRA adapters, divided by the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the LoRA adapters."})
    lora_target_modules: str = field(
        default="all-linear", metadata={"help": "LLM modules to adapt: all-linear, or a regular expression."}
    )
    visual_loss_weight: float = field(
        default=1 / 9,
        metadata={"help": "α in L = (L_m + α·L_v) / (1 + α), the weight of the loss on n_v (mICL prompts only)."},
    )
    connector_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of what comes before the LLM: connector, <IMG_EMB> (default: learning_rate)."},
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of what comes after the LLM: the gate and its projection, the head, the temperature "
            "(default: learning_rate)."
        },
    )
    head_warmup_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the head's warm-up, which decays to zero (default: head_learning_rate). May be "
            "higher than that of the training after it, whose batches hold fewer negatives."
        },
    )
    head_warmup_steps: int = field(
        default=0,
        metadata={
            "help": "Steps in which only what comes after the LLM trains, before everything does, at "
            "head_warmup_learning_rate (try 1e-3) and on 64 pairs each: the backbones run once over 16,384 training "
            "notes at most. A hundred or two for a pretrained LLM; 0: none (the paper). warmup_steps is another thing: "
            "it belongs to the schedule of the learning rate."
        },
    )
    batches: BatchKind = field(
        default="pairs",
        metadata={
            "help": "pairs: per_device_train_batch_size pairs drawn at random; graph: connected neighbourhoods of the "
            "graph of pairs, of twice as many notes in all, and every pair among these notes is learned from."
        },
    )
    neighborhood_size: int = field(
        default=8, metadata={"help": "batches=graph: the most notes of one neighbourhood; a batch holds many of them."}
    )
    mini_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Encode a batch so many notes at a time, of like length, so that little is padded: the same "
            "gradients. Not under DeepSpeed. Unset: all at once."
        },
    )
    gradcache: bool = field(
        default=True,
        metadata={
            "help": "With mini_batch_size: encode each mini-batch twice and keep no graph in between (GradCache), so "
            "that memory does not grow with the batch; works on one device, under DDP and FSDP2, with LoRA, gradient "
            "checkpointing and mixed precision. Use it with vision_features=store: otherwise the pixels of the whole "
            "batch are loaded at once (600 kB an image). False: keep all graphs, which is faster where they fit; one "
            "device or DDP."
        },
    )
    loss_tile_size: int = field(
        default=TILE_SIZE,
        metadata={
            "help": "Notes are compared in tiles of this many by as many: memory and speed of the loss, no more."
        },
    )
    mask_same_image: bool = field(
        default=False, metadata={"help": "Notes with the same cover image are no negatives of each other."}
    )
    logq_correction: bool = field(
        default=False,
        metadata={
            "help": "Take the logarithm of how often a note is drawn off its logits, so that popular notes, which are "
            "negatives more often, do not pay for it (batches=pairs; batches=graph draws all alike)."
        },
    )
    hard_negatives: int = field(
        default=0,
        metadata={
            "help": "Notes to add for every two notes of a batch, which the model of the beginning of the epoch took "
            "for related to a note of the batch, while no pair says so. They cost as much as any other note."
        },
    )
    hard_negative_pool: int = field(
        default=20, metadata={"help": "hard_negatives are drawn from so many candidates of each note."}
    )
    max_negative_similarity: float = field(
        default=0.95,
        metadata={
            "help": "No hard negative is more similar (cosine): it is likely to be related, though nobody saw it."
        },
    )
    text_dropout: float = field(
        default=0.0, metadata={"help": "Withhold the text of a note that has an image with this probability."}
    )
    image_dropout: float = field(
        default=0.0, metadata={"help": "Withhold the image of a note that has a text with this probability."}
    )
    matryoshka_dims: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Leading dimensions that are to be embeddings of their own (encode(truncate_dim=…)), the full "
            "width among them: the loss is the mean over these."
        },
    )
    bad_images: BadImages = field(
        default="text-only",
        metadata={
            "help": "What becomes of a training note whose image cannot be read. text-only: it is a note without "
            "image (or left out, if it has no text); drop-pair: it and its pairs are left out; raise: the run ends. "
            "The logs count them."
        },
    )
    vision_features: Literal["recompute", "store"] = field(
        default="recompute",
        metadata={
            "help": "recompute: run the frozen tower in every step; store: run it once for every image and keep its "
            "output in vision_features_dir (the same result, faster)."
        },
    )
    vision_features_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the store, which runs may share: features are found by image content, tower and image "
            "processor. Needs (P + 1) · d_v numbers an image. Default: vision_features in output_dir."
        },
    )
    eval_untrained: bool = field(default=True, metadata={"help": "Measure the untrained model on the test notes, too."})
    eval_ks: list[int] = field(default_factory=lambda: [10, 100], metadata={"help": "Cut-offs of Recall@K and NDCG@K."})
    report_to: str | None = field(
        default="tensorboard", metadata={"help": "Where to log: tensorboard, wandb, …, all or none."}
    )
    dataloader_drop_last: bool = field(
        default=False, metadata={"help": "Must stay False: it would drop notes of the evaluation, too."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: notes are mappings, not columns of tensors."}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["note_index"], metadata={"help": "Inputs that are no inputs of the model."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.deepspeed_plugin is not None:
            # A file of configs/accelerate says it to DeepSpeed alone, and `Trainer` refuses two that disagree.
            self.bf16 |= os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
            self.fp16 |= os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16"
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin memory for, and torch warns of it
        if self.visual_loss_weight < 0:
            raise ValueError(f"visual_loss_weight={self.visual_loss_weight} must not be negative (the paper: 1/9).")
        if self.head_warmup_steps < 0:
            raise ValueError(f"head_warmup_steps={self.head_warmup_steps} must not be negative (0: no warm-up).")
        if self.head_warmup_steps and self.head_learning_rate is None and self.head_warmup_learning_rate is None:
            raise ValueError(
                f"head_warmup_steps={self.head_warmup_steps} without head_learning_rate: the LLM's rate is too "
                "small for a head; set head_warmup_learning_rate, for instance to 1e-3."
            )
        for name, least in (
            ("mini_batch_size", 1),
            ("neighborhood_size", 2),
            ("loss_tile_size", 1),
            ("hard_negatives", 0),
            ("hard_negative_pool", 1),
        ):
            number = getattr(self, name)
            if number is not None and number < least:
                raise ValueError(f"{name}={number}: give {least} or more.")
        for name in ("text_dropout", "image_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a probability below 1.")
        if self.text_dropout + self.image_dropout > 1:
            raise ValueError(
                f"text_dropout={self.text_dropout} and image_dropout={self.image_dropout} add up to more than 1, and a "
                "note never loses both: lower one."
            )
        if not -1 <= self.max_negative_similarity <= 1:
            raise ValueError(f"max_negative_similarity={self.max_negative_similarity}: give a cosine, from -1 to 1.")
        if self.logq_correction and self.batches == "graph":
            raise ValueError("logq_correction=True with batches=graph, which draws all notes alike: leave it False.")
        if self.logq_correction and self.hard_negatives:
            raise ValueError(
                f"logq_correction=True with hard_negatives={self.hard_negatives}, which are not drawn by how many "
                "pairs a note has: use one of them."
            )
        if len(set(self.matryoshka_dims)) < len(self.matryoshka_dims):
            raise ValueError(f"matryoshka_dims={self.matryoshka_dims} names a width twice: name each once.")
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size=True: use mini_batch_size, whose memory does not depend on the batch."
            )
        if self.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.n_gpu} GPUs, and would split notes and images differently among them: start "
                "one process a GPU with `accelerate launch`."
            )
        if self.dataloader_drop_last:
            raise ValueError("dataloader_drop_last=True would drop notes of the evaluation, too: leave it False.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the notes: leave it False.")

    @property
    def dims(self) -> tuple[int, ...] | None:
        """`matryoshka_dims` as the loss takes them."""
        return tuple(self.matryoshka_dims) or None

    def batch_options(self, processes: int) -> BatchOptions:
        """How the batches of so many processes are made."""
        return BatchOptions(
            kind=self.batches,
            pairs=self.per_device_train_batch_size * processes,
            neighborhood=self.neighborhood_size,
            hard_negatives=self.hard_negatives,
            text_dropout=self.text_dropout,
            image_dropout=self.image_dropout,
            seed=self.seed if self.data_seed is None else self.data_seed,
        )

    def lora_settings(self) -> dict[str, Any]:
        """Arguments of `peft.LoraConfig`."""
        return {
            "r": self.lora_rank,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": self.lora_target_modules,
        }


class _Parser(CommandParser, HfArgumentParser):
    """Without 200 lines of usage before what is wrong."""


_KINDS: tuple[Any, ...] = (CompositionArguments, DataArguments, NoteLLM2TrainingArguments)
Arguments = tuple[CompositionArguments, DataArguments, NoteLLM2TrainingArguments]


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """Read `[CONFIG.yaml] [--option value …]`; the command line wins. Without a file: `configs/simulated.yaml`.

    Ends the process with a message that names the option, as a command should, where something is wrong.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(
        list(_KINDS),
        prog="train/run.py",
        usage="accelerate launch %(prog)s [CONFIG.yaml] [--option VALUE …]",
        description="Train NoteLLM-2. Options may stand in a YAML file, and on the command line, which wins. Without "
        "any, the embedded example runs: simulated notes and views, tiny backbones, under five minutes on two cores.",
        allow_abbrev=False,  # as in a file
    )
    config = DEFAULT_CONFIG
    if argv and not argv[0].startswith("-"):
        config, argv = Path(argv[0]), argv[1:]
    if not config.is_file():
        parser.error(f"config={str(config)!r} does not exist: give a YAML file such as configs/movies.yaml")
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"config={str(config)!r} is no YAML: {' '.join(str(error).split())}")
    if not isinstance(settings, dict):
        parser.error(f"{config} must hold lines of the form `option: value`")
    if (unknown := _unknown(settings)) is not None:
        parser.error(f"{config} sets {unknown!r}, which is no option")
    # As words of a command line, so that a file's values are checked like any others; the real one comes last and wins.
    words = [word for name, value in settings.items() for word in _option(name, value)]
    try:
        composition, data, training, unknown_words = parser.parse_args_into_dataclasses(
            [*words, *argv], return_remaining_strings=True
        )
    except ValueError as error:
        parser.error(str(error))
    if unknown_words:
        is_option = unknown_words[0].startswith("-")
        parser.error(
            f"{unknown_words[0]} is no option{'' if is_option else ': a config comes first, before all options'}"
        )
    return composition, data, training


def changed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options that `settings` change from their defaults, with the values that `parse_arguments` reads them as.

    Two files of settings that mean the same give the same: `learning_rate: 1e-3`, which is a string in YAML, is a
    number here, and what equals a default is left out. Whether the options agree with one another is not checked.

    Raises:
        ValueError: a name that is no option, or a value that its option cannot have.
    """
    if (unknown := _unknown(settings)) is not None:
        raise ValueError(f"{unknown!r} is no option of train/run.py: see its --help.")
    parser = HfArgumentParser(list(_KINDS), exit_on_error=False)
    try:
        values = vars(parser.parse_args([word for name, value in settings.items() for word in _option(name, value)]))
    except ArgumentError as error:
        raise ValueError(f"{error} (an option of train/run.py; see its --help)") from error
    defaults = vars(parser.parse_args([]))
    return {name: value for name, value in values.items() if value != defaults[name]}


def _unknown(settings: Mapping[str, Any]) -> str | None:
    """The first name that is no option, if any."""
    known = {option.name for kind in _KINDS for option in fields(kind) if option.init}
    return next((name for name in settings if name not in known), None)


def _option(name: str, value: Any) -> list[str]:
    """One entry of a YAML file as words of a command line; null leaves the option alone."""
    if value is None:
        return []
    if isinstance(value, dict):
        return [f"--{name}", json.dumps(value)]
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(str(item) for item in values)]


__all__ = ["Arguments", "DataArguments", "NoteLLM2TrainingArguments", "changed_settings", "parse_arguments"]
