"""Baselines: BM25 finds words, features of missing images are zero, and a head learns what it is shown."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.baselines import bm25_scores, encode_texts, note_text, pooled_image_features, tokenize
from evaluation.head import ContrastiveHead, HeadSettings, train_head
from evaluation.metrics import retrieval_metrics


def test_note_text_takes_topics_as_list_or_string() -> None:
    assert note_text({"title": "A", "topics": ["b", "c"], "content": "d"}) == "A\nb, c\nd"
    assert note_text({"topics": "b, c", "image": "x.jpg"}) == "b, c"
    assert note_text({"title": None, "topics": None, "content": "  "}) == ""


def test_tokens_are_lower_cased_words_of_any_script() -> None:
    assert tokenize("Ärger, naïve_2 don't 花瓶abc ВАЗА") == ["ärger", "naïve_2", "don", "t", "花", "瓶", "abc", "ваза"]


def test_bm25_ranks_shared_rare_words_first() -> None:
    texts = ["a red vase", "a Blue VASE", "a blue chair", "a lamp", "", "a lamp of glass"]
    scores = bm25_scores(texts)(0, len(texts))
    assert scores.shape == (6, 6)
    assert scores.dtype == np.float32
    assert np.argmax(np.delete(scores[0], 0)) == 0  # the other vase
    assert not scores[4].any() and not scores[:, 4].any()  # a text without words
    np.testing.assert_array_equal(bm25_scores(texts)(2, 4), scores[2:4])
    assert not bm25_scores(["", "!"])(0, 2).any()


def test_encode_texts_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"notellm2\[baselines\]"):
        encode_texts("any", ["text"])


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    folder = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_image_features_do_not_depend_on_the_batch_and_are_zero_without_image(vit_folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)) for _ in range(4)]
    images[3].convert("L").save(tmp_path / "grey.png")
    notes: list[dict[str, Any]] = [
        {"image": images[0]},
        {"image": None},
        {"image": images[1]},
        {"image": str(tmp_path / "grey.png")},
    ]
    features = pooled_image_features(vit_folder, notes, batch_size=2)
    assert features.shape == (4, 16)
    assert features.dtype == np.float32
    assert [bool(row.any()) for row in features] == [True, False, True, True]
    np.testing.assert_allclose(pooled_image_features(vit_folder, notes[2:], batch_size=1), features[2:], atol=1e-5)

    with pytest.raises(ValueError, match="No note has an image"):
        pooled_image_features(vit_folder, [{"title": "a"}])
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"notes\[1\].image .*broken.jpg"):
        pooled_image_features(vit_folder, [notes[0], {"image": str(tmp_path / "broken.jpg")}])


def attribute_task(num_notes: int, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Related notes share one of 20 hidden attributes, which 4 of 24 features tell; the rest is noise."""
    rng = np.random.default_rng(seed)
    codes = np.random.default_rng(7).normal(size=(20, 4))
    attributes = rng.integers(0, 20, num_notes)
    features = rng.normal(size=(num_notes, 24))
    features[:, :4] = codes[attributes] + 0.2 * rng.normal(size=(num_notes, 4))
    related = [
        np.flatnonzero((attributes == value) & (np.arange(num_notes) != i)) for i, value in enumerate(attributes)
    ]
    return features.astype(np.float32), related


def test_a_trained_head_beats_an_untrained_one_and_is_deterministic() -> None:
    (train, train_related), (validation, validation_related) = attribute_task(300, 0), attribute_task(150, 1)
    test, test_related = attribute_task(150, 2)
    settings = HeadSettings(hidden_dim=64, embedding_dim=32, steps=80, batch_pairs=64, learning_rate=3e-3)
    head = train_head(train, train_related, validation, validation_related, settings)
    torch.manual_seed(0)
    untrained = ContrastiveHead(train, settings)
    recall = retrieval_metrics(head.encode(test), test_related, ks=(10,))["recall@10"]
    untrained_recall = retrieval_metrics(untrained.encode(test), test_related, ks=(10,))["recall@10"]
    assert recall > 2 * untrained_recall

    torch.manual_seed(123)  # the global random state has no part in it, and is left as it was
    state = torch.random.get_rng_state()
    again = train_head(train, train_related, validation, validation_related, settings)
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(again.encode(test), head.encode(test))
    np.testing.assert_allclose(np.linalg.norm(head.encode(test), axis=1), 1, atol=1e-5)


def test_head_refuses_what_it_cannot_train_on() -> None:
    features, related = attribute_task(20, 0)
    with pytest.raises(ValueError, match="train_related has no pair"):
        train_head(features, [np.array([], dtype=np.int64)] * 20, features, related)
    with pytest.raises(ValueError, match="NaN or infinity"):
        train_head(np.where(features > 1, np.nan, features), related, features, related)
