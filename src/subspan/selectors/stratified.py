"""Chooses ``r`` singular vectors of the gradient, one from each of r parts of the spectrum.

With ``G = S diag(sigma) Vᵀ (m, n)``, ``sigma`` descending, and ``k = min(m, n)``: part ``j`` holds the indices
``ceil(j k / r)`` to ``ceil((j + 1) k / r) - 1``, and

    Q = V[:, I],    I_j uniform on part j

So every basis has large and small singular values. Each direction is drawn with a probability between
``1 / ceil(k / r)`` and ``1 / floor(k / r)``, near the ``r / k`` of uniform sampling. But uniform sampling may by chance
draw mostly large or mostly small values, while here any two bases are alike in their spectrum.

Source: stratified sampling (Neyman 1934), in place of SARA's weighted draw (Zhang et al. 2025, arXiv 2502.05790,
Alg. 2).

Deviations: none, since no paper has this selector.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from subspan import linalg
from subspan.parts import Key
from subspan.selectors.base import DrawnSelector


@dataclass(frozen=True)
class Stratified(DrawnSelector):
    """Singular vectors from all parts of the spectrum.

    Args:
        method: ``"gram"`` or ``"svd"``, see ``linalg.right_singular``.
    """

    method: str = "gram"

    def draw(self, sigma: Tensor, r: int, key: Key) -> Tensor:
        edges = -(-torch.arange(r + 1) * sigma.shape[-1] // r)  # rounded up
        uniform = torch.rand(
            (*sigma.shape[:-1], r), generator=linalg.keyed_generator("stratified", *key), dtype=torch.float64
        )
        return edges[:-1] + (uniform * edges.diff()).long()
