"""Short notes, popular and unknown ones: which pairs are in which subset."""

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from pairs.subsets import load_subsets, pair_subsets, popularity_classes, text_lengths


def test_lengths_count_all_text():
    notes = Dataset.from_dict(
        {"note_id": ["a", "b"], "title": ["ab", ""], "topics": [["x", "yz"], []], "content": ["ü", "abc"]}
    )
    assert text_lengths(notes).tolist() == [2 + 5 + 1, 3]
    assert text_lengths(notes.remove_columns(["title", "topics", "content"])).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("users", "classes"),
    [
        ([10, 6, 2, 1, 1, 0], "head torso tail tail tail cold"),
        ([1, 1, 1, 1], "head head head head"),  # equally many, one class
        ([0, 0], "cold cold"),
        ([5], "head"),
        ([], ""),
        ([1, 53, 1, 30, 20, 0], "tail head tail torso torso cold"),
    ],
)
def test_popularity(users, classes):
    assert popularity_classes(np.array(users, np.int64)).tolist() == classes.split()


def test_pairs_are_put_into_subsets():
    notes = Dataset.from_dict({"note_id": ["a", "b", "c", "d"], "content": ["x" * 40, "x", "x" * 30, "x" * 50]})
    pairs = Dataset.from_dict({"note_id": ["a", "b", "d"], "related_note_id": ["b", "c", "a"]})
    # "elsewhere" is in no pair here, but it is what makes the others no head.
    users = pa.table({"note_id": ["elsewhere", "a", "b"], "users": [100, 60, 5]})
    assert pair_subsets(pairs, notes, users).to_dict() == {
        "note_id": ["a", "b", "d"],
        "related_note_id": ["b", "c", "a"],
        "short_query": [False, True, False],
        "short_target": [True, False, False],
        "query_popularity": ["torso", "tail", "cold"],
        "target_popularity": ["tail", "cold", "torso"],
    }


def test_no_pairs_no_subsets(tmp_path):
    empty = Dataset(pa.table({name: pa.array([], pa.string()) for name in ("note_id", "related_note_id", "content")}))
    users = pa.table({"note_id": pa.array([], pa.string()), "users": pa.array([], pa.int64())})
    assert len(pair_subsets(empty, empty, users)) == 0
    with pytest.raises(FileNotFoundError):
        load_subsets(tmp_path, "test")
