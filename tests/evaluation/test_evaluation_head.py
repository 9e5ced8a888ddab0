"""A trained head learns what it is shown, and the same arguments give the same head."""

import numpy as np
import pytest
import torch

from evaluation.head import ContrastiveHead, HeadSettings, train_head
from evaluation.metrics import retrieval_metrics


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
