"""Intervals and paired tests: against formulas for large samples, and on the nose where nothing varies."""

import numpy as np
import pytest

from evaluation.significance import bootstrap_interval, paired_test


def test_the_interval_is_that_of_the_normal_approximation_for_many_queries() -> None:
    values = np.random.default_rng(0).exponential(size=4000)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert bootstrap_interval(values) == (low, high) != bootstrap_interval(values, seed=1)  # repeatable, seeded
    narrow = bootstrap_interval(values, confidence=0.5)
    assert narrow[1] - narrow[0] < 0.5 * (high - low)


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_interval((rng.random(80) < 0.3).astype(float), confidence=0.9, resamples=400)
        covered += low <= 0.3 <= high
    assert 0.82 < covered / 200 < 0.97


def test_a_true_difference_is_found_and_none_is_not() -> None:
    rng = np.random.default_rng(2)
    base = rng.random(300)
    better, same = base + 0.05 + 0.1 * rng.normal(size=300), base + 0.1 * rng.normal(size=300)
    found = paired_test(better, base)
    assert found.p_value < 0.01 and 0 < found.low < found.difference < found.high and found.queries == 300
    none = paired_test(same, base)
    assert none.p_value > 0.05 and none.low < 0 < none.high
    assert paired_test(base, better).difference == pytest.approx(-found.difference)
    # What pairing buys: the same means without pairs are within noise.
    unpaired = paired_test(rng.permutation(better), base)
    assert unpaired.high - unpaired.low > 2 * (found.high - found.low)


def test_p_is_exact_where_all_exchanges_can_be_counted() -> None:
    # Four differences of one sign: 2 of 16 exchanges give a mean as far from zero.
    assert paired_test(np.array([1.0, 2.0, 3.0, 4.0]), np.zeros(4)).p_value == pytest.approx(2 / 16)


def test_values_that_do_not_vary() -> None:
    assert bootstrap_interval(np.full(5, 0.25)) == (0.25, 0.25)
    same = paired_test(np.ones(3), np.ones(3))
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="same queries"):
        paired_test(np.ones(3), np.ones(4))
    for values in (np.array([]), np.array([1.0, np.nan]), np.ones((2, 2))):
        with pytest.raises(ValueError, match="finite numbers"):
            bootstrap_interval(values)
