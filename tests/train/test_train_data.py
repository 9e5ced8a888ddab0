"""From tables to batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Image

from modeling_notellm2 import NoteError, NoteLLM2Model
from pairs.split import NotesAndPairs
from pairs.tables import load_notes
from train.batches import BatchOptions, BatchPlan, BatchPlanner
from train.data import NoteCollator, NoteDataset, NoteReader, PairDataset, PlanCollator, without_bad_images
from train.losses import ContrastiveTargets

BuildModel = Callable[..., NoteLLM2Model]

NOTES = Dataset.from_dict({"note_id": ["a", "b", "c"], "title": ["one", "two", "three"]})


def table(*pairs: tuple[str, str]) -> Dataset:
    return Dataset.from_dict({"note_id": [a for a, _ in pairs], "related_note_id": [b for _, b in pairs]})


def test_each_unordered_pair_is_one_example():
    dataset = PairDataset(NOTES, table(("a", "c"), ("c", "a"), ("b", "a")))
    assert dataset.pairs.tolist() == [[0, 2], [0, 1]]
    assert len(dataset) == 2 and dataset[1] == (0, 1)
    assert dataset.related.among(np.arange(3)).tolist() == [[0, 1], [0, 2], [1, 0], [2, 0]]


def test_refuses_unknown_notes_and_no_pairs():
    with pytest.raises(ValueError, match="'z'"):
        PairDataset(NOTES, table(("a", "z")))
    with pytest.raises(ValueError, match="no pairs"):
        PairDataset(NOTES, table())


def plan_of(notes: list[int], **withheld: list[bool]) -> BatchPlan:
    nothing = np.zeros(len(notes), dtype=bool)
    text, image = (np.array(withheld.get(name, nothing)) for name in ("text", "image"))
    half = np.arange(len(notes)) ^ 1  # neighbours are pairs
    positives = np.stack([np.arange(len(notes)), half], axis=1)
    return BatchPlan(np.array(notes), positives[half < len(notes)], text, image)


@pytest.fixture
def bad_notes(splits: dict[str, NotesAndPairs], tmp_path: Path) -> Dataset:
    """Training notes: 1 has no image, 2 a damaged one, 3 a missing one, 4 a damaged one and no text."""
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no picture")
    notes = list(splits["train"].notes.select(range(8)))
    blank = {"title": "", "topics": [], "content": ""}
    notes[1] |= {"image": None}
    notes[2] |= {"image": str(damaged)}
    notes[3] |= {"image": str(tmp_path / "missing.png")}
    notes[4] |= {"image": str(damaged), **blank}
    return Dataset.from_list(notes)


def test_a_plan_becomes_mini_batches_of_like_length(splits: dict[str, NotesAndPairs], build_model: BuildModel):
    processor, dataset = build_model().processor, PairDataset(*splits["train"])
    reader = NoteReader(dataset.notes, processor)
    (plan, *_rest) = BatchPlanner(dataset.pairs, dataset.related, BatchOptions(pairs=5)).plans()
    batch = PlanCollator(reader, dataset.related, mini_batch_size=3)([plan])
    assert batch["bad_images"] == 0 and batch["passes"] == len(batch["mini_batches"]) == -(-len(plan.notes) // 3)
    places = batch["places"].tolist()
    assert sorted(places) == list(range(len(plan.notes)))
    start, lengths = 0, []
    for mini_batch in batch["mini_batches"]:
        rows = plan.notes[places[start : start + 3]].tolist()
        expected = processor([dataset.notes[row] for row in rows])
        assert mini_batch.keys() == expected.keys()
        assert all(torch.equal(mini_batch[name], expected[name]) for name in expected)
        lengths += mini_batch["attention_mask"].sum(1).tolist()
        start += 3
    assert lengths == sorted(lengths, reverse=True)
    targets = ContrastiveTargets(**batch["targets"])
    assert torch.equal(targets.positives, torch.from_numpy(plan.positives))
    related = {tuple(plan.notes[pair].tolist()) for pair in targets.related}
    known = {tuple(pair) for pair in dataset.pairs.tolist()} | {tuple(pair) for pair in dataset.pairs[:, ::-1].tolist()}
    assert related == {(a, b) for a, b in known if {a, b} <= set(plan.notes.tolist())}


@pytest.mark.parametrize("processes", [2, 3, 16])
def test_shares_are_the_whole_plan(processes: int, splits: dict[str, NotesAndPairs], build_model: BuildModel):
    dataset, processor = PairDataset(*splits["train"]), build_model().processor
    reader = NoteReader(dataset.notes, processor)
    (plan, *_rest) = BatchPlanner(dataset.pairs, dataset.related, BatchOptions(pairs=4)).plans()
    batches = [PlanCollator(reader, dataset.related, (i, processes), 2)([plan]) for i in range(processes)]
    places = [place for batch in batches for place in batch["places"].tolist()]
    assert sorted(place for place in places if place >= 0) == list(range(len(plan.notes)))
    assert places.count(-1) == max(0, processes - len(plan.notes))  # an empty share is filled
    assert len({batch["passes"] for batch in batches}) == 1
    assert all(len(batch["mini_batches"]) <= batch["passes"] for batch in batches)
    assert all(torch.equal(batch["targets"]["positives"], batches[0]["targets"]["positives"]) for batch in batches)


def test_withheld_text_and_image(splits: dict[str, NotesAndPairs], build_model: BuildModel):
    processor, dataset = build_model().processor, PairDataset(*splits["train"])
    reader = NoteReader(dataset.notes, processor)
    note = dataset.notes[0]
    whole, text_withheld = reader.read(0)[0], reader.read(0, withhold_text=True)[0]
    image_withheld = reader.read(0, withhold_image=True)[0]
    assert whole.input_ids == processor.encode_note(note).input_ids
    assert text_withheld.input_ids == processor.encode_note({"image": note["image"]}).input_ids
    assert torch.equal(text_withheld.pixels["pixel_values"], whole.pixels["pixel_values"])
    assert image_withheld.input_ids == processor.encode_note({**note, "image": None}).input_ids
    assert image_withheld.image is None
    collate = PlanCollator(reader, dataset.related)
    batch = collate([plan_of([0, 1, 2, 3], image=[True, False, False, True])])
    has_image = dict(zip(batch["places"].tolist(), batch["mini_batches"][0]["has_image"].tolist(), strict=True))
    assert has_image == {0: False, 1: True, 2: True, 3: False}


def test_withheld_texts_reach_the_batch(splits: dict[str, NotesAndPairs], build_model: BuildModel):
    dataset, processor = PairDataset(*splits["train"]), build_model().processor
    collate = PlanCollator(NoteReader(dataset.notes, processor), dataset.related)
    batch = collate([plan_of([0, 1, 2, 3], text=[True, False, False, True])])
    lengths = dict(
        zip(batch["places"].tolist(), batch["mini_batches"][0]["attention_mask"].sum(1).tolist(), strict=True)
    )
    blank = len(processor.encode_note({"image": dataset.notes[0]["image"]}).input_ids)
    assert lengths[0] == lengths[3] == blank < min(lengths[1], lengths[2])


def test_covers_and_log_q_reach_the_targets(splits: dict[str, NotesAndPairs], build_model: BuildModel):
    dataset = PairDataset(*splits["train"])
    reader = NoteReader(dataset.notes, build_model().processor)
    groups, log_q = np.arange(len(dataset.notes)) // 2, -np.arange(len(dataset.notes), dtype=np.float32)
    plan = plan_of([4, 5, 8, 2])
    targets = PlanCollator(reader, dataset.related, image_groups=groups, log_q=log_q)([plan])["targets"]
    assert targets["groups"].tolist() == [2, 2, 4, 1] and targets["log_q"].tolist() == [-4, -5, -8, -2]
    plain = PlanCollator(reader, dataset.related)([plan])["targets"]
    assert plain["log_q"] is None and len(set(plain["groups"].tolist())) == 4  # control: each note is its own cover


def test_a_note_that_has_nothing_else_keeps_its_text_or_image(
    splits: dict[str, NotesAndPairs], build_model: BuildModel
):
    notes = list(splits["train"].notes.select(range(2)))
    notes[0] |= {"image": None}
    notes[1] |= {"title": "", "topics": [], "content": ""}
    reader = NoteReader(Dataset.from_list(notes), build_model().processor)
    for row in (0, 1):
        plain = reader.read(row)[0]
        for withheld in ({"withhold_text": True}, {"withhold_image": True}):
            assert reader.read(row, **withheld)[0].input_ids == plain.input_ids


@pytest.mark.parametrize(
    ("rule", "kept", "with_image"),
    [("text-only", [0, 1, 2, 3, 5], [0, 5]), ("drop-pair", [0, 1, 5], [0, 5])],
)
def test_bad_images_follow_the_rule_and_are_counted(
    rule: Any, kept: list[int], with_image: list[int], bad_notes: Dataset, build_model: BuildModel
):
    dataset = PairDataset(
        bad_notes,
        Dataset.from_list(
            [{"note_id": n["note_id"], "related_note_id": m["note_id"]} for n, m in [(bad_notes[0], bad_notes[1])]]
        ),
    )
    collate = PlanCollator(NoteReader(bad_notes, build_model().processor, None, rule), dataset.related)
    batch = collate([plan_of([0, 1, 2, 3, 4, 5])])
    assert batch["bad_images"] == 3
    assert sorted(batch["places"].tolist()) == kept
    has_image = batch["mini_batches"][0]["has_image"]
    assert sorted(batch["places"][has_image].tolist()) == with_image


def test_bad_images_end_the_run_only_if_asked(bad_notes: Dataset, build_model: BuildModel):
    reader = NoteReader(bad_notes, build_model().processor, None, "raise")
    assert reader.read(0)[1] is False and reader.read(1)[1] is False
    for row, words in ((2, "cannot be read"), (3, "no file")):
        with pytest.raises(NoteError, match=words):
            reader.read(row)


def test_damaged_images_inside_a_table_follow_the_rule(
    splits: dict[str, NotesAndPairs], build_model: BuildModel, tmp_path: Path
):
    """datasets would decode an `Image` column when a row is read, and end the run with an error of Pillow's."""
    rows = list(splits["train"].notes.select(range(3)))
    contents = [Path(row["image"]).read_bytes() for row in rows]
    contents[1] = contents[1][:20]
    for row, content in zip(rows, contents, strict=True):
        row["image"] = {"bytes": content, "path": None}
    Dataset.from_list(rows).cast_column("image", Image()).save_to_disk(tmp_path / "notes")
    notes, processor = load_notes(tmp_path / "notes"), build_model().processor
    reader = NoteReader(notes, processor, None, "text-only")
    read = [reader.read(row) for row in range(3)]
    assert [is_bad for _note, is_bad in read] == [False, True, False]
    decoded = processor.load_image(processor.encode_note(splits["train"].notes[0], 0))
    assert read[0][0] is not None and decoded.pixels is not None and read[0][0].pixels is not None
    assert torch.equal(read[0][0].pixels["pixel_values"], decoded.pixels["pixel_values"])
    with pytest.raises(NoteError, match=r"notes\[1\].image"):
        NoteReader(notes, processor, None, "raise").read(1)


