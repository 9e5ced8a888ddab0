"""The store of the tower's output: exact, never stale, whole or absent, shared by processes."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from evaluation import run
from evaluation.run import evaluate_model
from modeling_notellm2 import NoteError, NoteLLM2Model
from pairs.split import NotesAndPairs
from pairs.tables import related_indices, write_table
from tests.train import tiny
from train import features as features_module
from train.features import VisionFeatureStore, fingerprint, image_groups
from train.trainer import NoteLLM2Trainer

BuildModel = Callable[..., NoteLLM2Model]
BuildTrainer = Callable[..., NoteLLM2Trainer]
Splits = dict[str, NotesAndPairs]


def count_runs(model: NoteLLM2Model) -> list[int]:
    """The number of images of each run of the tower, from now on."""
    counts: list[int] = []
    model.vision_tower.register_forward_pre_hook(
        lambda _module, inputs, keywords: counts.append(len((*inputs, *keywords.values())[0])), with_kwargs=True
    )
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_the_towers_and_are_computed_once(
    dtype: torch.dtype, build_model: BuildModel, splits: Splits, tmp_path: Path
):
    model, notes = build_model().to(dtype).eval(), splits["train"].notes.select(range(9))
    rows = [4, 0, 8]
    with torch.no_grad():
        batch = model.processor([notes[row] for row in rows])
        expected = model.get_image_features(batch["pixel_values"])
    runs = count_runs(model)
    table = VisionFeatureStore(tmp_path, model).table(notes, batch_size=2)
    assert sum(runs) <= 9
    found = table.stack(rows)
    assert found["patch_embeds"].dtype == found["pooled_embeds"].dtype == dtype
    tolerance = {"atol": 1e-6 if dtype == torch.float32 else 0.02, "rtol": 0.02 if dtype == torch.bfloat16 else 0}
    for name in ("patch_embeds", "pooled_embeds"):
        torch.testing.assert_close(found[name], getattr(expected, name), **tolerance)
        assert not torch.allclose(found[name][0], found[name][1], atol=0.05)  # control: pictures differ
    runs.clear()
    again = VisionFeatureStore(tmp_path, model)
    assert torch.equal(again.table(notes).stack(rows)["patch_embeds"], found["patch_embeds"]) and not runs
    assert len(again) == len({Path(note["image"]).read_bytes() for note in notes})


def test_training_and_encoding_are_the_same_with_the_store(
    build_model: BuildModel, build_trainer: BuildTrainer, splits: Splits, tmp_path: Path
):
    settings: dict[str, Any] = {"max_steps": 3, "mini_batch_size": 5}
    recomputed = build_trainer(build_model(), **settings)
    recomputed.train()
    model = build_model()
    store = VisionFeatureStore(tmp_path / "store", model)
    stored = build_trainer(model, **settings)
    assert stored.reader is not None
    stored.reader.features = store.table(splits["train"].notes)
    runs = count_runs(model)
    stored.train()
    assert not runs, "the tower ran"
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (recomputed, stored)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and len(losses[0]) == 3
    for name, value in recomputed.model.state_dict().items():
        torch.testing.assert_close(stored.model.state_dict()[name], value, atol=1e-6, rtol=0)

    notes = list(splits["test"].notes)
    notes[1] = {**notes[1], "image": None}
    expected = model.encode(notes, batch_size=4)
    found = model.encode(notes, batch_size=4, vision_features=store.table(notes))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    # Control: another note's features would show.
    shifted = store.table(notes[2:] + notes[:2])
    with_others = model.encode(notes[2:4], vision_features=lambda some: shifted.stack([n.index + 2 for n in some]))
    assert np.abs(with_others - expected[2:4]).max() > 1e-4


@pytest.mark.parametrize("change", ["weights", "image processor", "dtype", "configuration"])
def test_a_changed_tower_or_transform_finds_nothing(
    change: str, build_model: BuildModel, splits: Splits, tmp_path: Path
):
    model, notes = build_model(), splits["train"].notes.select(range(3))
    VisionFeatureStore(tmp_path, model).table(notes)
    assert len(VisionFeatureStore(tmp_path, build_model())) > 0  # control: the same again is found
    if change == "weights":
        with torch.no_grad():
            next(model.vision_tower.parameters()).flatten()[0] += 1e-3
    elif change == "image processor":
        model.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    elif change == "dtype":
        model.to(torch.bfloat16)
    else:
        model.config.vision_config.layer_norm_eps = 0.1
    assert len(VisionFeatureStore(tmp_path, model)) == 0


def test_training_the_rest_changes_no_fingerprint(build_model: BuildModel):
    model = build_model()
    before = fingerprint(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("vision_tower."):
                parameter.add_(1.0)
    assert fingerprint(model) == before


def test_a_changed_picture_is_another(build_model: BuildModel, tmp_path: Path):
    model = build_model()
    path = tmp_path / "picture.png"
    draw = np.random.default_rng(0)
    tables = []
    for _turn in range(2):
        Image.fromarray(draw.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(path)
        tables.append(VisionFeatureStore(tmp_path / "store", model).table([{"image": str(path), "title": "x"}]))
    first, second = (table.stack([0])["pooled_embeds"] for table in tables)
    assert not torch.allclose(first, second, atol=1e-3)


def test_all_kinds_of_images_are_known_by_their_content(build_model: BuildModel, tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    path = tmp_path / "a.png"
    picture.save(path)
    notes = [{"image": value} for value in (picture, pixels, str(path), path.read_bytes(), None)]
    notes[-1]["title"] = "no image"
    model = build_model()
    table = VisionFeatureStore(tmp_path / "store", model).table(notes)
    found = table.stack([0, 1, 2, 3, 4])["pooled_embeds"]
    assert found.shape[0] == 4 and (found - found[0]).abs().max() < 1e-5
    assert table.stack([4]) == {}
    groups = image_groups(notes, model.processor, show_progress_bar=False)
    assert groups[0] == groups[1] and groups[2] == groups[3] and len(set(groups.tolist())) == 3


def test_pictures_in_memory_that_look_different_are_different(build_model: BuildModel, tmp_path: Path):
    """The same pixels, but turned by EXIF, or with a transparent colour."""
    model = build_model()
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    plain, turned, holed = (Image.fromarray(pixels) for _ in range(3))
    turned.getexif()[0x0112] = 6
    holed.info["transparency"] = tuple(pixels[0, 0].tolist())
    groups = image_groups([{"image": image} for image in (plain, turned, holed)], model.processor, False)
    assert len(set(groups.tolist())) == 3


def test_a_store_that_others_change_is_noticed(build_model: BuildModel, splits: Splits, tmp_path: Path):
    model, notes = build_model(), splits["train"].notes.select(range(4))
    store = VisionFeatureStore(tmp_path, model)
    table = store.table(notes)
    (part,) = store.folder.glob("part-*")
    content = (part / "pooled_embeds.npy").read_bytes()
    (part / "pooled_embeds.npy").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="pooled_embeds.npy is damaged"):
        pickle.loads(pickle.dumps(table)).stack([0])  # as in a new process
    with pytest.raises(RuntimeError, match="lacks an image"):
        store._place(b"0" * 32)


def test_worker_processes_get_paths_and_not_the_features(build_model: BuildModel, splits: Splits, tmp_path: Path):
    table = VisionFeatureStore(tmp_path, build_model()).table(splits["train"].notes)
    expected = table.stack(range(5))
    pickled = pickle.dumps(table)
    assert len(pickled) < sum(value.numel() * 4 for value in expected.values())
    again = pickle.loads(pickled).stack(range(5))
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_few_parts_are_open_at_a_time(build_model: BuildModel, splits: Splits, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(features_module, "PART_BYTES", 1)
    monkeypatch.setattr(features_module, "MAX_OPEN_PARTS", 2)
    model, notes = build_model(), splits["train"].notes.select(range(12))
    table = VisionFeatureStore(tmp_path / "many", model).table(notes, batch_size=2)
    found = table.stack([11, 0, 5, 3, 11])
    assert len(table._parts._open) <= 2 < len(table._parts.folders)
    expected = VisionFeatureStore(tmp_path / "one", model).table(notes, batch_size=12).stack([11, 0, 5, 3, 11])
    torch.testing.assert_close(found["patch_embeds"], expected["patch_embeds"])


def test_images_that_cannot_be_read_are_told_of(build_model: BuildModel, splits: Splits, tmp_path: Path):
    model, notes = build_model(), list(splits["train"].notes.select(range(4)))
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no picture")
    notes[1] |= {"image": str(damaged)}
    notes[2] |= {"image": str(tmp_path / "missing.png")}
    with pytest.raises(NoteError, match=r"notes\[1\].*damaged"):
        VisionFeatureStore(tmp_path / "store", model).table(notes)
    told: list[NoteError] = []
    table = VisionFeatureStore(tmp_path / "store", model).table(notes, on_error=told.append)
    assert [str(error)[:8] for error in told] == ["notes[1]", "notes[2]"]
    table.check(0)
    for row in (1, 2):
        with pytest.raises(NoteError):
            table.check(row)
    assert table.stack([0, 1, 2, 3])["pooled_embeds"].shape[0] == 2


def test_a_part_is_whole_or_absent(
    build_model: BuildModel, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A disk that fills up in the middle leaves what was written before, and the rest is computed next time."""
    model, notes = build_model(), splits["train"].notes.select(range(8))
    monkeypatch.setattr(features_module, "PART_BYTES", 1)  # a part a batch
    saved: list[Path] = []
    original = np.save

    def save(file: Any, values: np.ndarray) -> None:
        if len(saved) == 4:
            raise OSError(28, "No space left on device")
        saved.append(file)
        original(file, values)

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(OSError, match="No space"):
        VisionFeatureStore(tmp_path, model).table(notes, batch_size=2)
    monkeypatch.setattr(np, "save", original)
    store = VisionFeatureStore(tmp_path, model)
    assert len(store) == 2 and not list(store.folder.glob("unfinished-*"))
    runs = count_runs(model)
    table = store.table(notes, batch_size=2)
    distinct = len({Path(note["image"]).read_bytes() for note in notes})
    assert sum(runs) == distinct - 2 and table.stack(range(8))["pooled_embeds"].shape[0] == 8


