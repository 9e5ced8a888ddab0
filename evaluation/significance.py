"""How sure are we: bootstrap intervals of a mean over queries, and paired tests between two systems.

Queries are what is resampled: the systems and the notes are taken as they are. What another training run would give is
another question, which seeds answer (`evaluation.study`).
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 2000
BATCH_NUMBERS = 10_000_000
"""Numbers that are resampled at a time: 80 MB."""


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
        The lower and the upper bound; both are the value itself where all values are equal.

    Raises:
        ValueError: there is no value, or one is not finite.
    """
    _check(values)
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
        low, high: 95 % bootstrap interval of the difference.
        p_value: two-sided, of the paired randomisation test: how often a difference at least as large comes about where
            each query's two values are exchanged at random. It is of this one comparison; where many are made, some
            fall below 0.05 by luck.
        queries: number of queries.
    """

    difference: float
    low: float
    high: float
    p_value: float
    queries: int


def paired_test(
    first: np.ndarray, second: np.ndarray, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> PairedTest:
    """Compare two systems by one value a query each, in the same order of queries (Smucker, Allan and Carterette, 2007,
    "A comparison of statistical significance tests for information retrieval evaluation": the randomisation test).

    Args:
        first, second: (Q,) floats.
        confidence: of the interval.
        resamples: random exchanges, and draws of the bootstrap; p is at least 1 / (resamples + 1).
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
    p_value = 1.0  # no exchange changes anything
    if differences.any():
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
    return PairedTest(float(differences.mean()), low, high, p_value, len(differences))


def _check(values: np.ndarray) -> None:
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values must be finite numbers, one a query, got an array of shape {values.shape}: {values}")


__all__ = ["PairedTest", "bootstrap_interval", "paired_test"]
