"""A subspace drawn without looking at the gradient: ``Q (n, r)`` uniform on the Stiefel manifold, ``E[Q Qᵀ] = (r/n)
I``.

``scaled`` multiplies it by ``sqrt(n / r)``, so that ``E[Q Qᵀ] = I`` and ``QᵀQ = (n/r) I``.

Sources: GoLore (He et al. 2024, arXiv 2410.11289); scaled, RSO (Chen et al. 2025, arXiv 2502.07222). Deviations from
the paper: none. (Its code draws from the process's own generator and takes a polar factor; here the draw is keyed and
factorised by QR, which has the same distribution.)
"""

from dataclasses import dataclass

from torch import Tensor

from subspan import linalg
from subspan.linalg import Gram
from subspan.parts import Key
from subspan.selectors.base import MatrixSelector


@dataclass(frozen=True)
class Random(MatrixSelector):
    """Haar-random columns.

    Args:
        scaled: to ``E[Q Qᵀ] = I``, instead of orthonormal.
    """

    scaled: bool = False

    @property
    def needs_gradient(self) -> bool:
        return False

    def choose(self, G: Tensor | Gram, old: Tensor, key: Key) -> Tensor:
        Q = linalg.haar(old, linalg.keyed_generator("random", *key))
        return Q * (Q.shape[-2] / Q.shape[-1]) ** 0.5 if self.scaled else Q

    @property
    def orthonormal(self) -> bool:
        return not self.scaled
