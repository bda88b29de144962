"""Adam with one second moment for each block of entries: for a row of the weight, or for a coordinate of the basis.

    M <- beta1 M + (1 - beta1) R        V_b <- beta2 V_b + (1 - beta2) mean over block b of R²
    U  = M / (sqrt(V_b) + eps sqrt(c2)),  step-size factor sqrt(c2) / c1,      c_i = 1 - beta_i^step

The blocks depend on what is projected:

    the columns of the weight are compressed   R = G Q, tall and square weights under "std"; each row of R (m, r) is
                                               still a row of the weight, so it is a block, and V is (m, 1)
    the rows of the weight are compressed      wide weights; the basis mixes the rows, so each of its r coordinates is
                                               a block, and V is (1, r)
    a full-rank matrix                         each row is a block
    a vector                                   each entry is a block

A ``V`` of rows does not depend on the basis, so the transfer ``moments`` leaves it as it is.

Source: Adam-mini (Zhang et al. 2024, arXiv 2406.16793). SARA (arXiv 2502.05790) trains it inside a subspace with
``beta2 = 0.95``, and does not say which blocks it used.

Deviations from the paper: queries and keys have a block for each row, and not for each head. Norms have a block for
each entry. These blocks are finer than the paper's, and they are found by shape and not by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from subspan.rules.base import Adam


@dataclass(frozen=True)
class AdamMini(Adam):
    """Adam-mini's update.

    Args:
        betas: decay of the first and the second moment, each in [0, 1).
        eps: number added to the root of the second moment, >= 0.
    """

    betas: tuple[float, float] = (0.9, 0.95)

    @property
    def moments(self) -> Mapping[str, bool]:
        return {"exp_avg": True}

    def blocks(self, shape: tuple[int, ...], row_dim: int) -> tuple[int, ...]:
        if len(shape) < 2:
            return shape
        return (*shape[:-1], 1) if row_dim == -2 else (*shape[:-2], 1, shape[-1])
