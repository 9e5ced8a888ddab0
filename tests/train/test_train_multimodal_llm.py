"""A multimodal LLM is fine-tuned by the trainer and the loss of NoteLLM-2."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, set_seed

from evaluation.multimodal_llm import MultimodalLLM
from pairs.split import NotesAndPairs
from tests.backbones import MULTIMODAL_LLMS
from train.features import VisionFeatureStore
from train.run import main
from train.trainer import NoteLLM2Trainer

BuildTrainer = Callable[..., NoteLLM2Trainer]
Folder = Callable[[str], Path]


@pytest.fixture
def load(multimodal_llm_folder: Folder) -> Callable[..., MultimodalLLM]:
    def from_backbone(name: str, embedding_dim: int | None = 16) -> MultimodalLLM:
        set_seed(0)
        return MultimodalLLM.from_backbone(multimodal_llm_folder(name), embedding_dim=embedding_dim)

    return from_backbone


def loss_of_first_batch(trainer: NoteLLM2Trainer) -> float:
    """Without dropout, on the batch that a run begins with."""
    (batch, *_rest) = trainer.get_train_dataloader()
    trainer.model.eval()
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, batch))


@pytest.mark.parametrize(
    ("name", "llm_tuning"),
    [
        *((name, "full") for name in sorted(MULTIMODAL_LLMS)),
        ("blip-2", "lora"),
        ("qwen3_vl", "lora"),
        ("blip-2", "frozen"),
    ],
)
def test_a_few_steps_lower_the_loss_and_survive_saving(
    name: str,
    llm_tuning: str,
    load: Callable[..., MultimodalLLM],
    build_trainer: BuildTrainer,
    splits: dict[str, NotesAndPairs],
    tmp_path: Path,
):
    trainer = build_trainer(load(name), llm_tuning=llm_tuning, max_steps=5, learning_rate=5e-3, lora_rank=4)
    model = trainer.model
    parts: dict[str, str] = {group["part"]: "" for group in trainer.parameter_groups(model)}
    assert set(parts) == ({"connector", "head"} if llm_tuning == "frozen" else {"llm", "connector", "head"})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = loss_of_first_batch(trainer)
    trainer.train()
    assert loss_of_first_batch(trainer) < first - 0.01
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= {n for n, p in model.named_parameters() if p.requires_grad}
    of_llm = {n for n in moved if "language_model" in n}
    assert bool(of_llm) == (llm_tuning != "frozen")
    assert all(("lora_" in n) == (llm_tuning == "lora") for n in of_llm)
    assert any(n.startswith(model.parts["connector"]) for n in moved) and "head.weight" in moved
    trainer.save_model(str(tmp_path / "saved"))
    notes = list(splits["test"].notes)[:6]
    loaded = AutoModel.from_pretrained(tmp_path / "saved")
    expected = model.encode(notes)
    np.testing.assert_allclose(loaded.encode(notes), expected, atol=1e-5)
    assert np.abs(load(name).encode(notes) - expected).max() > 1e-3


@pytest.mark.parametrize("name", ["blip-2", "qwen3_vl"])
@pytest.mark.parametrize("gradcache", [True, False])
def test_mini_batches_give_the_gradients_of_the_whole_batch(
    name: str, gradcache: bool, load: Callable[..., MultimodalLLM], build_trainer: BuildTrainer
):
    gradients = []
    for size in (None, 3):
        settings: dict[str, Any] = {"mini_batch_size": size, "gradcache": gradcache, "image_dropout": 0.3}
        trainer = build_trainer(load(name), llm_tuning="full", **settings, text_dropout=0.3)
        (batch, *_rest) = trainer.get_train_dataloader()
        assert (len(batch["mini_batches"]) > 1) == (size is not None)
        trainer.compute_loss(trainer.model, batch).backward()
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert all(grad is not None for grad in gradients[0].values())
    for part, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][part], grad, atol=1e-5, rtol=1e-3)
    assert any(grad.abs().max() > 1e-3 for grad in gradients[0].values())  # control: there is something to compare


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("blip-2", {"batches": "graph", "hard_negatives": 1, "mini_batch_size": 4}),
        ("qwen2_vl", {"head_warmup_steps": 3, "head_learning_rate": 1e-3}),
        ("qwen3_vl", {"gradient_checkpointing": True, "llm_tuning": "full", "matryoshka_dims": [16, 4]}),
        ("blip-2", {"gradient_checkpointing": True, "llm_tuning": "lora"}),
        ("qwen2_5_vl", {"mask_same_image": True, "bf16": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_trains_with_the_trainers_features(
    name: str, settings: dict[str, Any], load: Callable[..., MultimodalLLM], build_trainer: BuildTrainer
):
    trainer = build_trainer(load(name), max_steps=2, **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert "recall@5" in str(sorted(trainer.evaluate()))


def test_head_warmup_needs_a_head(load: Callable[..., MultimodalLLM], build_trainer: BuildTrainer):
    with pytest.raises(ValueError, match="head_warmup_steps=3: the model has neither a head"):
        build_trainer(load("qwen2_vl", None), head_warmup_steps=3, head_learning_rate=1e-3)


def test_its_tower_is_not_kept(
    multimodal_llm_folder: Folder, world_folder: Path, load: Callable[..., MultimodalLLM], tmp_path: Path
):
    options = ["--notes", str(world_folder / "notes.jsonl"), "--views", str(world_folder / "views.csv"), "--use_cpu"]
    options += ["--multimodal_llm", str(multimodal_llm_folder("qwen2_vl")), "--vision_features", "store"]
    with pytest.raises(SystemExit, match="vision_features=store: a multimodal LLM sees each image in its own size"):
        main([*options, "--output_dir", str(tmp_path / "run"), "--report_to", "none"])
    with pytest.raises(ValueError, match="has no vision tower"):
        VisionFeatureStore(tmp_path / "store", load("qwen2_vl"))
