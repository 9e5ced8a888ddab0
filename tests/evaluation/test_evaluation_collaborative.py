"""Popularity and item-to-item filtering know the training views, all of them, and no other."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from scipy.sparse import csr_array

from evaluation.collaborative import item_cf_scores, load_train_viewers, num_cold, popularity_scores
from pairs.query import PairOptions
from pairs.split import SplitOptions, load_split, make_splits
from pairs.views import ViewOptions

NOTES = Dataset.from_dict({"note_id": [f"n{i}" for i in range(60)], "title": [f"Note {i}" for i in range(60)]})
SPLITS_BY = [
    SplitOptions(by="note", validation=0.2, test=0.3),
    SplitOptions(by="time", validation_days=2, test_days=3),
    SplitOptions(by="both", validation=0.2, test=0.3, validation_days=2, test_days=3),
]


def random_views(seed: int = 0) -> list[tuple[str, str, int]]:
    """900 distinct views within 11 days; five notes are none of `NOTES`."""
    rng = random.Random(seed)
    rows = {(f"u{rng.randrange(30)}", f"n{rng.randrange(65)}", rng.randrange(10**6)) for _ in range(900)}
    return sorted(rows, key=lambda row: row[2])


def table(rows: list[tuple[str, str, int]]) -> Dataset:
    return Dataset.from_dict(
        {name: [row[i] for row in rows] for i, name in enumerate(("user_id", "note_id", "timestamp"))}
    )


def make(folder: Path, rows: list[tuple[str, str, int]], split: SplitOptions, **view_options: Any) -> Path:
    views = ViewOptions(**view_options)
    make_splits(NOTES, table(rows), PairOptions(score="cosine", top_k=5), split, folder, view_options=views)
    return folder


@pytest.mark.parametrize("split", SPLITS_BY, ids=lambda split: split.by)
@pytest.mark.parametrize("pool", ["train", "test"])
def test_viewers_are_those_of_the_training_views(split: SplitOptions, pool: str, tmp_path: Path) -> None:
    rows = random_views()
    make(tmp_path, rows, split)
    note_ids = load_split(tmp_path, pool).notes["note_id"][:]
    train_ids = set(load_split(tmp_path, "train").notes["note_id"])
    last = max(second for _, note, second in rows if note in NOTES["note_id"][:])
    end = last + 1 if split.by == "note" else last + 1 - 5 * 86_400
    seen = {(user, note) for user, note, second in rows if note in train_ids and second < end}
    viewers = load_train_viewers(tmp_path, table(rows), note_ids)

    people = sorted({user for user, note in seen if note in note_ids})
    # Users are numbered in the order of their ids, so that columns can be compared.
    expected = np.array([[(user, note) in seen for user in people] for note in note_ids]).reshape(len(note_ids), -1)
    np.testing.assert_array_equal(viewers.toarray(), expected)
    is_cold = split.by != "time" and pool == "test"
    assert num_cold(viewers) == (len(note_ids) if is_cold else int((~expected.any(axis=1)).sum()))
    assert is_cold != bool(expected.any())


def test_views_after_the_cut_change_nothing(tmp_path: Path) -> None:
    rows = random_views()
    make(tmp_path, rows, SPLITS_BY[1])
    end = json.loads((tmp_path / "splits.json").read_text())["periods"]["train"][1]
    rng = random.Random(1)
    note_ids = NOTES["note_id"][:]

    def others_of(place: bool) -> Dataset:
        """The log with other notes and users in the views before, or from, the end of training."""
        known = [row for row in rows if row[1] in note_ids]
        unknown = [row for row in rows if row[1] not in note_ids]
        drawn = [
            (rng.choice(known)[0], rng.choice(note_ids), row[2]) if (row[2] < end) == place else row for row in known
        ]
        return table(drawn + unknown)

    viewers = load_train_viewers(tmp_path, table(rows), note_ids).toarray()
    np.testing.assert_array_equal(load_train_viewers(tmp_path, others_of(False), note_ids).toarray(), viewers)
    assert not np.array_equal(load_train_viewers(tmp_path, others_of(True), note_ids).toarray(), viewers)


def test_rules_for_views_are_those_of_the_split(tmp_path: Path) -> None:
    rows = random_views()
    make(tmp_path, rows, SPLITS_BY[1], max_user_views=20)
    viewers = load_train_viewers(tmp_path, table(rows), NOTES["note_id"][:])
    make(tmp_path / "all", rows, SPLITS_BY[1])
    assert 0 < viewers.sum() < load_train_viewers(tmp_path / "all", table(rows), NOTES["note_id"][:]).sum()


def test_another_log_and_no_splits_are_refused(tmp_path: Path) -> None:
    rows = random_views()
    make(tmp_path, rows, SPLITS_BY[1])
    with pytest.raises(
        ValueError, match=rf"{len(rows) - 1} rows, of which .* were made from a log of {len(rows)} rows"
    ):
        load_train_viewers(tmp_path, table(rows[1:]), ["n0"])
    with pytest.raises(FileNotFoundError, match="no splits.json"):
        load_train_viewers(tmp_path / "nowhere", table(rows), ["n0"])


def random_viewers(cold: bool = True) -> csr_array:
    viewed = np.random.default_rng(0).random((20, 15)) < 0.3
    viewed[[3, 7]] = not cold
    return csr_array(viewed.astype(np.int32))


def test_popularity_is_the_number_of_users_whatever_the_query() -> None:
    viewers = random_viewers()
    scores = popularity_scores(viewers)(np.arange(20))
    assert scores.shape == (20, 20)
    np.testing.assert_array_equal(scores, np.tile(viewers.toarray().sum(axis=1), (20, 1)))
    np.testing.assert_array_equal(popularity_scores(viewers)(np.arange(5, 9)), scores[5:9])
    assert num_cold(viewers) == 2 and num_cold(random_viewers(cold=False)) == 0


def test_item_cf_is_the_cosine_of_users() -> None:
    viewers = random_viewers()
    scores = item_cf_scores(viewers)(np.arange(20))
    dense = viewers.toarray().astype(float)
    lengths = np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), 1e-9)
    np.testing.assert_allclose(scores, (dense / lengths) @ (dense / lengths).T, atol=1e-12)
    assert np.abs(scores - dense @ dense.T).max() > 0.5  # the control: plain counts
    assert not scores[[3, 7]].any() and not scores[:, [3, 7]].any()
    np.testing.assert_array_equal(item_cf_scores(viewers)(np.arange(5, 9)), scores[5:9])


def test_notes_that_nobody_viewed_score_zero_everywhere() -> None:
    nobody = csr_array((4, 0), dtype=np.int32)
    assert num_cold(nobody) == 4
    for scores_of in (popularity_scores, item_cf_scores):
        scores = scores_of(nobody)(np.arange(1, 3))
        assert scores.shape == (2, 4) and not scores.any()
