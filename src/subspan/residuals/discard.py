"""Drop what lies outside the subspace, as GaLore, SARA and GoLore do.

    D = scale * U Qᵀ

Deviations: none.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from subspan.parts import ALL_HERE, Rows
from subspan.residuals.base import Plain
from subspan.storage.allocation import State


@dataclass(frozen=True)
class Discard(Plain):
    """No residual."""

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
        return U.mul_(scale), None