def test_many_parts_are_one_store(build_model: BuildModel, splits: Splits, tmp_path: Path, monkeypatch: Any):
    model, notes = build_model(), splits["train"].notes.select(range(12))
    expected = VisionFeatureStore(tmp_path / "one", model).table(notes)
    monkeypatch.setattr(features_module, "PART_BYTES", 1)
    store = VisionFeatureStore(tmp_path / "many", model)
    store.table(notes.select(range(5)), batch_size=2)
    table = store.table(notes, batch_size=3)
    assert len(list(store.folder.glob("part-*"))) > 3
    torch.testing.assert_close(table.stack(range(12))["patch_embeds"], expected.stack(range(12))["patch_embeds"])


def build_in_processes(splits_folder: Path, backbones: tiny.Backbones, folder: Path) -> None:
    from accelerate import PartialState

    state = PartialState(cpu=True)
    model, notes = tiny.build_model(backbones), tiny.load_splits(splits_folder)["train"].notes
    runs = count_runs(model)
    table = VisionFeatureStore(folder / "store", model).table(notes, batch_size=4)
    torch.save((sum(runs), table.stack(range(len(notes)))), folder / f"{os.environ['RANK']}.pt")
    state.destroy_process_group()


def test_processes_build_a_store_together(
    splits_folder: Path, backbones: tiny.Backbones, splits: Splits, tmp_path: Path
):
    tiny.run_processes(2, build_in_processes, splits_folder, backbones, tmp_path)
    (one, first), (other, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    expected = VisionFeatureStore(tmp_path / "alone", tiny.build_model(backbones)).table(splits["train"].notes)
    rows = range(len(splits["train"].notes))
    assert torch.equal(first["patch_embeds"], second["patch_embeds"])
    torch.testing.assert_close(first["patch_embeds"], expected.stack(rows)["patch_embeds"])
    assert min(one, other) > 0.3 * max(one, other)  # the work was shared


def test_towers_that_train_and_text_only_models_are_refused(
    build_model: BuildModel, backbones: tiny.Backbones, tmp_path: Path
):
    with pytest.raises(ValueError, match="freeze_vision_tower=False"):
        VisionFeatureStore(tmp_path, build_model(freeze_vision_tower=False))
    with pytest.raises(ValueError, match="no vision tower"):
        VisionFeatureStore(tmp_path, NoteLLM2Model.from_backbones(backbones[0]))


def test_notes_without_image_have_no_features(splits: Splits, build_model: BuildModel, tmp_path: Path):
    model, notes = build_model(), list(splits["test"].notes)[:4]
    notes[1] = {**notes[1], "image": None}
    table = VisionFeatureStore(tmp_path, model).table(Dataset.from_list(notes), batch_size=2)
    assert table.stack([1]) == {} and table.stack([0, 1, 2])["pooled_embeds"].shape[0] == 2


def test_the_evaluation_reads_from_the_store(
    build_model: BuildModel, splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One run of the tower for each picture, for all modalities, and the same table as without."""
    model, split = build_model(), splits["test"]
    blank = {**split.notes[0], "note_id": "blank", "image": None}  # moves the places of what has an image
    notes = [blank, *split.notes]
    related = related_indices([note["note_id"] for note in notes], split.pairs)
    folder, output = tmp_path / "tables", tmp_path / "report"
    write_table(Dataset.from_list(notes), folder / "notes.jsonl")
    split.pairs.to_parquet(folder / "pairs.parquet")
    expected = evaluate_model(model, notes, related, name="m", ks=(5,))
    runs = count_runs(model)
    monkeypatch.setattr(run, "check_model", lambda *_: None)
    monkeypatch.setattr(run, "load_model", lambda *_: model)
    command = ["--notes", str(folder / "notes.jsonl"), "--pairs", str(folder / "pairs.parquet"), "--ks", "5"]
    command += ["--model", "m=somewhere", "--baselines", "--output", str(output), "--image-root", "/"]
    run.main([*command, "--vision-features-dir", str(tmp_path / "store")])
    assert sum(runs) <= len(split.notes)
    found = json.loads((output / "report.json").read_text())["rows"]
    assert [row["metrics"] for row in found] == [pytest.approx(row.metrics) for row in expected]
    assert len({row["metrics"]["recall@5"] for row in found}) == 3  # control: the modalities differ


def test_strings_and_pictures_are_notes_too(build_model: BuildModel, splits: Splits, tmp_path: Path):
    model = build_model()
    picture = Image.open(splits["test"].notes[0]["image"])
    notes: list[Any] = ["a text", picture, {"content": "x", "image": splits["test"].notes[1]["image"]}]
    expected = model.encode(notes)
    table = VisionFeatureStore(tmp_path, model).table(notes)
    runs = count_runs(model)
    np.testing.assert_allclose(model.encode(notes, vision_features=table), expected, atol=1e-6)
    chosen = [2, 0, 1]
    shuffled = model.encode([notes[row] for row in chosen], vision_features=table.select(chosen))
    np.testing.assert_allclose(shuffled, expected[chosen], atol=1e-6)
    assert not runs and np.abs(expected[1] - expected[2]).max() > 1e-3
