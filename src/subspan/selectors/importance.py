"""Chooses ``r`` singular vectors of the gradient, drawn without replacement: the larger the singular value, the
likelier.

With ``G = S diag(sigma) Vᵀ (m, n)`` and ``k = min(m, n)`` the basis is ``Q = V[:, I]``. The indices ``I`` are drawn one
after another, without replacement, with probability proportional to

    w_i = (1 - floor) * sigma_i^power / sum_j sigma_j^power + floor / k

They are sorted ascending, so that column j of the new basis stays close in the spectrum to column j of the old one.

Source: SARA (Zhang et al. 2025, arXiv 2502.05790), Algorithm 2, is ``power=1, floor=0``.

Deviations from the paper:

- The spectrum comes from the Gram matrix, unless ``method="svd"``. This is in fp32 off the CPU, and also on the CPU
  where the Gram matrix is of side 512 or more. There a sigma below 3e-4 of the largest is noise of that size, so such
  directions are drawn a little too often.
- The draw is keyed, and not taken from a live generator.
- Where fewer than r singular values are positive, other singular vectors fill up the basis. ``torch.multinomial`` would
  raise.
- Signs are aligned with the old basis.
- ``power`` and ``floor`` are additions.
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
    ``floor=0`` it falls to zero with the smallest singular value, and so does the guarantee. With ``floor > 0`` a
    single draw already picks each direction with probability at least ``floor / k``, so ``delta >= floor / k``.

    Args:
        power: exponent of the singular values, >= 0. 1 is the paper's, 0 samples uniformly, and a large one nearly
            always takes the leading vectors.
        floor: share of the probability that is the same for all directions, in [0, 1].
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
        """Return ``log w (..., k)`` for singular values ``sigma (..., k)``; at large powers ``w`` would underflow.

        It is on the CPU, where the indices are drawn: not every device has fp64.
        """
        sigma = sigma.to("cpu", torch.float64)
        log_w = torch.xlogy(self.power, sigma)  # 0 * log 0 = 0, so power 0 is uniform over zeros too
        total = log_w.logsumexp(-1, keepdim=True)
        # A matrix of zeros in a stack says nothing about its directions.
        log_w = torch.where(total.isneginf(), -math.log(sigma.shape[-1]), log_w - total)
        if self.floor == 0:
            return log_w
        uniform = torch.full_like(log_w, math.log(self.floor / sigma.shape[-1]))
        return uniform if self.floor == 1 else torch.logaddexp(log_w + math.log1p(-self.floor), uniform)

    def draw(self, sigma: Tensor, r: int, key: Key) -> Tensor:
        return linalg.sample_without_replacement(self.log_weights(sigma), r, linalg.keyed_generator("importance", *key))
