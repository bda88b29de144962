"""A random subspace, drawn without a look at the gradient: ``Q (n, r)`` is uniform on the Stiefel manifold.

Then ``QᵀQ = I`` and ``E[Q Qᵀ] = (r/n) I``. ``scaled`` multiplies the basis by ``sqrt(n / r)``, so that ``E[Q Qᵀ] = I``
and ``QᵀQ = (n/r) I``.

Sources: GoLore (He et al. 2024, arXiv 2410.11289); with ``scaled``, RSO (Chen et al. 2025, arXiv 2502.07222).

Deviations from the papers: none. GoLore's code draws from the generator of the process and takes a polar factor. Here
the draw is keyed and factorised by QR, which has the same distribution.
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
        scaled: whether to scale to ``E[Q Qᵀ] = I``. The columns are then not orthonormal.
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
