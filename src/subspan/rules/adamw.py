"""Adam on the low-rank gradient ``R (m, r)``, or on a full gradient of any shape.

    M <- beta1 M + (1 - beta1) R        V <- beta2 V + (1 - beta2) R²
    U  = M / (sqrt(V) + eps sqrt(c2)),  step-size factor sqrt(c2) / c1,      c_i = 1 - beta_i^step

``U`` times the factor is ``(M / c1) / (sqrt(V / c2) + eps)``, with epsilon where torch has it. The factor is returned
separately, because Fira's limiter (``residuals/fira.py``) compares norms of updates without bias correction.

Sources: Adam (Kingma & Ba 2015, arXiv 1412.6980), Algorithm 1. Decoupled weight decay (Loshchilov & Hutter 2019, arXiv
1711.05101) is done by the optimizer. The transport of moments is that of LDAdam (Robert et al. 2024, arXiv 2410.16103).

Deviations: none from ``torch.optim.AdamW``. GaLore's code adds epsilon before the bias correction, so its effective
epsilon is ``eps / sqrt(c2)``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from subspan.parts import ALL_HERE, Rows
from subspan.rules.base import Adam, correction
from subspan.storage.allocation import State


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam's update.

    Args:
        betas: decay of the first and the second moment, each in [0, 1).
        eps: number added to the root of the second moment, >= 0.
    """

    @property
    def moments(self) -> Mapping[str, bool]:
        return {"exp_avg": True, "exp_avg_sq": False}

    def blocks(self, shape: tuple[int, ...], row_dim: int) -> tuple[int, ...]:
        return shape

    def update_(self, R: Tensor, state: State, rows: Rows = ALL_HERE) -> tuple[Tensor, Tensor]:
        M, V = state["exp_avg"], state["exp_avg_sq"]
        if R.device.type != "cpu" or not R.dtype == M.dtype == V.dtype or not R.is_contiguous():
            return super().update_(R, state, rows)
        # One pass of torch's fused kernel, in place of seven. To a weight of zero the kernel adds
        # -lr (M / c1) / (sqrt(V / c2) + eps).
        (beta1, beta2), step, U = self.betas, state["step"], torch.zeros_like(M)
        c1, root_c2 = correction(beta1, step + 1), correction(beta2, step + 1).sqrt()
        adamw([U], [R], [M], [V], [], [step], fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=-c1 / root_c2,
              weight_decay=0.0, eps=self.eps, maximize=False)  # fmt: skip
        return U, root_c2 / c1
