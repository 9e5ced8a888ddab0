"""How sure are we: bootstrap intervals of a mean over queries, and paired tests between two systems.

Queries are what is resampled: the systems and the notes are taken as they are. What another training run would give is
another question, which seeds answer (`evaluation.study`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 2000
BATCH_NUMBERS = 10_000_000
"""Numbers that are resampled at a time: 80 MB."""
LEVEL = 0.05
"""The probability of calling luck a difference that tests allow themselves."""
POWER = 0.8
"""The probability of finding a difference that there is that tests are planned for."""


def bootstrap_interval(
    values: np.ndarray, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of one value a query (Efron, 1979).

    Args:
        values: (Q,) floats, as `evaluation.metrics.metrics_per_query` gives them, or a difference of two of them.
        confidence: probability that the interval is to cover, between 0 and 1.
        resamples: draws of Q queries with replacement.
        seed: of the draws.

    Returns:
        The lower and the upper bound; both are the value itself where all values are equal. NaN of one value alone,
        which says nothing of how queries differ.

    Raises:
        ValueError: there is no value, or one is not finite.
    """
    _check(values)
    if len(values) == 1:
        return math.nan, math.nan
    if values.min() == values.max():  # SciPy warns of a degenerate distribution
        return float(values[0]), float(values[0])
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, BATCH_NUMBERS // len(values)),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


@dataclass(frozen=True)
class PairedTest:
    """Two systems on the same queries.

    Attributes:
        difference: mean of the first minus the second.
        low, high: 95 % bootstrap interval of the difference; NaN of one query alone.
        p_value: two-sided, of the paired randomisation test: how often a difference at least as large comes about where
            each query's two values are exchanged at random. It is of this one comparison; where many are made, some
            fall below 0.05 by luck.
        queries: number of queries, Q.
        deviation: standard deviation of the Q differences; NaN of one query alone.
        is_bound: whether `p_value` is the least that so many random exchanges can give, as none of them reached the
            difference: the true one may be any smaller number.
    """

    difference: float
    low: float
    high: float
    p_value: float
    queries: int
    deviation: float
    is_bound: bool


def paired_test(
    first: np.ndarray, second: np.ndarray, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> PairedTest:
    """Compare two systems by one value a query each, in the same order of queries (Smucker, Allan and Carterette, 2007,
    "A comparison of statistical significance tests for information retrieval evaluation": the randomisation test).

    Args:
        first, second: (Q,) floats.
        confidence: of the interval.
        resamples: random exchanges, and draws of the bootstrap; p is at least 2 / (resamples + 1), or exact where
            queries are so few that all 2^Q exchanges are no more than `resamples`.
        seed: of both.

    Raises:
        ValueError: the lengths differ, there is no value, or one is not finite.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"first has shape {first.shape}, second {second.shape}: give values of the same queries in the same order."
        )
    differences = first - second
    low, high = bootstrap_interval(differences, confidence, resamples, seed)
    p_value, is_bound = 1.0, False  # no exchange changes anything or, of one query, both are as far from 0
    if differences.any() and len(differences) > 1:
        p_value = float(
            stats.permutation_test(
                (differences,),
                np.mean,
                permutation_type="samples",
                n_resamples=resamples,
                batch=max(1, BATCH_NUMBERS // len(differences)),
                rng=np.random.default_rng(seed),
            ).pvalue
        )
        is_exact = 2 ** len(differences) <= resamples  # SciPy then counts all exchanges
        is_bound = not is_exact and p_value <= 2 / (resamples + 1)
    deviation = float(differences.std(ddof=1)) if len(differences) > 1 else math.nan
    return PairedTest(float(differences.mean()), low, high, p_value, len(differences), deviation, is_bound)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of M tests, raised for their number: if all below `LEVEL` are called differences, the probability
    that any of these is luck is no more than `LEVEL` (Holm, 1979, "A simple sequentially rejective multiple test
    procedure"). The least is multiplied by M, the next by M - 1, …, and none falls below the one before it.

    >>> holm([0.25, 0.01, 0.02])
    [0.25, 0.03, 0.04]
    """
    raised = [0.0] * len(p_values)
    least = 0.0
    for place, test in enumerate(np.argsort(p_values, kind="stable").tolist()):
        raised[test] = least = max(least, min(1.0, (len(p_values) - place) * p_values[test]))
    return raised


def queries_needed(deviation: float, difference: float, level: float = LEVEL) -> int:
    """How many queries a paired two-sided test needs to find a difference with probability `POWER`, if it is the true
    one: n = ((z_(1 - level / 2) + z_POWER) · deviation / difference)², of the normal approximation (as in Lachin, 1981,
    "Introduction to sample size determination and power analysis for clinical trials").

    Args:
        deviation: standard deviation of the differences of queries.
        difference: their true mean, not 0.
        level: of the test; of M tests together `LEVEL` / M.
    """
    quantiles = stats.norm.ppf(1 - level / 2) + stats.norm.ppf(POWER)
    return math.ceil((quantiles * deviation / difference) ** 2)


def _check(values: np.ndarray) -> None:
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values must be finite numbers, one a query, got an array of shape {values.shape}: {values}")


__all__ = ["PairedTest", "bootstrap_interval", "holm", "paired_test", "queries_needed"]
