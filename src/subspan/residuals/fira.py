"""Follow the gradient outside the subspace too, row by row, with the step size that Adam takes inside it.

    S     = G - a R Qᵀ                        a = 1 (orthogonal) or a = scale (official)
    phi_i = ||U_i|| / max(||R_i||, 1e-8 ||G_i||)      row i of the oriented matrices; 0 where G_i = 0
    T     = phi * S
    T    <- T * min(1, gamma ||T_prev|| / ||T||)      the norm-growth limiter; none at the first step
    D     = scale * U Qᵀ + T                          scale * T with ``scaled``

``U`` is Adam's direction without bias correction, which the optimizer applies to all of ``D``. ``||T_prev||`` is the
norm after limiting. Each matrix of a stack has its own.

Neither ``S`` nor ``T`` is formed. As ``QᵀQ = I``, ``||S_i||² = ||G_i||² - (2a - a²) ||R_i||²``, and ``D`` is
``(scale * U - a phi * R) Qᵀ + phi * G``.

Source: Fira (Chen et al. 2024, arXiv 2410.01623), norm-based scaling and the norm-growth limiter.

Deviations from the paper:

- The paper divides by ``||R_i||`` without a guard. The guard here is relative to the row, so ``D`` does not depend on
  the scale of the gradients where ``U`` does not. It acts only on a row that lies outside the subspace but for
  ``1e-8`` of its norm, and then ``||T_i|| <= 1e8 ||U_i||`` before the limiter. A row without a gradient stays out of
  ``T``. The authors' code adds an absolute ``1e-8`` to ``||R_i||`` and to ``||T_prev||``. There the residual fades as
  gradients come near to that size.
- ``mode="official"`` is what the authors' code computes, except for these guards. Its ``project_back`` carries the
  scale, so a share ``1 - scale`` of the gradient *inside* the subspace stays in the residual. The authors presumably
  made their tables with it.
- ``scaled=True`` is an addition. With it, the part of a row outside the subspace moves as far, in proportion to its
  gradient, as the part inside. Without it, the part outside moves ``1 / scale`` times as far.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from subspan.parts import ALL_HERE, Rows
from subspan.residuals.base import Plain, check_limiter, last_norm, limited_, row_factors, row_norms
from subspan.storage.allocation import State
from subspan.utils.errors import SettingError


@dataclass(frozen=True)
class Fira(Plain):
    """Fira's scaled residual.

    Args:
        mode: ``"orthogonal"`` (the paper) or ``"official"`` (the authors' code).
        limiter: largest growth of the residual's norm from one step to the next, > 0; ``None`` turns it off.
        scaled: whether to multiply the residual by ``scale`` too; the paper does not.
    """

    needs_orthonormal = True
    needs_gradient = True

    mode: str = "orthogonal"
    limiter: float | None = 1.01
    scaled: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("orthogonal", "official"):
            raise SettingError(
                f"mode={self.mode!r}: expected 'orthogonal' (the paper) or 'official' (the authors' code)"
            )
        check_limiter(self.limiter)

    def init(self, G: Tensor) -> State:
        return last_norm(G, self.limiter)

    def combine(
        self,
        G: Tensor,
        R: Tensor,
        U: Tensor,
        scale: float,
        back: Callable[[Tensor], Tensor],
        state: State,
        rows: Rows = ALL_HERE,
    ) -> tuple[Tensor, Tensor | None]:
        a = 1.0 if self.mode == "orthogonal" else scale
        inside, whole = row_norms(R, R.dtype), row_norms(G, R.dtype)
        phi = row_factors(U, inside, whole)
        if self.limiter is not None:
            # ||S_i|| by Pythagoras, so that no S is formed. The norms are in the precision of R: what cancels must not
            # be rounded before.
            outside = (whole.square() - (2 - a) * a * inside.square()).clamp_min(0).sqrt()
            phi = limited_(phi, outside, self.limiter, state, rows)
        if self.scaled:
            phi = phi * scale
        return U.mul_(scale).addcmul_(phi, R, value=-a), phi
