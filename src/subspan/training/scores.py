"""The scores of GLUE, from the predictions ``p`` and the labels ``y`` of n examples.

    accuracy   #(p = y) / n
    f1         2 TP / (2 TP + FP + FN) for the second class, which GLUE calls 1
    matthews   (c n - sum_k p_k t_k) / sqrt((n² - sum_k p_k²)(n² - sum_k t_k²))
               with c = #(p = y), and how often class k is predicted (p_k) and true (t_k);
               for two classes it is the correlation of p and y
    pearson    correlation of p and y
    spearman   correlation of their ranks, where equal values share their mean rank

Source: Wang et al. 2019, arXiv 1804.07461, section 3; Gorodkin 2004 for Matthews' correlation of several classes.

Deviations: a score that does not exist is 0. That is a correlation with a constant, and F1 where no example is
positive and none is predicted to be.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def accuracy(p: Tensor, y: Tensor) -> float:
    """Share of the predictions that are right."""
    return float((p == y).double().mean())


def f1(p: Tensor, y: Tensor) -> float:
    """Harmonic mean of precision and recall of the class 1."""
    hits, either = int(((p == 1) & (y == 1)).sum()), int((p == 1).sum() + (y == 1).sum())
    return 2 * hits / either if either else 0.0


def matthews(p: Tensor, y: Tensor) -> float:
    """Matthews' correlation of the classes."""
    n, classes = len(y), int(max(p.max(), y.max())) + 1
    predicted, true = (torch.bincount(A, minlength=classes).double() for A in (p, y))
    within = (n * n - predicted.square().sum()) * (n * n - true.square().sum())
    return float(((p == y).sum() * n - (predicted * true).sum()) / within.sqrt()) if within > 0 else 0.0


def pearson(p: Tensor, y: Tensor) -> float:
    """Pearson's correlation of the values."""
    a, b = (A.double() - A.double().mean() for A in (p, y))
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms > 0 else 0.0


def spearman(p: Tensor, y: Tensor) -> float:
    """Pearson's correlation of the ranks."""
    return pearson(_ranks(p), _ranks(y))


def _ranks(A: Tensor) -> Tensor:
    _, index, count = A.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[index]


SCORES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
