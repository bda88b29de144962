"""Against the formulas, and cases worked out by hand."""

import math
import statistics

import pytest
from scipy import stats

from subspan.study.statistics import compare_pairs, holm, interval

A, B = [1.51, 1.49, 1.55, 1.50, 1.52], [1.60, 1.55, 1.61, 1.62, 1.57]


def test_the_paired_t_test_by_its_formula() -> None:
    found = compare_pairs(A, B)
    d = [a - b for a, b in zip(A, B, strict=True)]
    t = statistics.mean(d) / (statistics.stdev(d) / math.sqrt(5))
    assert found.difference == pytest.approx(-0.076)
    assert found.p_value == pytest.approx(2 * stats.t.cdf(-abs(t), df=4), rel=1e-12)
    # All five of one sign: 2 of the 32 assignments of signs are as extreme.
    assert found.p_wilcoxon == pytest.approx(2 / 32)
    assert found.low is not None
    assert found.high is not None
    assert min(d) < found.low < found.difference < found.high < max(d)


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
    assert interval([1.0, 2.0]) == (None, None)


def test_holm_worked_by_hand() -> None:
    """Four tests: 0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 * 1, which must not fall below its forerunner."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
