"""Paired statistics over seeds: row A and row B are run on the same seeds, and their differences are tested.

    t-test     mean(d) / (std(d) / sqrt(n)), two-sided, n - 1 degrees of freedom
    Wilcoxon   signed ranks of d, exact; with n seeds its p cannot be below 2 / 2^n
    interval   95 %, mean(d) +- t(0.975, n - 1) std(d) / sqrt(n): it leaves 0 out exactly where the p of the t-test is
               below 0.05
    bootstrap  95 % by name, bias-corrected and accelerated bootstrap of the mean; it lies between the smallest and the
               largest d, so that for n values it covers the mean at most 1 - 2^(1 - n) of the time (94 % for five, 75 %
               for three)
    share      mean(x) / mean(y) of paired values, with Fieller's 95 % interval: every ratio q for which x - q y does
               not differ from 0 by the t-test; there is none where y itself may be 0 (Fieller 1954)
    Holm       p values of a family in rising order, times m, m - 1, ..., 1, kept monotone (Holm 1979)

scipy computes the tests and the bootstrap.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Comparison:
    """The comparison of paired measurements."""

    n: int
    """Number of pairs."""
    difference: float
    """Mean of A - B."""
    low: float | None
    """Lower end of the 95 % interval of the difference by the t-test."""
    high: float | None
    """Upper end of that interval."""
    bootstrap: tuple[float, float] | None
    """The bootstrap interval."""
    p_value: float | None
    """The p-value of the paired t-test."""
    p_wilcoxon: float | None
    """The p-value of Wilcoxon's test."""


def compare_pairs(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Compare pairs, where ``a[i]`` and ``b[i]`` are of one seed.

    Tests need at least two pairs, and differences that are not all equal.
    """
    from scipy import stats

    d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if len(d) < 2 or np.ptp(d) == 0:
        return Comparison(len(d), float(d.mean()) if len(d) else math.nan, None, None, None, None, None)
    low, high = interval(d)
    return Comparison(
        n=len(d),
        difference=float(d.mean()),
        low=low,
        high=high,
        bootstrap=bootstrap(d),
        p_value=float(stats.ttest_rel(a, b).pvalue),
        p_wilcoxon=float(stats.wilcoxon(d, method="exact").pvalue),
    )


def interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Return the 95 % interval of the mean of normal values; there is none for fewer than two values, or equal ones."""
    n = len(values)
    if n < 2 or np.ptp(values) == 0:
        return None, None
    mean, reach = float(np.mean(values)), _quantile(n) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean - reach, mean + reach


def bootstrap(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of the mean; there is none for fewer than three values, or equal ones."""
    from scipy import stats

    if len(values) < 3 or np.ptp(values) == 0:
        return None
    found = stats.bootstrap((np.asarray(values),), np.mean, n_resamples=9999, method="BCa", rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def share_interval(x: Sequence[float], y: Sequence[float]) -> tuple[float, float] | None:
    """Return Fieller's 95 % interval of mean(x) / mean(y), where ``x[i]`` and ``y[i]`` are of one seed.

    It holds the ratios q with (mean(x) - q mean(y))² <= t² var(x - q y) / n, which is quadratic in q. It is ``None``
    where these are no bounded interval, because y is not told from 0, and for fewer than two pairs.
    """
    n = len(x)
    if n < 2:
        return None
    c = _quantile(n) ** 2 / n * np.cov(x, y)
    mean_x, mean_y = float(np.mean(x)), float(np.mean(y))
    xx, xy, yy = mean_x**2 - c[0, 0], mean_x * mean_y - c[0, 1], mean_y**2 - c[1, 1]
    if yy <= 0:
        return None
    reach = math.sqrt(max(0.0, xy**2 - yy * xx))
    return float((xy - reach) / yy), float((xy + reach) / yy)


def _quantile(n: int) -> float:
    """Return t(0.975) with n - 1 degrees of freedom."""
    from scipy import stats

    return float(stats.t.ppf(0.975, n - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values of a family of tests, adjusted so that the chance of any false finding is below the level."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = largest
    return adjusted
