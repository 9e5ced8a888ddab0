"""What trains and what does not, that a resumed run is the same run, and that checkpoints are whole."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModel, TrainerCallback

from evaluation.metrics import retrieval_metrics
from modeling_notellm2 import NoteError, NoteLLM2Model, NoteLLM2Output
from modeling_notellm2.modeling_notellm2 import MAX_LOGIT_SCALE
from pairs.split import NotesAndPairs
from pairs.tables import related_indices
from tests.train import tiny
from train.losses import ContrastiveTargets, contrastive_loss
from train.trainer import NoteLLM2Trainer, RetrievalEvaluation

BuildTrainer = Callable[..., NoteLLM2Trainer]
BuildModel = Callable[..., NoteLLM2Model]


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


def training_losses(trainer: NoteLLM2Trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@pytest.mark.parametrize("llm_tuning", ["frozen", "lora", "full"])
def test_only_what_should_train_does(llm_tuning: str, build_trainer: BuildTrainer):
    trainer = build_trainer(llm_tuning=llm_tuning, max_steps=2)
    model = trainer.model
    before = snapshot(model)
    trainer.train()
    names = changed(before, model)
    assert not [name for name in names if name.startswith("vision_tower.")], "the tower is frozen, bit for bit"
    llm = {name for name in names if name.startswith("language_model.")}
    if llm_tuning == "frozen":
        assert not llm
    elif llm_tuning == "lora":
        assert llm and all("lora_" in name for name in llm)
    else:
        assert "language_model.embed_tokens.weight" in llm and any("q_proj" in name for name in llm)
    for new_part in ("connector.", "late_fusion.", "head.", "image_embedding", "logit_scale"):
        assert [name for name in names if name.startswith(new_part)], f"{new_part} did not train"


def test_fixed_temperature_stays(build_model: BuildModel, build_trainer: BuildTrainer):
    model = build_model(learnable_temperature=False, initial_temperature=0.1)
    trainer = build_trainer(model, max_steps=2)
    trainer.train()
    assert model.temperature == pytest.approx(0.1)


def first_batch(trainer: NoteLLM2Trainer) -> dict[str, Any]:
    return next(iter(trainer.get_train_dataloader()))


def outputs_in_plan_order(trainer: NoteLLM2Trainer, batch: dict[str, Any]) -> tuple[NoteLLM2Output, torch.Tensor]:
    """The forward pass of a batch, and for each place of its plan the row of that pass."""
    return trainer.model(**batch["mini_batches"][0]), batch["places"].argsort()


def test_loss_is_the_weighted_mean_of_both_readouts(build_trainer: BuildTrainer):
    trainer = build_trainer(visual_loss_weight=0.5)
    batch = first_batch(trainer)
    model = trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(model, batch)
        output, order = outputs_in_plan_order(trainer, batch)
        targets = ContrastiveTargets(**batch["targets"])
        loss_m = contrastive_loss(output.note_embeds[order], output.logit_scale, targets)
        loss_v = contrastive_loss(output.visual_embeds[order], output.logit_scale, targets)
        shuffled = contrastive_loss(output.note_embeds, output.logit_scale, targets)
    assert loss.item() == pytest.approx(((loss_m + 0.5 * loss_v) / 1.5).item(), abs=1e-6)
    assert loss.item() != pytest.approx(loss_m.item(), abs=1e-4)
    assert shuffled.item() != pytest.approx(loss_m.item(), abs=1e-5)  # the order matters


def test_dropped_notes_take_no_part_in_the_loss(build_trainer: BuildTrainer, tmp_path: Path):
    trainer = build_trainer(bad_images="drop-pair", visual_loss_weight=0.5)
    expected = trainer.compute_loss(trainer.model.eval(), first_batch(trainer))
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no picture")
    batch = first_batch(trainer)
    victim = int(batch["targets"]["groups"][0])  # the row of the note in the first place of the plan
    assert trainer.reader is not None
    notes = list(trainer.reader.notes)
    notes[victim] |= {"image": str(damaged)}
    trainer.reader.notes = notes
    batch = first_batch(trainer)
    assert batch["bad_images"] == 1 and 0 not in batch["places"].tolist()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
        output = trainer.model(**batch["mini_batches"][0])
        order = batch["places"].argsort()
        kept = torch.ones(len(batch["targets"]["groups"]), dtype=torch.bool)
        kept[0] = False
        targets = ContrastiveTargets(**batch["targets"]).select(kept)
        loss_m = contrastive_loss(output.note_embeds[order], output.logit_scale, targets)
        loss_v = contrastive_loss(output.visual_embeds[order], output.logit_scale, targets)
    assert loss.item() == pytest.approx(((loss_m + 0.5 * loss_v) / 1.5).item(), abs=1e-6)
    assert loss.item() != pytest.approx(expected.item(), abs=1e-4)


def test_a_run_goes_on_over_bad_images_and_counts_them(
    build_trainer: BuildTrainer, splits: dict[str, NotesAndPairs], tmp_path: Path
):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no picture")
    trainer = build_trainer(bad_images="text-only", max_steps=3, logging_steps=3)
    for holder in (trainer.reader, trainer.eval_dataset):
        holder.notes = [note | {"image": str(damaged)} if row % 2 else note for row, note in enumerate(holder.notes)]
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "bad_images" in entry)
    assert 0 < entry["bad_images"] == round(entry["bad_images"]) < entry["notes_per_step"] * 3
    assert math.isfinite(entry["loss"]) and math.isfinite(trainer.evaluate()["eval_recall@10"])
    raising = build_trainer(bad_images="raise", max_steps=3)
    raising.reader.notes = trainer.reader.notes  # type: ignore[union-attr]
    with pytest.raises(NoteError, match="damaged.png"):
        raising.train()


def test_settings_that_do_not_go_together_are_refused(build_trainer: BuildTrainer):
    with pytest.raises(ValueError, match="17 is not between 1 and 16"):
        build_trainer(matryoshka_dims=[8, 17])
    with pytest.raises(ValueError, match=r"matryoshka_dims=\[4, 8\] lacks the whole width, 16"):
        build_trainer(matryoshka_dims=[4, 8])
    with pytest.raises(ValueError, match="names a width twice"):
        build_trainer(matryoshka_dims=[16, 16])
    with pytest.raises(ValueError, match="logq_correction=True with batches=graph"):
        build_trainer(logq_correction=True, batches="graph")
    with pytest.raises(ValueError, match="logq_correction=True with hard_negatives=1"):
        build_trainer(logq_correction=True, hard_negatives=1)
    with pytest.raises(ValueError, match="add up to more than 1"):
        build_trainer(text_dropout=0.6, image_dropout=0.6)
    with pytest.raises(ValueError, match="max_negative_similarity=2"):
        build_trainer(max_negative_similarity=2.0)
    with pytest.raises(ValueError, match="mini_batch_size=0: give 1 or more"):
        build_trainer(mini_batch_size=0)


def test_every_parameter_that_trains_is_in_one_group_with_its_rate(build_trainer: BuildTrainer):
    trainer = build_trainer(
        llm_tuning="full", learning_rate=1e-4, connector_learning_rate=1e-3, head_learning_rate=1e-2, weight_decay=0.1
    )
    groups = trainer.parameter_groups(trainer.model)
    by_id = {id(p): group for group in groups for p in group["params"]}
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(by_id) == len(trained) == sum(len(group["params"]) for group in groups)
    rates = {name: by_id[id(p)]["lr"] for name, p in trained.items()}
    assert rates["language_model.layers.0.self_attn.q_proj.weight"] == 1e-4
    assert rates["connector.query_tokens"] == rates["image_embedding"] == 1e-3
    assert rates["late_fusion.projection.weight"] == rates["late_fusion.gate.2.bias"] == 1e-2
    assert rates["head.weight"] == rates["logit_scale"] == 1e-2
    decay = {name: by_id[id(p)]["weight_decay"] for name, p in trained.items()}
    assert decay["head.weight"] == 0.1
    assert decay["logit_scale"] == decay["image_embedding"] == decay["late_fusion.gate.2.bias"] == 0.0
    optimizer = trainer.create_optimizer()
    assert {group["lr"] for group in optimizer.param_groups} == {1e-4, 1e-3, 1e-2}


@pytest.mark.parametrize(
    "further",
    [
        {},
        {"mini_batch_size": 4, "batches": "graph", "hard_negatives": 1, "text_dropout": 0.2},
        # Two batches an epoch, so that the run is resumed in the second epoch; loaded by a worker.
        {"per_device_train_batch_size": 80, "dataloader_num_workers": 1},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 40, "mini_batch_size": 16},
    ],
)
def test_resumed_run_continues_the_uninterrupted_one_exactly(
    further: dict[str, Any], build_trainer: BuildTrainer, tmp_path: Path
):
    settings = {"max_steps": 6, "save_steps": 3, "llm_tuning": "lora", "lora_dropout": 0.1, "warmup_steps": 2}
    settings |= further
    settings |= {"head_warmup_steps": 5, "head_learning_rate": 1e-3}
    whole = build_trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()

    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4  # after the checkpoint of step 3

    interrupted = build_trainer(output_dir=str(tmp_path / "cut"), **settings)
    interrupted.add_callback(Interrupt())
    interrupted.train()
    torch.manual_seed(99)  # a new process would not be in the old one's random state
    resumed = build_trainer(output_dir=str(tmp_path / "cut"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))

    expected, found = training_losses(whole), training_losses(resumed)
    assert [found[step] for step in (4, 5, 6)] == [expected[step] for step in (4, 5, 6)]
    assert len(set(expected.values())) > 1  # the curve moves, so that the comparison says something
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    # Control: a run that starts anew at step 3 with other data order would not agree.
    other = build_trainer(output_dir=str(tmp_path / "other"), seed=7, **settings)
    other.train()
    assert training_losses(other)[5] != expected[5]


def test_evaluation_is_recall_over_all_evaluation_notes(build_trainer: BuildTrainer, splits: dict[str, NotesAndPairs]):
    trainer = build_trainer()
    metrics = trainer.evaluate()
    validation = splits["validation"]
    embeds = trainer.model.encode(list(validation.notes))
    related = related_indices(list(validation.notes["note_id"]), validation.pairs)
    expected = retrieval_metrics(embeds, related, (5, 10))
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, abs=1e-6), name


def test_evaluation_puts_shuffled_predictions_back_in_order():
    generator = np.random.default_rng(0)
    embeds = generator.normal(size=(12, 4)).astype(np.float32)
    related = [np.array([(i + 1) % 12]) for i in range(12)]
    order = generator.permutation(12)
    evaluation = RetrievalEvaluation(related, (3,))
    from transformers import EvalPrediction

    in_order = evaluation(EvalPrediction(predictions=embeds, label_ids=np.arange(12)))
    shuffled = evaluation(EvalPrediction(predictions=embeds[order], label_ids=order))
    assert in_order == shuffled
    assert evaluation(EvalPrediction(predictions=embeds[order], label_ids=np.arange(12))) != in_order


def test_best_model_by_recall_is_kept_and_saved(build_trainer: BuildTrainer, tmp_path: Path):
    trainer = build_trainer(
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="recall@10",
        llm_tuning="full",
    )
    trainer.train()
    recalls = {e["step"]: e["eval_recall@10"] for e in trainer.state.log_history if "eval_recall@10" in e}
    assert trainer.state.best_metric == max(recalls.values())
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, best[name]), name


@pytest.mark.parametrize("llm_tuning", ["frozen", "lora", "full"])
def test_saved_checkpoint_gives_the_same_embeddings(
    llm_tuning: str, build_trainer: BuildTrainer, splits: dict[str, NotesAndPairs], tmp_path: Path
):
    trainer = build_trainer(llm_tuning=llm_tuning, learning_rate=1e-2)
    untrained = trainer.model.encode(list(splits["test"].notes))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    notes = list(splits["test"].notes)
    expected = trainer.model.encode(notes)
    assert np.abs(expected - untrained).max() > 1e-3
    loaded = AutoModel.from_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(loaded.encode(notes), expected, atol=1e-5)
    if llm_tuning == "lora":
        loaded.merge_lora()
        np.testing.assert_allclose(loaded.encode(notes), expected, atol=1e-5)
        loaded.save_pretrained(tmp_path / "merged")
        loaded.processor.save_pretrained(tmp_path / "merged")
        merged = AutoModel.from_pretrained(tmp_path / "merged")
        assert merged.config.lora is None
        np.testing.assert_allclose(merged.encode(notes), expected, atol=1e-5)


def test_logs_name_the_parts_of_the_loss(build_trainer: BuildTrainer):
    trainer = build_trainer(max_steps=2)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["temperature"] == pytest.approx(0.05, rel=0.05)
    assert entry["fusion_weight"] == pytest.approx(0.1, abs=1e-3)
    assert entry["loss"] == pytest.approx((entry["loss_m"] + entry["loss_v"] / 9) / (1 + 1 / 9), abs=1e-3)
    assert all(math.isfinite(value) for value in entry.values())
    assert entry["bad_images"] == 0 and 6 < entry["notes_per_step"] <= 12 and 0.5 <= entry["pairs_per_note"] < 1


def test_gradient_checkpointing_gives_the_same_loss(build_trainer: BuildTrainer, build_model: BuildModel):
    plain = build_trainer(build_model(), llm_tuning="full", max_steps=2)
    plain.train()
    recomputed = build_trainer(build_model(), llm_tuning="full", max_steps=2, gradient_checkpointing=True)
    recomputed.train()
    assert training_losses(recomputed) == pytest.approx(training_losses(plain), abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"matryoshka_dims": [16, 4]}, {"logq_correction": True}, {"text_dropout": 0.9}, {"image_dropout": 0.9}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_the_loss_reach_it(settings: dict[str, Any], build_trainer: BuildTrainer):
    """Each changes the loss of the first batch, which all begin with from the same weights."""
    losses = []
    for more in ({}, settings):
        trainer = build_trainer(max_steps=1, **more)
        (batch, *_rest) = trainer.get_train_dataloader()
        trainer.model.train(False)
        losses.append(float(trainer.compute_loss(trainer.model, batch).detach()))
    assert losses[1] != pytest.approx(losses[0], abs=1e-6)


def test_one_cover_is_no_negative_if_asked(build_model: BuildModel, splits: dict[str, NotesAndPairs], tmp_path: Path):
    train = splits["train"]
    notes = [dict(note) for note in train.notes]
    for note in notes:
        note["image"] = notes[0]["image"]
    one_cover = {**splits, "train": NotesAndPairs(Dataset.from_list(notes), train.pairs)}
    losses = []
    for mask_same_image in (False, True):
        trainer = tiny.build_trainer(one_cover, build_model(), tmp_path, mask_same_image=mask_same_image)
        (batch, *_rest) = trainer.get_train_dataloader()
        trainer.model.train(False)
        losses.append(float(trainer.compute_loss(trainer.model, batch).detach()))
    assert losses[0] > 1 and losses[1] == pytest.approx(0, abs=1e-6)  # without a negative there is nothing to learn


def test_the_temperature_does_not_wander_beyond_its_bound(build_trainer: BuildTrainer):
    """CLIP's clamp: a parameter beyond its bound would have to come all the way back before anything changes."""
    trainer = build_trainer(max_steps=3, head_learning_rate=2.0)
    with torch.no_grad():
        trainer.model.logit_scale.fill_(MAX_LOGIT_SCALE - 0.01)
    trainer.model.logit_scale.register_hook(lambda grad: torch.full_like(grad, -1.0))  # always upwards
    trainer.train()
    assert float(trainer.model.logit_scale) == pytest.approx(MAX_LOGIT_SCALE)
    assert trainer.model.temperature == pytest.approx(0.01)
