"""SGD with momentum on the low-rank gradient ``R (m, r)``.

    M <- momentum M + (1 - dampening) R,    U = M

GoLore's and SARA's theory analyses ``M <- (1 - beta1) M + beta1 R``: there beta1 weighs the *new* gradient, so it is
``momentum = dampening = 1 - beta1``.

Source: GoLore (He et al. 2024, arXiv 2410.11289), MSGD.
Deviations: the momentum starts at zero, where ``torch.optim.SGD`` starts at the first gradient; the same while
``dampening=0``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from subspan.parts import Transfer, is_number
from subspan.state import State, allocate


@dataclass(frozen=True)
class SGD:
    """SGD with momentum.

    Args:
        momentum: decay of the running gradient, in [0, 1).
        dampening: what is held back of each new gradient, in [0, 1).
    """

    momentum: float = 0.9
    dampening: float = 0.0

    def __post_init__(self) -> None:
        for name in ("momentum", "dampening"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < 1:
                raise ValueError(f"{name}={value!r}: expected a number at least 0 and below 1")

    def init(self, like: Tensor, shape: tuple[int, ...]) -> State:
        return {"step": torch.zeros((), dtype=torch.float32), "exp_avg": allocate(like, shape)}

    def transfer_(self, state: State, change: Tensor, how: Transfer) -> None:
        if how == "reset":
            state["step"].zero_()
            state["exp_avg"].zero_()
        else:  # there is one moment, so "moments" is "rotate"
            state["exp_avg"].copy_(state["exp_avg"] @ change)

    def update_(self, R: Tensor, state: State) -> tuple[Tensor, Tensor]:
        state["step"].add_(1)
        M = state["exp_avg"].mul_(self.momentum).add_(R, alpha=1 - self.dampening)
        return M.clone(), torch.ones((), dtype=torch.float64)
