"""The class to derive a relative of Adam from. Any other rule derives from ``parts.Rule``.

Adam, Adam-mini and their relatives keep the same two moments. They differ in the entries over which the second moment
is averaged. "Adding a rule" in the documentation has a complete example of a rule, and what to know for one.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.parts import ALL_HERE, Momentum, Rows, Rule, Transfer, check_betas
from subspan.storage.allocation import State, allocate
from subspan.utils.checks import DIVISORS, is_divisor, is_number
from subspan.utils.errors import SettingError


@dataclass(frozen=True)
class Adam(Rule, ABC):
    """Moments ``M`` and ``V``, and the direction ``M / (sqrt(V) + eps sqrt(c2))`` with the factor ``sqrt(c2) / c1``.

    A subclass is a frozen dataclass that writes two members. ``blocks`` says over which entries the second moment is
    averaged. ``moments`` says which entries of the state may be kept in 8 bits. The subclass may give the fields other
    defaults, and it may override ``update_`` with a faster form.

    The state holds ``step``, ``exp_avg`` (``M``) and ``exp_avg_sq`` (``V``).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_betas(self.betas)
        if not is_divisor(self.eps) and not (is_number(self.eps) and self.eps == 0):
            raise SettingError(f"eps={self.eps!r}: expected 0, or a number {DIVISORS}; 1e-8 is usual")

    @property
    @abstractmethod
    def moments(self) -> Mapping[str, bool]:
        """The entries of the state that may be kept in 8 bits, and whether they are signed."""

    @abstractmethod
    def blocks(self, shape: tuple[int, ...], row_dim: int) -> tuple[int, ...]:
        """Return the shape of ``V`` for gradients of ``shape``, with a 1 for each dimension that is averaged over.

        ``row_dim`` is the dimension along which the rows of the weight lie, see ``parts.Rule.init``.
        """

    def init(self, like: Tensor, shape: tuple[int, ...], row_dim: int) -> State:
        return {
            # On the CPU, where torch keeps it too: it enters kernels as a scalar, so no device waits for it.
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": allocate(like, shape),
            "exp_avg_sq": allocate(like, self.blocks(shape, row_dim)),
        }

    def transfer_(self, state: State, change: Tensor, how: Transfer) -> None:
        M, V, C = state["exp_avg"], state["exp_avg_sq"], change
        if how == "rotate":
            M.copy_(M @ C)
        elif how == "moments":
            # V - M² is a variance, so it moves with C². The bias of both is removed first. Before the first step
            # everything is 0 / tiny = 0.
            c1, c2 = (correction(beta, state["step"]).clamp_min(1e-30) for beta in self.betas)
            mean = M / c1
            if V.shape[-1] == M.shape[-1]:  # otherwise it is averaged over the basis, and does not depend on it
                variance = V / c2 - pool(mean.square(), V)
                V.copy_((variance @ C.square() + pool((mean @ C).square(), V)).abs_().mul_(c2))
            M.copy_(M @ C)
        elif how == "reset":
            for tensor in (state["step"], M, V):
                tensor.zero_()

    def first_moment(self, state: State) -> Momentum | None:
        beta1 = self.betas[0]
        c1 = correction(beta1, state["step"]).clamp_min(1e-30)
        return Momentum(state["exp_avg"], state["exp_avg"] / c1, beta1 / (1 - beta1))

    def update_(self, R: Tensor, state: State, rows: Rows = ALL_HERE) -> tuple[Tensor, Tensor]:
        beta1, beta2 = self.betas
        step = state["step"].add_(1)
        M = state["exp_avg"].mul_(beta1).add_(R, alpha=1 - beta1)  # not lerp_: R may be of lower precision
        V = state["exp_avg_sq"].mul_(beta2)
        if V.shape == R.shape:
            V.addcmul_(R, R, value=1 - beta2)
        else:
            V.add_(pool(R.to(V.dtype).square(), V), alpha=1 - beta2)
        c1, root_c2 = correction(beta1, step), correction(beta2, step).sqrt()
        U = V.sqrt().add_(root_c2 * self.eps)
        return (torch.div(M, U, out=U) if V.shape == R.shape else M / U), root_c2 / c1


def pool(A: Tensor, V: Tensor) -> Tensor:
    """Return the mean of ``A`` over the dimensions in which ``V`` has one entry."""
    dims = [d for d in range(A.ndim) if V.shape[d] == 1 and A.shape[d] != 1]
    return A.mean(dims, keepdim=True) if dims else A


def correction(beta: float, step: Tensor) -> Tensor:
    """Return ``1 - beta^step`` in fp64. In fp32 it would be off by 1e-5 of its value at the first step."""
    return 1 - beta ** step.double()
