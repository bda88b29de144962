"""Adafactor on the low-rank gradient ``R (m, r)``: a factored second moment, and an update of limited size.

    b     = 1 - step^(-decay)
    row  <- b row + (1 - b) mean over columns of (R² + eps)        (m,)
    col  <- b col + (1 - b) mean over rows of (R² + eps)           (r,)
    V     = row colᵀ / mean(row)
    U     = R / sqrt(V);   U <- U / max(1, rms(U) / clip)
    M    <- beta1 M + (1 - beta1) U,   U = M                       with beta1 > 0

Vectors keep a whole second moment. There is no bias correction, relative step or scaling by the size of the weight.

Sources: Adafactor (Shazeer & Stern 2018, arXiv 1804.04235), Algorithm 4, in the form that GaLore trains (arXiv
2403.03507; its ``GaLoreAdafactor`` with ``relative_step=False, scale_parameter=False``). SARA (arXiv 2502.05790) sets
``beta1 = 0.9``.

Deviations:

- GaLore's code averages ``lr * U`` in the momentum. Here ``U`` is averaged, which is the same while lr is constant.
- Each matrix of a stack is limited by its own root mean square.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.parts import ALL_HERE, Momentum, Rows, Rule, Transfer
from subspan.storage.allocation import State, allocate
from subspan.utils.checks import DIVISORS, is_divisor, is_number
from subspan.utils.errors import SettingError

_HELD = {"step", "exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"}


@dataclass(frozen=True)
class Adafactor(Rule):
    """Adafactor's update.

    Args:
        beta1: decay of the running average of updates, in [0, 1). 0 keeps no average.
        decay: exponent of the second moment's decay ``1 - step^(-decay)``, > 0.
        eps: number added to the squared gradient, > 0.
        clip: largest root mean square of an update, > 0.
    """

    beta1: float = 0.9
    decay: float = 0.8
    eps: float = 1e-30
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not is_number(self.beta1) or not 0 <= self.beta1 < 1:
            raise SettingError(f"beta1={self.beta1!r}: expected a number at least 0 and below 1 (0 keeps no momentum)")
        for name in ("decay", "eps", "clip"):
            value = getattr(self, name)
            if not is_divisor(value):
                raise SettingError(f"{name}={value!r}: expected a number > 0, {DIVISORS}")

    @property
    def moments(self) -> Mapping[str, bool]:
        return {"exp_avg": True} if self.beta1 else {}

    def init(self, like: Tensor, shape: tuple[int, ...], row_dim: int) -> State:
        state: State = {"step": torch.zeros((), dtype=torch.float32)}
        if self.beta1:
            state["exp_avg"] = allocate(like, shape)
        if len(shape) < 2:
            return state | {"exp_avg_sq": allocate(like, shape)}
        row, col = allocate(like, shape[:-1]), allocate(like, (*shape[:-2], shape[-1]))
        return state | {"exp_avg_sq_row": row, "exp_avg_sq_col": col}

    def transfer_(self, state: State, change: Tensor, how: Transfer) -> None:
        if how == "reset":
            for name in _HELD & state.keys():  # the state also holds tensors of other parts
                state[name].zero_()
            return
        if self.beta1 and "exp_avg" in state:  # if it is missing, ``update_`` raises
            state["exp_avg"].copy_(state["exp_avg"] @ change)
        if how == "moments":  # means over a row do not depend on the basis; means over a column move as squares do
            col = state["exp_avg_sq_col"]
            col.copy_((col.unsqueeze(-2) @ change.square()).squeeze(-2))

    def first_moment(self, state: State) -> Momentum | None:
        return None  # it averages updates, not gradients

    def update_(self, R: Tensor, state: State, rows: Rows = ALL_HERE) -> tuple[Tensor, Tensor]:
        b = 1 - state["step"].add_(1).double() ** -self.decay
        if "exp_avg_sq" in state:
            V = state["exp_avg_sq"]
            V.mul_(b).add_((R.to(V.dtype).square() + self.eps) * (1 - b))
            U = R * V.rsqrt()
            square, size = torch.linalg.vector_norm(U).square(), rows.count(U.shape[0]) if U.ndim else 1
        else:
            row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
            m, r = rows.count(R.shape[-2]), R.shape[-1]
            row.mul_(b).add_((_sum_square(R, -1, row.dtype) / r + self.eps) * (1 - b))
            sums = rows.total(torch.cat([_sum_square(R, -2, col.dtype), row.sum(-1, keepdim=True)], -1))
            col.mul_(b).add_((sums[..., :-1] / m + self.eps) * (1 - b))
            scale = (row / (sums[..., -1:] / m)).rsqrt().unsqueeze(-1)
            U = (R * scale).mul_(col.rsqrt().unsqueeze(-2))
            square, size = torch.linalg.vector_norm(U, dim=(-2, -1), keepdim=True).square(), m * r
        rms = (rows.total(square) / max(1, size)).sqrt()
        U = U.div_((rms / self.clip).clamp_min(1))
        if self.beta1:
            if "exp_avg" not in state:
                raise SettingError(
                    f"beta1={self.beta1}: was 0 when the optimizer was built, so no momentum is kept; build "
                    "the optimizer again"
                )
            U = state["exp_avg"].mul_(self.beta1).add_(U, alpha=1 - self.beta1).clone()
        return U, torch.ones((), dtype=torch.float64)


def _sum_square(R: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.linalg.vector_norm(R, dim=dim, dtype=dtype).square()
