"""`encode`: notes in, embeddings out, in order, whatever the batch."""

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import modeling_notellm2.modeling_notellm2 as modeling
from modeling_notellm2 import NoteError, NoteLLM2Model
from tests.backbones import random_picture

Notes = list[dict[str, Any]]


def test_numpy_or_tensor(shared_tiny_model: NoteLLM2Model, notes: Notes) -> None:
    array = shared_tiny_model.encode(notes)
    tensor = shared_tiny_model.encode(notes, convert_to_tensor=True)
    assert isinstance(array, np.ndarray) and isinstance(tensor, torch.Tensor)
    assert array.dtype == np.float32 and tensor.dtype == torch.float32 and not tensor.requires_grad
    np.testing.assert_array_equal(tensor.numpy(), array)
    assert shared_tiny_model.encode([]).shape == (0, 16)


def test_truncate_dim(shared_tiny_model: NoteLLM2Model, notes: Notes) -> None:
    whole = shared_tiny_model.encode(notes)
    short = shared_tiny_model.encode(notes, truncate_dim=5)
    expected = whole[:, :5] / np.linalg.norm(whole[:, :5], axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, atol=1e-6)
    np.testing.assert_allclose(shared_tiny_model.encode(notes, truncate_dim=16), whole, atol=1e-6)
    for dim in (0, 17):
        with pytest.raises(ValueError, match=f"truncate_dim={dim} must lie between 1 and the embedding's width, 16"):
            shared_tiny_model.encode(notes, truncate_dim=dim)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_order_is_kept_across_windows(shared_tiny_model: NoteLLM2Model, batch_size: int) -> None:
    count = 3 * modeling.WINDOW_BATCHES + 2  # four windows when batch_size=1
    rng = np.random.default_rng(0)
    many = [{"title": f"{i} " + "oak " * int(rng.integers(0, 9))} for i in range(count)]
    for i in range(0, count, 5):
        many[i]["image"] = random_picture(i)
    embeds = shared_tiny_model.encode(many, batch_size=batch_size)
    alone = np.concatenate([shared_tiny_model.encode([note]) for note in many])
    np.testing.assert_allclose(embeds, alone, atol=1e-5)
    assert (alone @ alone.T).argmax(1).tolist() == list(range(count))  # no two alike: a wrong order would show


@pytest.mark.parametrize("kind", ["generator", "tuple", "dataset", "strings", "pictures"])
def test_any_iterable(shared_tiny_model: NoteLLM2Model, notes: Notes, kind: str) -> None:
    if kind in ("strings", "pictures"):
        plain: list[Any] = ["oak", "red shoes"] if kind == "strings" else [random_picture(0), random_picture(1)]
        field = "content" if kind == "strings" else "image"
        expected = shared_tiny_model.encode([{field: value} for value in plain])
        np.testing.assert_array_equal(shared_tiny_model.encode(plain), expected)
        return
    rows = [{"title": n.get("title"), "content": n.get("content"), "image": n.get("image")} for n in notes]
    given: Any = {"generator": (row for row in rows), "tuple": tuple(rows), "dataset": None}[kind]
    if kind == "dataset":
        for row in rows:  # lossless in the dataset's PNG
            row["image"] = row["image"] if row["image"] is None else as_rgb(row["image"])
        features = {"title": datasets.Value("string"), "content": datasets.Value("string"), "image": datasets.Image()}
        given = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    np.testing.assert_allclose(shared_tiny_model.encode(given), shared_tiny_model.encode(rows), atol=1e-6)


def as_rgb(image: Any) -> Image.Image:
    return (Image.fromarray(image) if isinstance(image, np.ndarray) else image).convert("RGB")


@pytest.mark.parametrize("generator", [False, True])
def test_one_progress_bar(
    shared_tiny_model: NoteLLM2Model, notes: Notes, monkeypatch: pytest.MonkeyPatch, generator: bool
) -> None:
    bars: list[Any] = []

    class Bar(modeling.tqdm):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            assert not self.disable
            bars.append(self)

    monkeypatch.setattr(modeling, "tqdm", Bar)
    many = notes * 4  # several windows at batch_size=1
    shared_tiny_model.encode((n for n in many) if generator else many, batch_size=1, show_progress_bar=True)
    (bar,) = bars
    assert (bar.n, bar.total) == (len(many), None if generator else len(many))


def test_no_progress_bar_unless_asked(
    shared_tiny_model: NoteLLM2Model, notes: Notes, capfd: pytest.CaptureFixture
) -> None:
    shared_tiny_model.encode(notes)
    assert capfd.readouterr() == ("", "")
    shared_tiny_model.encode(notes, show_progress_bar=True)
    assert "6/6" in capfd.readouterr().err


@pytest.mark.parametrize("note", ["oak", {"title": "oak"}, random_picture(0)])
def test_a_single_note_is_refused(shared_tiny_model: NoteLLM2Model, note: Any) -> None:
    with pytest.raises(ValueError, match=r"got a single one: pass \[note\]"):
        shared_tiny_model.encode(note)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        shared_tiny_model.encode([note], batch_size=0)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_bad_note_is_named_by_its_place_in_the_whole_input(
    shared_tiny_model: NoteLLM2Model, notes: Notes, batch_size: int
) -> None:
    many = notes * 5
    for bad, message in (({"title": 3}, ".title is 3 (int)"), ({"image": b"x"}, ".image (a bytes) cannot be read")):
        with pytest.raises(NoteError) as error:
            shared_tiny_model.encode([*many, bad, *many], batch_size=batch_size)
        assert str(error.value).startswith("notes[30]" + message)


def test_the_training_mode_is_restored(tiny_model: NoteLLM2Model, notes: Notes) -> None:
    expected = tiny_model.encode(notes)
    tiny_model.language_model.config.attention_dropout = 0.5
    tiny_model.train()
    np.testing.assert_array_equal(tiny_model.encode(notes), expected)  # no dropout within
    assert tiny_model.training and tiny_model.connector.training and not tiny_model.vision_tower.training
    with pytest.raises(NoteError):
        tiny_model.encode([{}])
    assert tiny_model.training
    tiny_model.eval()
    tiny_model.encode(notes)
    assert not tiny_model.training


def test_another_processor(shared_tiny_model: NoteLLM2Model, notes: Notes, compose: Callable) -> None:
    left = compose(processor={"padding_side": "left"}).processor
    np.testing.assert_allclose(
        shared_tiny_model.encode(notes, processor=left), shared_tiny_model.encode(notes), atol=1e-5
    )
