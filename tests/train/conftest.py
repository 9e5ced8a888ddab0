"""A tiny world on disk and arguments for tiny runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import set_seed

from hub.tiny_backbones import save_tiny_llm, save_tiny_vision_tower
from modeling_notellm2 import NoteLLM2Model
from pairs.query import PairOptions
from pairs.simulate import SimulationOptions, simulate
from pairs.split import NotesAndPairs, SplitOptions, load_split, make_splits
from pairs.tables import load_notes, related_indices
from train.arguments import NoteLLM2TrainingArguments
from train.data import NoteDataset, PairDataset
from train.trainer import NoteLLM2Trainer

OPTIONS = SimulationOptions(notes=96, subjects=3, looks=3, users=150, image_size=24, seed=1)


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """notes.jsonl, views.csv and images of a small simulated world."""
    folder = tmp_path_factory.mktemp("world")
    simulate(OPTIONS).write(folder)
    return folder


@pytest.fixture(scope="session")
def splits(world_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, NotesAndPairs]:
    """Train, validation and test of the small world."""
    folder = tmp_path_factory.mktemp("splits")
    notes, views = load_notes(world_folder / "notes.jsonl"), world_folder / "views.csv"
    make_splits(notes, views, PairOptions(score="cosine", top_k=5), SplitOptions(validation=0.2, test=0.2), folder)
    return {name: load_split(folder, name) for name in ("train", "validation", "test")}


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory, splits: dict[str, NotesAndPairs]) -> tuple[Path, Path]:
    """Folders of a tiny LLM and a tiny vision tower."""
    root = tmp_path_factory.mktemp("backbones")
    texts = [f"{note['title']} {note['content']}" for note in splits["train"].notes]
    return save_tiny_llm(texts, root / "llm", hidden_size=32), save_tiny_vision_tower(root / "vision", 24, 32)


@pytest.fixture
def build_model(backbones: tuple[Path, Path]) -> Callable[..., NoteLLM2Model]:
    """A fresh tiny model; the same settings give the same weights."""

    def build(**config: Any) -> NoteLLM2Model:
        set_seed(0)
        qformer = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        settings = {"num_visual_tokens": 2, "embedding_dim": 16, "qformer_config": qformer, **config}
        return NoteLLM2Model.from_backbones(*backbones, **settings)

    return build


@pytest.fixture
def build_trainer(
    splits: dict[str, NotesAndPairs], build_model: Callable[..., NoteLLM2Model], tmp_path: Path
) -> Callable[..., NoteLLM2Trainer]:
    """A trainer on the small world; keyword arguments go to the training arguments."""

    def build(model: NoteLLM2Model | None = None, **arguments: Any) -> NoteLLM2Trainer:
        settings = {
            "output_dir": str(tmp_path / "run"),
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
        return NoteLLM2Trainer(
            model=model or build_model(),
            args=NoteLLM2TrainingArguments(**settings),
            train_dataset=PairDataset(*splits["train"]),
            eval_dataset=NoteDataset(validation.notes),
            eval_related=related_indices(list(validation.notes["note_id"]), validation.pairs),
        )

    return build
