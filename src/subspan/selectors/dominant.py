"""The r leading singular vectors of the gradient.

    Q = V[:, :r],    G = S diag(sigma) Vᵀ (m, n),    sigma descending

Source: GaLore (Zhao et al. 2024, arXiv 2403.03507), Algorithm 2.

Deviations from the paper:

- The spectrum comes from the Gram matrix, unless ``method="svd"``.
- Each vector takes the sign of the one that it replaces. GaLore takes whatever sign its SVD returns.
"""

from dataclasses import dataclass

from torch import Tensor

from subspan.linalg import Gram
from subspan.parts import Key
from subspan.selectors.base import SpectralSelector, leading


@dataclass(frozen=True)
class Dominant(SpectralSelector):
    """The ``r`` leading singular vectors.

    Args:
        method: ``"gram"`` or ``"svd"``, see ``linalg.right_singular``.
    """

    method: str = "gram"

    def choose(self, G: Tensor | Gram, old: Tensor, key: Key) -> Tensor:
        return leading(G, old, self.method)
