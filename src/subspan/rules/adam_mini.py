"""Adam with one second moment for a block of entries: a row of the weight, or a coordinate of the basis.

    M <- beta1 M + (1 - beta1) R        V_b <- beta2 V_b + (1 - beta2) mean over block b of R²
    U  = M / (sqrt(V_b) + eps sqrt(c2)),  step-size factor sqrt(c2) / c1,      c_i = 1 - beta_i^step

Blocks: a basis of the columns (``R = G Q``, tall and square weights under ``std``) leaves the rows of the weight as
    they are,
so each row of ``R (m, r)`` is a block and ``V`` is ``(m, 1)``. A basis of the rows (wide weights) mixes them; what is
left are the ``r`` coordinates of the basis, and ``V`` is ``(1, r)``. A full-rank matrix has a block for each row; a
vector one for each entry. Under ``moments`` a ``V`` of rows stays, since it does not depend on the basis.

Source: Adam-mini (Zhang et al. 2024, arXiv 2406.16793); SARA (arXiv 2502.05790) trains it inside a subspace with
    ``beta2 =
0.95``, without saying which blocks it used. Deviations from the paper: queries and keys have a block for each row, not
for each head, and norms one for each entry: finer blocks, found by shape and not by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from subspan.rules.base import Adam


@dataclass(frozen=True)
class AdamMini(Adam):
    """Adam-mini's update.

    Args:
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment; >= 0.
    """

    betas: tuple[float, float] = (0.9, 0.95)

    @property
    def moments(self) -> Mapping[str, bool]:
        return {"exp_avg": True}

    def blocks(self, shape: tuple[int, ...], row_dim: int) -> tuple[int, ...]:
        if len(shape) < 2:
            return shape
        return (*shape[:-1], 1) if row_dim == -2 else (*shape[:-2], 1, shape[-1])
