"""Paired statistics over seeds: row A and row B are run on the same seeds, and their differences are tested.

    t-test     mean(d) / (std(d) / sqrt(n)), two-sided, n - 1 degrees of freedom
    Wilcoxon   signed ranks of d, exact; with n seeds its p cannot be below 2 / 2^n
    interval   95 %, bias-corrected and accelerated bootstrap of the mean
    Holm       p values of a family in rising order, times m, m - 1, ..., 1, kept monotone (Holm 1979)

scipy computes the first three.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Comparison:
    """Of paired measurements: ``difference`` is the mean of A - B, ``low`` to ``high`` its 95 % interval."""

    n: int
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    p_wilcoxon: float | None


def compare_pairs(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """``a[i]`` and ``b[i]`` are of one seed. Tests need two pairs or more whose differences are not all equal."""
    from scipy import stats

    d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if len(d) < 2 or np.ptp(d) == 0:
        return Comparison(len(d), float(d.mean()) if len(d) else math.nan, None, None, None, None)
    low, high = interval(d)
    return Comparison(
        n=len(d),
        difference=float(d.mean()),
        low=low,
        high=high,
        p_value=float(stats.ttest_rel(a, b).pvalue),
        p_wilcoxon=float(stats.wilcoxon(d, method="exact").pvalue),
    )


def interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """The 95 % bootstrap interval of the mean; none for fewer than three values, or equal ones."""
    from scipy import stats

    if len(values) < 3 or np.ptp(values) == 0:
        return None, None
    found = stats.bootstrap((np.asarray(values),), np.mean, n_resamples=9999, method="BCa", rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of a family of tests, adjusted so that the chance of any false finding stays below the level."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = largest
    return adjusted
