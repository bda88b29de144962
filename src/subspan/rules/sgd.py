"""SGD with momentum on the low-rank gradient ``R (m, r)``, with two ways to write its settings.

    M <- decay M + gain R,    U = M

- ``SGD(momentum, dampening)`` is torch's: ``decay = momentum, gain = 1 - dampening``.
- ``MSGD(beta1)`` is that of GoLore's and SARA's theory: ``decay = 1 - beta1, gain = beta1``. Here beta1 is the weight
  of the *new* gradient, so ``MSGD(0.1)`` is ``SGD(0.9, 0.9)``.

Source: GoLore (He et al. 2024, arXiv 2410.11289), MSGD.

Deviations: the momentum starts at zero. That of ``torch.optim.SGD`` starts at the first gradient, which is the same
while ``dampening=0``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.parts import ALL_HERE, Momentum, Rows, Rule, Transfer
from subspan.storage.allocation import State, allocate
from subspan.utils.checks import is_number
from subspan.utils.errors import SettingError


class _MomentumSGD(Rule, ABC):
    @property
    @abstractmethod
    def decay(self) -> float:
        """Factor on ``M`` at each step."""

    @property
    @abstractmethod
    def gain(self) -> float:
        """Factor on the new gradient that is added to ``M``."""

    @property
    def moments(self) -> Mapping[str, bool]:
        return {"exp_avg": True} if self.decay else {}

    def init(self, like: Tensor, shape: tuple[int, ...], row_dim: int) -> State:
        state: State = {"step": torch.zeros((), dtype=torch.float32)}
        return state | {"exp_avg": allocate(like, shape)} if self.decay else state

    def transfer_(self, state: State, change: Tensor, how: Transfer) -> None:
        if how == "reset":
            state["step"].zero_()
            if "exp_avg" in state:
                state["exp_avg"].zero_()
        elif self.decay and "exp_avg" in state:  # there is one moment, so "moments" is "rotate"
            state["exp_avg"].copy_(state["exp_avg"] @ change)

    def first_moment(self, state: State) -> Momentum | None:
        if not self.decay or "exp_avg" not in state:  # in the second case ``update_`` raises
            return None
        # The sum of the weights of all past gradients in M: gain * (1 + decay + decay² + ...).
        weight = (1 - self.decay ** state["step"].double()).clamp_min(1e-30) * self.gain / (1 - self.decay)
        return Momentum(state["exp_avg"], state["exp_avg"] / weight, self.decay / self.gain)

    def update_(self, R: Tensor, state: State, rows: Rows = ALL_HERE) -> tuple[Tensor, Tensor]:
        state["step"].add_(1)
        if not self.decay:
            U = R.to(torch.promote_types(R.dtype, torch.float32), copy=True).mul_(self.gain)
        elif "exp_avg" in state:
            U = state["exp_avg"].mul_(self.decay).add_(R, alpha=self.gain).clone()
        else:
            raise SettingError(
                f"{self}: had no momentum when the optimizer was built, so no momentum is kept; build the optimizer again"
            )
        return U, torch.ones((), dtype=torch.float64)


@dataclass(frozen=True)
class SGD(_MomentumSGD):
    """SGD with momentum, with torch's settings.

    Args:
        momentum: decay of the momentum, in [0, 1). 0 keeps no momentum.
        dampening: share of each new gradient that is left out, in [0, 1).
    """

    momentum: float = 0.9
    dampening: float = 0.0

    def __post_init__(self) -> None:
        for name in ("momentum", "dampening"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < 1:
                raise SettingError(f"{name}={value!r}: expected a number at least 0 and below 1")

    @property
    def decay(self) -> float:
        return self.momentum

    @property
    def gain(self) -> float:
        return 1 - self.dampening


@dataclass(frozen=True)
class MSGD(_MomentumSGD):
    """SGD with momentum, with the setting of the theory.

    Args:
        beta1: weight of the new gradient, in (0, 1]. 1 keeps no momentum.
    """

    beta1: float = 0.1

    def __post_init__(self) -> None:
        if not is_number(self.beta1) or not 0 < self.beta1 <= 1:
            raise SettingError(
                f"beta1={self.beta1!r}: expected a number above 0 and at most 1; it weighs the new gradient"
            )

    @property
    def decay(self) -> float:
        return 1 - self.beta1

    @property
    def gain(self) -> float:
        return self.beta1