def test_other_faults_of_a_note_are_no_bad_images(bad_notes: Dataset, build_model: BuildModel):
    notes = [{**bad_notes[0], "title": 5}, {**bad_notes[0], "title": "", "content": "", "topics": [], "image": None}]
    reader = NoteReader(notes, build_model().processor, None, "text-only")
    for row, words in ((0, "title"), (1, "neither text nor image")):
        with pytest.raises(NoteError, match=words):
            reader.read(row)


def test_test_notes_lose_unreadable_images(bad_notes: Dataset):
    notes, bad = without_bad_images([bad_notes[i] for i in (0, 1, 2, 3)])
    assert [note["image"] is not None for note in notes] == [True, False, False, False]
    assert len(bad) == 2 and all(f"notes[{row}].image" in str(error) for row, error in bad.items())
    assert [note["note_id"] for note in notes] == bad_notes["note_id"][:4]
    (blank,), bad = without_bad_images([bad_notes[4]])  # it keeps its place, though it has no text
    assert list(bad) == [0] and blank == {**bad_notes[4], "image": None}
    assert without_bad_images([{"title": "", "image": ""}]) == ([{"title": "", "image": ""}], {})


def test_evaluation_batch_holds_single_notes(splits: dict[str, NotesAndPairs], build_model: BuildModel):
    notes = splits["test"].notes
    collate = NoteCollator(build_model().processor)
    batch = collate([NoteDataset(notes)[row] for row in (2, 0)])
    assert batch["note_index"].tolist() == [2, 0] and batch["input_ids"].shape[0] == 2
    others = NoteDataset(splits["train"].notes)  # the same collator, another table
    assert torch.equal(collate([others[2]])["input_ids"], collate.processor([others.notes[2]])["input_ids"])
    assert len(list(others)) == len(others)


def test_evaluation_keeps_the_place_of_a_note_of_which_nothing_is_left(bad_notes: Dataset, build_model: BuildModel):
    dataset = NoteDataset(bad_notes)
    batch = NoteCollator(build_model().processor, "text-only")([dataset[row] for row in (3, 4, 0)])
    assert batch["note_index"].tolist() == [3, 4, 0] and batch["has_image"].tolist() == [False, False, True]


def test_no_test_or_validation_note_is_trained_on(splits: dict[str, NotesAndPairs]):
    train = splits["train"]
    seen = {note for name in ("note_id", "related_note_id") for note in train.pairs[name]}
    for name in ("validation", "test"):
        assert seen.isdisjoint(splits[name].notes["note_id"])
    assert seen <= set(train.notes["note_id"])
