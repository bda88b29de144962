"""r singular vectors of the gradient, sampled without replacement with probability proportional to singular value.

With ``G = S diag(sigma) Vᵀ (m, n)``: ``Q = V[:, I]``, ``I`` drawn one index after another, without replacement, with

    w_i = (1 - floor) * sigma_i^power / sum_j sigma_j^power + floor / k,        k = min(m, n)

and sorted ascending, so that column j of the new basis stays close in rank to column j of the old one.

Source: SARA (Zhang et al. 2025, arXiv 2502.05790), Algorithm 2, is ``power=1, floor=0``. Deviations from the paper: the
spectrum comes from the Gram matrix unless ``method="svd"``; the draw is keyed, not taken from a live generator; where
fewer than r singular values are positive the rest of the basis is filled up from the others (``torch.multinomial``
would raise); signs are aligned with the old basis; ``power`` and ``floor`` are additions. Off the CPU, and on it where
the Gram matrix is of side 512 or more, that is in fp32, where a sigma below 3e-4 of the largest is noise of that size:
such directions are drawn a little too often.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan import linalg
from subspan.parts import Key
from subspan.selectors.base import DrawnSelector
from subspan.utils.checks import LARGEST, is_factor, is_number
from subspan.utils.errors import SettingError


@dataclass(frozen=True)
class Importance(DrawnSelector):
    """Importance-sampled singular vectors (SARA).

    The paper's convergence constant ``delta`` is the least probability with which a direction is selected. With
    ``floor=0`` it falls to zero with the smallest singular value, and the guarantee with it; with ``floor > 0`` one
    draw already picks each direction with probability at least ``floor / k``, so ``delta >= floor / k``.

    Args:
        power: exponent on the singular values, >= 0: 1 is the paper, 0 uniform, a large one nearly dominant.
        floor: share of the probability spread evenly over all directions, in [0, 1].
        method: ``"gram"`` or ``"svd"``, see ``linalg.right_singular``.
    """

    power: float = 1.0
    floor: float = 0.0
    method: str = "gram"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_factor(self.power):
            raise SettingError(
                f"power={self.power!r}: expected a number from 0 to {LARGEST:g} (1 is SARA, 0 samples uniformly)"
            )
        if not is_number(self.floor) or not 0 <= self.floor <= 1:
            raise SettingError(f"floor={self.floor!r}: expected a share between 0 and 1")

    def log_weights(self, sigma: Tensor) -> Tensor:
        """``log w (..., k)`` for singular values ``sigma (..., k)``. In logarithms: a large power would underflow."""
        log_w = torch.xlogy(self.power, sigma.double())  # 0 * log 0 = 0, so power 0 is uniform over zeros too
        total = log_w.logsumexp(-1, keepdim=True)
        # A zero matrix in a stack of others leaves nothing to go by.
        log_w = torch.where(total.isneginf(), -math.log(sigma.shape[-1]), log_w - total)
        if self.floor == 0:
            return log_w
        uniform = torch.full_like(log_w, math.log(self.floor / sigma.shape[-1]))
        return uniform if self.floor == 1 else torch.logaddexp(log_w + math.log1p(-self.floor), uniform)

    def draw(self, sigma: Tensor, r: int, key: Key) -> Tensor:
        return linalg.sample_without_replacement(self.log_weights(sigma), r, linalg.keyed_generator("importance", *key))
