"""Lion on the low-rank gradient ``R (m, r)``: the sign of an interpolation between momentum and gradient.

    U  = sign(beta1 M + (1 - beta1) R)
    M <- beta2 M + (1 - beta2) R

Source: Lion (Chen et al. 2023, arXiv 2302.06675), Algorithm 2. Deviations: none.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.parts import ALL_HERE, Momentum, Rows, Rule, Transfer, check_betas
from subspan.rules.base import correction
from subspan.storage.allocation import State, allocate


@dataclass(frozen=True)
class Lion(Rule):
    """Lion's update.

    Args:
        betas: weight of the momentum in the update, and decay of the momentum, each in [0, 1).
    """

    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        check_betas(self.betas)

    @property
    def moments(self) -> Mapping[str, bool]:
        return {"exp_avg": True}

    def init(self, like: Tensor, shape: tuple[int, ...], row_dim: int) -> State:
        return {"step": torch.zeros((), dtype=torch.float32), "exp_avg": allocate(like, shape)}

    def transfer_(self, state: State, change: Tensor, how: Transfer) -> None:
        if how == "reset":
            state["step"].zero_()
            state["exp_avg"].zero_()
        else:  # there is one moment, so "moments" is "rotate"
            state["exp_avg"].copy_(state["exp_avg"] @ change)

    def first_moment(self, state: State) -> Momentum | None:
        beta2 = self.betas[1]
        return Momentum(
            state["exp_avg"], state["exp_avg"] / correction(beta2, state["step"]).clamp_min(1e-30), beta2 / (1 - beta2)
        )

    def update_(self, R: Tensor, state: State, rows: Rows = ALL_HERE) -> tuple[Tensor, Tensor]:
        beta1, beta2 = self.betas
        state["step"].add_(1)
        M = state["exp_avg"]
        U = (M * beta1).add_(R, alpha=1 - beta1).sign_()
        M.mul_(beta2).add_(R, alpha=1 - beta2)
        return U, torch.ones((), dtype=torch.float64)
