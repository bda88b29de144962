"""A subspace drawn without looking at the gradient: ``Q (n, r)`` uniform on the Stiefel manifold, ``E[Q Qᵀ] = (r/n) I``.

Source: GoLore (He et al. 2024, arXiv 2410.11289).
Deviations from the paper: none. (Its code draws from the process's own generator and takes a polar factor; here the draw
is keyed and factorised by QR, which has the same distribution.)
"""

from dataclasses import dataclass

from torch import Tensor

from subspan import linalg
from subspan.parts import Key
from subspan.selectors._matrix import MatrixSelector


@dataclass(frozen=True)
class Random(MatrixSelector):
    """Haar-random orthonormal columns."""

    @property
    def needs_gradient(self) -> bool:
        return False

    def choose(self, G: Tensor, old: Tensor, key: Key) -> Tensor:
        return linalg.haar(old, linalg.keyed_generator("random", *key))
