"""Adam on the low-rank gradient ``R (m, r)``, or on a full gradient of any shape.

    M <- beta1 M + (1 - beta1) R        V <- beta2 V + (1 - beta2) R²
    U  = M / (sqrt(V) + eps sqrt(c2)),  step-size factor sqrt(c2) / c1,      c_i = 1 - beta_i^step

which is ``(M / c1) / (sqrt(V / c2) + eps)``: torch's placement of epsilon. The factor is returned apart because Fira's
limiter (``residuals/fira.py``) compares norms of uncorrected updates.

Sources: Adam (Kingma & Ba 2015, arXiv 1412.6980), Algorithm 1; decoupled decay (Loshchilov & Hutter 2019, arXiv
1711.05101) is the optimizer's; moment transport (Robert et al. 2024, LDAdam, arXiv 2410.16103).
Deviations: none from ``torch.optim.AdamW``. GaLore's code adds epsilon before the bias correction, so its effective epsilon is
``eps / sqrt(c2)``.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.parts import Transfer, is_number
from subspan.state import State, allocate


@dataclass(frozen=True)
class AdamW:
    """Adam's update.

    Args:
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment; >= 0.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        pair = isinstance(self.betas, (tuple, list)) and len(self.betas) == 2
        if not pair or not all(is_number(beta) and 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas!r}: expected two numbers, each at least 0 and below 1")
        if not is_number(self.eps) or not 0 <= self.eps < math.inf:
            raise ValueError(f"eps={self.eps!r}: expected a number >= 0")

    def init(self, like: Tensor, shape: tuple[int, ...]) -> State:
        return {
            # On the CPU, as torch keeps it: it enters kernels as a scalar, so no device waits for it.
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": allocate(like, shape),
            "exp_avg_sq": allocate(like, shape),
        }

    def transfer_(self, state: State, change: Tensor, how: Transfer) -> None:
        M, V, C = state["exp_avg"], state["exp_avg_sq"], change
        if how == "rotate":
            M.copy_(M @ C)
        elif how == "moments":
            # V - M² is a variance, so it moves with C². Both are unbiased first. Before the first step all is 0 / tiny = 0.
            c1, c2 = (_correction(beta, state["step"]).clamp_min(1e-30) for beta in self.betas)
            mean = M / c1
            variance = V / c2 - mean.square()
            V.copy_((variance @ C.square() + (mean @ C).square()).abs_().mul_(c2))
            M.copy_(M @ C)
        elif how == "reset":
            for tensor in (state["step"], M, V):
                tensor.zero_()

    def update_(self, R: Tensor, state: State) -> tuple[Tensor, Tensor]:
        beta1, beta2 = self.betas
        step = state["step"].add_(1)
        M = state["exp_avg"].mul_(beta1).add_(R, alpha=1 - beta1)  # not lerp_: R may be of lower precision
        V = state["exp_avg_sq"].mul_(beta2).addcmul_(R, R, value=1 - beta2)
        c1, root_c2 = _correction(beta1, step), _correction(beta2, step).sqrt()
        U = V.sqrt().add_(root_c2 * self.eps)
        return torch.div(M, U, out=U), root_c2 / c1


def _correction(beta: float, step: Tensor) -> Tensor:
    """``1 - beta^step``, in fp64: in fp32 the difference is off by 1e-5 of its value at the first step."""
    return 1 - beta ** step.double()
