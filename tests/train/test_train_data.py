"""Pairs and batches."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from pairs.split import NotesAndPairs
from train.data import NoteCollator, NoteDataset, PairDataset
from train.features import VisionFeatureTable

NOTES = Dataset.from_dict({"note_id": ["a", "b", "c"], "title": ["one", "two", "three"]})


def table(*pairs: tuple[str, str]) -> Dataset:
    return Dataset.from_dict({"note_id": [a for a, _ in pairs], "related_note_id": [b for _, b in pairs]})


def test_each_unordered_pair_is_one_example():
    dataset = PairDataset(NOTES, table(("a", "c"), ("c", "a"), ("b", "a")))
    assert dataset.pairs.tolist() == [[0, 2], [0, 1]]
    group = dataset[0]
    assert [note["title"] for note in group.notes] == ["one", "three"] and group.indices == [0, 2]
    assert dataset.related.matrix(torch.arange(3)).int().tolist() == [[0, 1, 1], [1, 0, 0], [1, 0, 0]]


def test_refuses_unknown_notes_and_no_pairs():
    with pytest.raises(ValueError, match="'z'"):
        PairDataset(NOTES, table(("a", "z")))
    with pytest.raises(ValueError, match="no pairs"):
        PairDataset(NOTES, table())


def test_batch_holds_first_notes_then_their_partners(splits: dict[str, NotesAndPairs], build_model):
    processor = build_model().processor
    dataset = PairDataset(*splits["train"])
    batch = NoteCollator(processor)([dataset[0], dataset[1], dataset[2]])
    firsts, seconds = dataset.pairs[:3].T.tolist()
    assert batch["note_index"].tolist() == [*firsts, *seconds]
    expected = processor([dataset.notes[i] for i in [*firsts, *seconds]])
    for name in expected:
        assert torch.equal(batch[name], expected[name]), name


def test_evaluation_batch_holds_single_notes(splits: dict[str, NotesAndPairs], build_model):
    dataset = NoteDataset(splits["test"].notes)
    batch = NoteCollator(build_model().processor)([dataset[2], dataset[0]])
    assert batch["note_index"].tolist() == [2, 0] and batch["input_ids"].shape[0] == 2


def test_no_test_or_validation_note_is_trained_on(splits: dict[str, NotesAndPairs]):
    train = splits["train"]
    seen = {note for name in ("note_id", "related_note_id") for note in train.pairs[name]}
    for name in ("validation", "test"):
        assert seen.isdisjoint(splits[name].notes["note_id"])
    assert seen <= set(train.notes["note_id"])


def test_kept_features_train_exactly_like_pixels(splits: dict[str, NotesAndPairs], build_model, build_trainer):
    """The loss curve with the tower run once is the one with the tower run in every step."""
    recomputed = build_trainer(build_model(), max_steps=3)
    recomputed.train()
    model = build_model()
    kept = build_trainer(model, max_steps=3)
    kept.train_dataset.features = VisionFeatureTable(model, splits["train"].notes, batch_size=7)
    assert "pixel_values" not in kept.data_collator([kept.train_dataset[0]])
    kept.train()
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (recomputed, kept)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and len(losses[0]) == 3
    # Control: other notes' features would show.
    groups = [kept.train_dataset[0], kept.train_dataset[1]]
    swapped = [replace(group, indices=[index + 1 for index in group.indices]) for group in groups]
    with torch.no_grad():
        right, wrong = (kept.compute_loss(model.eval(), kept.data_collator(g)) for g in (groups, swapped))
    assert abs(right - wrong) > 1e-5


def test_notes_without_image_have_no_features(splits: dict[str, NotesAndPairs], build_model):
    model, notes = build_model(), list(splits["test"].notes)[:4]
    notes[1] = {**notes[1], "image": None}
    table = VisionFeatureTable(model, notes, batch_size=2)
    assert [i in table for i in range(4)] == [True, False, True, True]
    assert table.stack([1]) == {} and table.stack([0, 1, 2])["pooled_embeds"].shape[0] == 2


def test_features_of_a_training_tower_are_refused(splits: dict[str, NotesAndPairs], build_model):
    with pytest.raises(ValueError, match="freeze_vision_tower=False"):
        VisionFeatureTable(build_model(freeze_vision_tower=False), list(splits["test"].notes))
