"""`encode`: notes in, embeddings out, in order, whatever the batch."""

import threading
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import modeling_notellm2.modeling_notellm2 as modeling
from modeling_notellm2 import NonFiniteError, NoteError, NoteLLM2Model
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
    for bad, message in (({"title": 3}, ".title is 3 (int)"), ({"image": b"x"}, ".image: the bytes cannot be read")):
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


def test_each_module_has_its_own_mode_again(tiny_model: NoteLLM2Model, notes: Notes) -> None:
    tiny_model.train()
    tiny_model.language_model.eval()
    modes = {name: module.training for name, module in tiny_model.named_modules()}
    tiny_model.encode(notes[:1])
    assert {name: module.training for name, module in tiny_model.named_modules()} == modes
    assert set(modes.values()) == {True, False}


def test_threads_encode_at_once_with_a_model_in_training_mode(
    tiny_model: NoteLLM2Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that ends first must not bring dropout back for the other, nor the last leave evaluation mode behind."""
    notes = [{"title": f"note {number}"} for number in range(2)]
    expected = tiny_model.encode(notes)
    tiny_model.language_model.config.attention_dropout = 0.5
    for layer in tiny_model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    tiny_model.train()
    with torch.no_grad():  # control: the mode shows
        assert not np.allclose(tiny_model(**tiny_model.processor(notes)).note_embeds, expected, atol=1e-3)
    first_is_in, first_may_go_on, second_is_done = threading.Event(), threading.Event(), threading.Event()
    embed = tiny_model._embed_batch
    modes: list[bool] = []

    def in_turns(batch: Any) -> torch.Tensor:
        if threading.current_thread().name == "first":
            first_is_in.set()
            assert first_may_go_on.wait(60)
        modes.append(tiny_model.training)
        return embed(batch)

    monkeypatch.setattr(tiny_model, "_embed_batch", in_turns)
    found: dict[str, np.ndarray] = {}

    def encode() -> None:
        found[threading.current_thread().name] = np.asarray(tiny_model.encode(notes))
        if threading.current_thread().name == "second":
            second_is_done.set()

    threads = [threading.Thread(target=encode, name=name) for name in ("first", "second")]
    threads[0].start()
    assert first_is_in.wait(60)
    threads[1].start()
    assert second_is_done.wait(60)
    assert not tiny_model.training
    first_may_go_on.set()
    for thread in threads:
        thread.join(60)
    assert modes == [False, False] and tiny_model.training and tiny_model.language_model.training
    for name in ("first", "second"):
        np.testing.assert_allclose(found[name], expected, atol=1e-6)


def test_an_embedding_that_is_not_finite_is_named(tiny_model: NoteLLM2Model) -> None:
    """A weight that one note's text alone reads; and where the caller looks for them, the others are what they were."""
    notes = [{"title": title} for title in ("oak", "ash", "7")]
    only = set(tiny_model.processor.encode_note(notes[2]).input_ids)
    for note in notes[:2]:
        only -= set(tiny_model.processor.encode_note(note).input_ids)
    expected = tiny_model.encode(notes)
    with torch.no_grad():
        tiny_model.get_input_embeddings().weight[sorted(only)] = torch.nan
    with pytest.raises(NonFiniteError, match=r"of 1 of 3 notes are not finite, that of notes\[2\] first: compute in"):
        tiny_model.encode(notes)
    embeds = np.asarray(tiny_model.encode(notes, check_finite=False))
    assert np.isnan(embeds[2]).all()
    np.testing.assert_allclose(embeds[:2], expected[:2], atol=1e-5)
    np.testing.assert_allclose(tiny_model.encode(notes[:2]), expected[:2], atol=1e-5)


def test_another_processor(shared_tiny_model: NoteLLM2Model, notes: Notes, compose: Callable) -> None:
    left = compose(processor={"padding_side": "left"}).processor
    np.testing.assert_allclose(
        shared_tiny_model.encode(notes, processor=left), shared_tiny_model.encode(notes), atol=1e-5
    )
