"""Follow the gradient outside the subspace too, as Fira does, but by a sketch of it that is drawn afresh at every step.

    Qᵀ O = 0,  E[O Oᵀ] = I - Q Qᵀ          the directions O (n, s) of this step: see subspan.residuals.draws
    T     = G O                             (m, s)
    phi_i = ||U_i|| / ||R_i||               row i of the oriented matrices, with Fira's guard
    S     = phi * T
    S    <- S * min(1, gamma ||S_prev|| / ||S||)      Fira's limiter on the growth of the norm; none at the first step
    D     = scale * U Qᵀ + S Oᵀ

As ``phi`` does not depend on the draw, ``E[D]`` is Fira's direction, before the limiter: every step may go in every
direction, whatever the basis is. A row ``g`` of the gradient outside the subspace becomes ``g O Oᵀ``. For orthonormal
directions, times ``sqrt((n - r) / s)``, the variance of that is ``((n - r) / s - 1) ||g||²``. With all ``s = n - r`` of
them it is zero, and ``D`` is Fira's.

Nothing of ``O`` is kept or sent, because it is drawn from a key. ``T`` is used once. One number is kept for the
limiter. As ``E||T||² = ||G (I - Q Qᵀ)||²``, the squared norm of ``[R T]`` is that of the gradient on average.

Source: none known to us. Deviations from Fira (Chen et al. 2024, arXiv 2410.01623), apart from the sketch:

- The guard of ``phi`` takes ``||[R T]_i||`` for ``||G_i||``.
- The limiter looks at ``||S||``, which estimates the norm of Fira's residual. The norm of ``S Oᵀ`` is ``sqrt((n - r) /
  s)`` times that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from subspan import linalg
from subspan.parts import ALL_HERE, Key, Rows
from subspan.residuals.base import Plain, check_limiter, last_norm, limited_, row_factors, row_norms
from subspan.residuals.draws import DRAWS, gaussian
from subspan.storage.allocation import State
from subspan.utils.errors import SettingError
from subspan.utils.ranks import Rank, is_rank, rank_of_side
from subspan.utils.suggestions import near_names

_POWERS = {"unbiased": 0.0, "root": 0.25, "one": 0.5}
"""The power of ``s / (n - r)`` that ``O`` is multiplied by."""


@dataclass(frozen=True)
class Sketch(Plain):
    """Fira's residual, seen in a few directions that are drawn at every step.

    Args:
        width: number ``s`` of the directions: a whole number >= 1, or a share of the columns of the oriented matrix,
            above 0 and below 1. ``None`` stands for the rank. There are no more than ``n - r`` outside the basis; a
            larger width means all of them.
        factor: ``"norms"`` for Fira's row factors, or ``None`` for factors of 1.
        weight: ``"unbiased"``, so that the residual is Fira's on average; or ``"root"`` or ``"one"``, which replace the
            weight ``(n - r) / s`` of that by its square root or by 1.
        limiter: largest growth of the residual's norm from one step to the next, > 0; ``None`` turns it off.
        draw: ``"gaussian"``, ``"coordinates"`` or ``"cosines"``: how the directions are drawn, see
            ``subspan.residuals.draws``.
    """

    needs_orthonormal = True

    width: Rank | None = None
    factor: Literal["norms"] | None = "norms"
    weight: Literal["unbiased", "root", "one"] = "unbiased"
    limiter: float | None = 1.01
    draw: str = "gaussian"

    def __post_init__(self) -> None:
        if self.width is not None and not is_rank(self.width):
            raise SettingError(
                f"width={self.width!r}: expected a whole number of directions >= 1, a share of the columns above 0 and "
                "below 1, such as 0.25, or None for as many as the rank; residuals.Discard() has no sketch"
            )
        if self.factor not in ("norms", None):
            raise SettingError(f"factor={self.factor!r}: expected 'norms' (Fira's row factors), or None for 1")
        if not isinstance(self.weight, str) or self.weight not in _POWERS:
            raise SettingError(f"weight={self.weight!r}: expected one of {', '.join(_POWERS)}; 'unbiased' is usual")
        if not isinstance(self.draw, str) or self.draw not in DRAWS:
            raise SettingError(f"draw={self.draw!r}: {near_names(str(self.draw), DRAWS)}")
        check_limiter(self.limiter)

    def init(self, G: Tensor) -> State:
        return last_norm(G, self.limiter)

    def sketch_width(self, columns: int, rank: int) -> int:
        return min(self.asked_width(columns, rank), columns - rank)

    def asked_width(self, columns: int, rank: int) -> int:
        """Return the width, even if there are fewer directions outside the basis."""
        return rank if self.width is None else rank_of_side(self.width, columns)

    def sketch(self, like: Tensor, rank: int, outside: Callable[[Tensor], Tensor], key: Key) -> Tensor:
        n, s = like.shape[-2:]
        draw = DRAWS[self.draw] if s < n - rank else gaussian  # which draws all directions there are
        O = draw(like, rank, outside, linalg.keyed_generator("sketch", *key))
        return O * (s / (n - rank)) ** _POWERS[self.weight]

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
        inside, outside = row_norms(R, R.dtype), row_norms(G, R.dtype)  # G is T here
        whole = torch.hypot(inside, outside)
        phi = torch.ones_like(inside) if self.factor is None else row_factors(U, inside, whole)
        if self.limiter is not None:
            phi = limited_(phi, outside, self.limiter, state, rows)
        return U.mul_(scale), phi
