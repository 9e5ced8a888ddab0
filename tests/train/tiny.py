"""Tiny models and trainers, for tests of one process and of several; and a way to run several."""

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import multiprocessing
from transformers import set_seed

from modeling_notellm2 import NoteLLM2Model
from pairs.split import NotesAndPairs, load_split
from pairs.tables import related_indices
from train.arguments import NoteLLM2TrainingArguments
from train.data import NoteDataset, PairDataset
from train.features import VisionFeatureStore, VisionFeatureTable
from train.trainer import NoteLLM2Trainer

Backbones = tuple[Path, Path]


def load_splits(folder: Path) -> dict[str, NotesAndPairs]:
    return {name: load_split(folder, name) for name in ("train", "validation", "test")}


def build_model(backbones: Backbones, dropout: float = 0.1, **config: Any) -> NoteLLM2Model:
    """The same settings give the same weights. The masks of the Q-Former's dropout depend on how a batch is divided."""
    set_seed(0)
    qformer = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    qformer |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    settings = {"num_visual_tokens": 2, "embedding_dim": 16, "qformer_config": qformer, **config}
    return NoteLLM2Model.from_backbones(*backbones, **settings)


def build_trainer(
    splits: dict[str, NotesAndPairs],
    model: NoteLLM2Model,
    output_dir: Path | str,
    store: Path | None = None,
    **arguments: Any,
) -> NoteLLM2Trainer:
    settings = {
        "output_dir": str(output_dir),
        "max_steps": 4,
        "per_device_train_batch_size": 6,
        "per_device_eval_batch_size": 16,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "eval_ks": [5, 10],
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **arguments,
    }
    validation = splits["validation"]

    def features_of(notes: Dataset) -> VisionFeatureTable | None:
        return None if store is None else VisionFeatureStore(store, model).table(notes)

    return NoteLLM2Trainer(
        model=model,
        args=NoteLLM2TrainingArguments(**settings),
        train_dataset=PairDataset(*splits["train"], features_of(splits["train"].notes)),
        eval_dataset=NoteDataset(validation.notes, features_of(validation.notes)),
        eval_related=related_indices(list(validation.notes["note_id"]), validation.pairs),
    )


def run_processes(processes: int, function: Callable[..., None], *arguments: Any) -> None:
    """Run a function of a module in several processes that can talk to each other (gloo, on the CPU).

    They are forked from a server that has imported the libraries, which takes longer than most of what they do.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    get_context("forkserver").set_forkserver_preload(["tests.train.tiny"])
    multiprocessing.start_processes(
        _enter, (processes, port, function, arguments), nprocs=processes, start_method="forkserver"
    )


def _enter(rank: int, processes: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)
    function(*arguments)
