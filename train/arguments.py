"""Settings of a training run, each with its meaning for `--help`, and how a YAML file and the command line meet."""

import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser, TrainingArguments

from hub.compose import CompositionArguments
from pairs.query import Direction, PairOptions, Score
from pairs.simulate import SimulationOptions
from pairs.split import SplitBy, SplitOptions

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
            raise ValueError(f"notes={self.notes!r} and views={self.views!r} go together: give both, or neither.")
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
        return SimulationOptions(notes=self.num_simulated_notes)


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
    head_warmup_steps: int = field(
        default=0,
        metadata={
            "help": "Steps in which only what comes after the LLM trains, before everything does, at "
            "head_learning_rate (try 1e-3) and on 64 pairs each: the backbones run once over 16,384 training notes at "
            "most. A hundred or two for a pretrained LLM; 0: none (the paper). warmup_steps is another thing: it "
            "belongs to the schedule of the learning rate."
        },
    )
    vision_features: Literal["recompute", "memory"] = field(
        default="recompute",
        metadata={
            "help": "recompute: run the frozen tower in every step; memory: run it once for every note and keep its "
            "output (the same result, faster, P · d_v · 4 bytes a note)."
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
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin memory for, and torch warns of it
        if self.visual_loss_weight < 0:
            raise ValueError(f"visual_loss_weight={self.visual_loss_weight} must not be negative (the paper: 1/9).")
        if self.head_warmup_steps < 0:
            raise ValueError(f"head_warmup_steps={self.head_warmup_steps} must not be negative (0: no warm-up).")
        if self.head_warmup_steps and self.head_learning_rate is None:
            raise ValueError(
                f"head_warmup_steps={self.head_warmup_steps} without head_learning_rate: the LLM's rate is too "
                "small for a head; set head_learning_rate, for instance to 1e-3."
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

    def lora_settings(self) -> dict[str, Any]:
        """Arguments of `peft.LoraConfig`."""
        return {
            "r": self.lora_rank,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": self.lora_target_modules,
        }


_KINDS: tuple[Any, ...] = (CompositionArguments, DataArguments, NoteLLM2TrainingArguments)
Arguments = tuple[CompositionArguments, DataArguments, NoteLLM2TrainingArguments]


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """Read `[CONFIG.yaml] [--option value …]`; the command line wins. Without a file: `configs/simulated.yaml`.

    Ends the process with a message that names the option, as a command should, where something is wrong.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(
        list(_KINDS),
        prog="accelerate launch train/run.py [CONFIG.yaml]",
        description="Train NoteLLM-2. Options may stand in a YAML file, and on the command line, which wins. Without "
        "any, the embedded example runs: simulated notes and views, tiny backbones, under five minutes on two cores.",
    )
    config = DEFAULT_CONFIG
    if argv and not argv[0].startswith("-"):
        config, argv = Path(argv[0]), argv[1:]
    if not config.is_file():
        parser.error(f"config={str(config)!r} does not exist: give a YAML file such as configs/movies.yaml")
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    if not isinstance(settings, dict):
        parser.error(f"{config} must hold lines of the form `option: value`")
    known = {option.name for kind in _KINDS for option in fields(kind) if option.init}
    for name in settings:
        if name not in known:
            parser.error(f"{config} sets {name!r}, which is no option; see --help")
    # As words of a command line, so that a file's values are checked like any others; the real one comes last and wins.
    words = [word for name, value in settings.items() for word in _option(name, value)]
    try:
        composition, data, training = parser.parse_args_into_dataclasses([*words, *argv])
    except ValueError as error:
        parser.error(str(error))
    return composition, data, training


def _option(name: str, value: Any) -> list[str]:
    """One entry of a YAML file as words of a command line; null leaves the option alone."""
    if value is None:
        return []
    if isinstance(value, dict):
        return [f"--{name}", json.dumps(value)]
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(str(item) for item in values)]


__all__ = ["Arguments", "DataArguments", "NoteLLM2TrainingArguments", "parse_arguments"]
