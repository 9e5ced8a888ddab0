"""Intervals and paired tests: against formulas for large samples, and on the nose where nothing varies."""

import numpy as np
import pytest

from evaluation.significance import (
    LEVEL,
    POWER,
    RESAMPLES,
    bootstrap_interval,
    holm,
    paired_test,
    queries_needed,
)


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


def test_p_has_a_floor_where_exchanges_are_drawn() -> None:
    certain = paired_test(np.ones(50), np.zeros(50))
    assert certain.p_value == pytest.approx(2 / (RESAMPLES + 1), rel=1e-12) and certain.is_bound
    fewer = paired_test(np.ones(50), np.zeros(50), resamples=RESAMPLES // 2)
    assert fewer.p_value > certain.p_value and fewer.is_bound
    exact = paired_test(np.ones(10), np.zeros(10))  # all exchanges are counted
    assert exact.p_value == pytest.approx(2 / 2**10) and not exact.is_bound


def test_only_the_least_p_of_the_exchanges_made_is_a_bound() -> None:
    """A p that would be the least of fewer exchanges is a number of its own among more."""
    values = np.repeat([1.0, -1.0], [22, 4])
    drawn = paired_test(values, np.zeros(26), resamples=10_000)
    assert 2 / 10_001 < drawn.p_value < 2 / (RESAMPLES + 1) and not drawn.is_bound
    exact = paired_test(np.ones(13), np.zeros(13), resamples=10_000)
    assert exact.p_value < 2 / (RESAMPLES + 1) and not exact.is_bound
    assert not paired_test(np.ones(1), np.zeros(1)).is_bound


def test_values_that_do_not_vary() -> None:
    assert bootstrap_interval(np.full(5, 0.25)) == (0.25, 0.25)
    same = paired_test(np.ones(3), np.ones(3))
    assert (same.difference, same.low, same.high, same.p_value, same.deviation) == (0, 0, 0, 1, 0)


def test_one_query_has_no_interval() -> None:
    assert np.isnan(bootstrap_interval(np.array([0.25]))).all()
    found = paired_test(np.array([1.0]), np.array([0.0]))
    assert (found.difference, found.p_value, found.queries) == (1, 1, 1)
    assert np.isnan([found.low, found.high, found.deviation]).all()
    assert np.isfinite(bootstrap_interval(np.array([0.25, 0.5]))).all()  # control: two have one


def test_raised_p_values_call_luck_a_difference_as_seldom_as_they_say() -> None:
    """Of twenty tests of nothing some p is below 0.05 in two of three reports; a raised one is in one of twenty."""
    rng = np.random.default_rng(3)
    reports = rng.random((4000, 20))
    assert np.mean([min(holm(list(p))) <= LEVEL for p in reports]) == pytest.approx(LEVEL, abs=0.012)
    assert np.mean(reports.min(axis=1) <= LEVEL) > 0.6  # control
    # What is there is found more often than where every p is multiplied by their number.
    p_values = [0.001, 0.0169, 0.02, 0.04]
    assert holm(p_values) == pytest.approx([0.004, 0.0507, 0.0507, 0.0507])
    assert holm([0.03]) == [0.03] and holm([0.6, 0.7]) == [1.0, 1.0]


def test_the_queries_needed_find_a_difference_as_often_as_they_say() -> None:
    rng = np.random.default_rng(4)
    deviation, difference = 0.4, 0.05
    needed = queries_needed(deviation, difference)

    def found(queries: int) -> float:
        values = rng.normal(difference, deviation, size=(4000, queries))
        return float(np.mean(np.abs(values.mean(1)) > 1.96 * values.std(1, ddof=1) / np.sqrt(queries)))

    assert found(needed) == pytest.approx(POWER, abs=0.03)
    assert found(needed // 2) < 0.6  # control
    assert queries_needed(deviation, -difference) == needed < queries_needed(deviation, difference, LEVEL / 10)


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="same queries"):
        paired_test(np.ones(3), np.ones(4))
    for values in (np.array([]), np.array([1.0, np.nan]), np.ones((2, 2))):
        with pytest.raises(ValueError, match="finite numbers"):
            bootstrap_interval(values)
