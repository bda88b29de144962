"""The statistics, compared with their formulas and with cases worked out by hand."""

import math
import random
import statistics

import pytest
from scipy import stats

from subspan.study.statistics import bootstrap, compare_pairs, holm, interval, share_interval

A, B = [1.51, 1.49, 1.55, 1.50, 1.52], [1.60, 1.55, 1.61, 1.62, 1.57]


def test_the_paired_t_test_by_its_formula() -> None:
    found = compare_pairs(A, B)
    d = [a - b for a, b in zip(A, B, strict=True)]
    t = statistics.mean(d) / (statistics.stdev(d) / math.sqrt(5))
    assert found.difference == pytest.approx(-0.076)
    assert found.p_value == pytest.approx(2 * stats.t.cdf(-abs(t), df=4), rel=1e-12)
    # All five of one sign: 2 of the 32 assignments of signs are as extreme.
    assert found.p_wilcoxon == pytest.approx(2 / 32)
    assert found.bootstrap is not None
    assert min(d) < found.bootstrap[0] < found.difference < found.bootstrap[1] < max(d)


@pytest.mark.parametrize("shift", [-0.1, -0.03, -0.02, 0.0, 0.02, 0.03, 0.1])
def test_the_interval_leaves_0_out_where_p_is_below_005(shift: float) -> None:
    """They are one test: where p is 0.05 an end of the interval is 0."""
    noise = [0.01, -0.02, 0.03, -0.01, -0.01]
    found = compare_pairs([shift + x for x in noise], [0.0] * 5)
    assert found.low is not None
    assert found.high is not None
    assert found.p_value is not None
    assert (found.low > 0 or found.high < 0) == (found.p_value < 0.05)
    t = stats.t.interval(0.95, 4, loc=shift, scale=stats.sem(noise))
    assert (found.low, found.high) == pytest.approx(t)


def test_the_interval_covers_95_percent() -> None:
    """For the mean of three normal values it does. The bootstrap's does not, which is why it is not printed."""
    generator = random.Random(0)
    draws = [[generator.gauss(0, 1) for _ in range(3)] for _ in range(1000)]
    covered = [low <= 0 <= high for low, high in map(interval, draws) if low is not None and high is not None]
    assert len(covered) == 1000
    assert 0.93 < statistics.mean(covered) < 0.97
    within = [min(values) <= 0 <= max(values) for values in draws]  # what a bootstrap of any kind can reach at most
    assert statistics.mean(within) < 0.8


def test_fiellers_interval_is_where_the_t_test_does_not_reject() -> None:
    x, y = [0.020, 0.012, 0.031, 0.022, 0.021], [0.030, 0.041, 0.028, 0.035, 0.031]
    found = share_interval(x, y)
    assert found is not None
    for end in found:
        assert stats.ttest_1samp([a - end * b for a, b in zip(x, y, strict=True)], 0).pvalue == pytest.approx(0.05)
    assert found[0] < sum(x) / sum(y) < found[1]
    assert share_interval(x, [a - 0.03 for a in y]) is None  # y may be 0: no bounded interval
    assert share_interval([1.0], [2.0]) is None


def test_pairing_sees_what_the_spread_of_seeds_hides() -> None:
    seeds = [1.0, 2.0, 3.0, 4.0, 5.0]
    shifted = [x + 0.1 + 0.001 * i for i, x in enumerate(seeds)]
    found = compare_pairs(shifted, seeds)
    assert found.p_value is not None
    assert found.p_value < 1e-6
    assert stats.ttest_ind(shifted, seeds).pvalue > 0.9


def test_no_test_without_pairs_that_differ() -> None:
    assert compare_pairs([1.0], [2.0]).p_value is None
    assert compare_pairs([1.0, 2.0], [1.0, 2.0]).p_value is None
    assert interval([1.0]) == interval([1.0, 1.0]) == (None, None)
    assert bootstrap([1.0, 2.0]) is None


def test_holm_worked_by_hand() -> None:
    """Four tests: 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 * 1, which must not fall below its forerunner."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
