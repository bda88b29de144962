"""The scores compared with scipy, and with counting."""

import pytest
import torch
from scipy import stats

from subspan.training.scores import SCORES


def drawn(seed: int, classes: int, n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    wrong = torch.rand(n, generator=generator) < 0.4
    return torch.where(wrong, torch.randint(classes, (n,), generator=generator), y), y


@pytest.mark.parametrize("seed", range(4))
def test_two_classes(seed: int) -> None:
    """Matthews' coefficient of two classes is the correlation of zeros and ones. F1 is the harmonic mean of precision
    and recall.
    """
    p, y = drawn(seed, 2)
    assert SCORES["matthews"](p, y) == pytest.approx(stats.pearsonr(p, y).statistic)
    pairs = list(zip(p.tolist(), y.tolist(), strict=True))
    precision = pairs.count((1, 1)) / (pairs.count((1, 1)) + pairs.count((1, 0)))
    recall = pairs.count((1, 1)) / (pairs.count((1, 1)) + pairs.count((0, 1)))
    assert SCORES["f1"](p, y) == pytest.approx(2 * precision * recall / (precision + recall))
    assert SCORES["accuracy"](p, y) == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


@pytest.mark.parametrize("seed", range(4))
def test_matthews_of_several_classes(seed: int) -> None:
    """The coefficient is the correlation of one-hot vectors, summed over classes: cov(p, y) / sqrt(cov(p, p) cov(y,
    y)).
    """
    p, y = drawn(seed, 5)
    P, Y = (torch.nn.functional.one_hot(A, 5).double() for A in (p, y))
    P, Y = P - P.mean(0), Y - Y.mean(0)
    expected = float((P * Y).sum() / ((P * P).sum() * (Y * Y).sum()).sqrt())
    assert SCORES["matthews"](p, y) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_correlations(seed: int) -> None:
    """They are scipy's, also where values are equal."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(100, generator=generator)
    y = (p + torch.randn(100, generator=generator)).round()
    assert SCORES["pearson"](p, y) == pytest.approx(stats.pearsonr(p, y).statistic, abs=1e-6)
    assert SCORES["spearman"](p, y) == pytest.approx(stats.spearmanr(p, y).statistic)


@pytest.mark.parametrize("name", ["f1", "matthews", "pearson", "spearman"])
def test_a_constant_prediction_scores_nothing(name: str) -> None:
    assert SCORES[name](torch.zeros(6, dtype=torch.long), torch.tensor([0, 1, 0, 1, 1, 0])) == 0.0
