"""The closed form equals many random orders, ranked and scored one by one."""

import numpy as np
import pytest

from pairs.ceilings import ceilings

KS = (1, 3, 10, 40)


def sample_ceiling(groups, related, k, rng, n_samples=4000):
    """Recall@k and NDCG@k of random orders: the query's group shuffled, then the rest shuffled."""
    recalls, ndcgs = [], []
    for query, relevant in enumerate(related):
        if not len(relevant):
            continue
        others = np.array([note for note in range(len(groups)) if note != query])
        is_relevant = np.isin(others, relevant)
        rest = np.array([groups[note] != groups[query] for note in others])
        keys = rest + rng.uniform(size=(n_samples, len(others)))
        hits = is_relevant[np.argsort(keys, axis=1)[:, :k]]  # (samples, k)
        discounts = 1 / np.log2(np.arange(2, hits.shape[1] + 2))
        recalls.append(hits.sum(axis=1).mean() / len(relevant))
        ndcgs.append((hits @ discounts).mean() / discounts[: min(k, len(relevant))].sum())
    return np.mean(recalls), np.mean(ndcgs)


@pytest.fixture
def tiny_world():
    rng = np.random.default_rng(0)
    subjects = rng.choice(["x", "y", "z"], 30).tolist()
    looks = rng.choice(["p", "q"], 30).tolist()
    subjects[0] = "alone"  # a group of one note
    related = []
    for note in range(30):
        same = [i for i in range(30) if i != note and (subjects[i], looks[i]) == (subjects[note], looks[note])]
        noise = [i for i in rng.permutation(30)[:3] if i != note and i not in same]
        related.append(np.array(same[:4] + noise, dtype=np.int64))
    related[5] = np.array([], dtype=np.int64)
    return subjects, looks, related


def test_equal_to_monte_carlo(tiny_world):
    subjects, looks, related = tiny_world
    exact = ceilings(subjects, looks, related, KS)
    groups = {"text": subjects, "image": looks, "both": [a + b for a, b in zip(subjects, looks, strict=True)]}
    rng = np.random.default_rng(1)
    for name, group in groups.items():
        for k in KS:
            recall, ndcg = sample_ceiling(group, related, k, rng)
            assert exact[name][f"recall@{k}"] == pytest.approx(recall, abs=0.006)
            assert exact[name][f"ndcg@{k}"] == pytest.approx(ndcg, abs=0.006)
    # Negative control: the tolerance tells the three apart.
    both, text, image = (exact[name]["recall@3"] for name in ("both", "text", "image"))
    assert both > text + 0.012 and text > image + 0.012


def test_by_hand():
    # Three notes of one cell, a fourth of the same subject, a fifth of the same look; 0, 1 and 2 are related.
    subjects, looks = ["s", "s", "s", "s", "t"], ["l", "l", "l", "m", "l"]
    related = [np.array([1, 2]), np.array([0, 2]), np.array([0, 1]), np.array([], int), np.array([], int)]
    best = ceilings(subjects, looks, related, [1, 2])
    assert best["both"] == {"recall@1": 0.5, "ndcg@1": 1.0, "recall@2": 1.0, "ndcg@2": 1.0}
    assert best["text"]["recall@1"] == best["image"]["recall@1"] == pytest.approx(1 / 3)
    assert best["text"]["ndcg@2"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("related", "ks", "message"),
    [
        ([[0], []], [1], r"related\[0\]"),
        ([[1, 1], []], [1], r"related\[0\]"),
        ([[], []], [1], "no note has a related note"),
        ([[1], [0]], [0], "cut-off"),
        ([[1]], [1], "give one of each a note"),
    ],
)
def test_bad_input_is_refused(related, ks, message):
    with pytest.raises(ValueError, match=message):
        ceilings(["s", "s"], ["l", "l"], [np.array(r, dtype=np.int64) for r in related], ks)
