"""Which notes are related, against a set of pairs."""

import numpy as np
import pytest

from train.related import RelatedNotes


@pytest.mark.parametrize("seed", range(5))
def test_answers_for_every_pair_of_a_batch(seed: int):
    draw = np.random.default_rng(seed)
    pairs = draw.integers(0, 40, (70, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    related = RelatedNotes(np.concatenate([pairs, pairs[:5, ::-1]]), 40)  # some are there both ways
    known = {tuple(pair) for pair in pairs.tolist()} | {tuple(pair) for pair in pairs[:, ::-1].tolist()}
    notes = draw.permutation(40)[:25]
    found = [tuple(pair) for pair in related.among(notes).tolist()]
    expected = [(i, j) for i in range(25) for j in range(25) if (notes[i], notes[j]) in known]
    assert found == expected and 0 < len(expected) < 25 * 24
    for note in range(40):
        assert related.of(note).tolist() == sorted(b for a, b in known if a == note)
    assert related.degrees.tolist() == [len(related.of(note)) for note in range(40)]


def test_no_pairs_and_no_notes():
    empty = RelatedNotes(np.array([]), 5)
    assert empty.among(np.arange(5)).shape == (0, 2) and not empty.degrees.any()
    assert RelatedNotes(np.array([(0, 1)]), 2).among(np.array([], dtype=np.int64)).shape == (0, 2)
