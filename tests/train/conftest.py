"""Tiny backbones, models and trainers for the tiny world."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hub.tiny_backbones import save_tiny_llm, save_tiny_vision_tower
from modeling_notellm2 import NoteLLM2Model
from pairs.split import NotesAndPairs
from tests.train import tiny
from train.trainer import NoteLLM2Trainer


@pytest.fixture(scope="session")
def splits(splits_folder: Path) -> dict[str, NotesAndPairs]:
    """The same, loaded."""
    return tiny.load_splits(splits_folder)


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
        return tiny.build_model(backbones, **config)

    return build


@pytest.fixture
def build_trainer(
    splits: dict[str, NotesAndPairs], build_model: Callable[..., NoteLLM2Model], tmp_path: Path
) -> Callable[..., NoteLLM2Trainer]:
    """A trainer on the small world; keyword arguments go to the training arguments."""

    def build(model: NoteLLM2Model | None = None, **arguments: Any) -> NoteLLM2Trainer:
        output_dir = arguments.pop("output_dir", tmp_path / "run")
        return tiny.build_trainer(splits, model or build_model(), output_dir, **arguments)

    return build
