"""Add what was left out of the gradient of one step to the gradient of the next step.

    G̃  = G + E                                       the gradient for every other part
    E  <- G̃ - R Qᵀ                                   where R = G̃ Q
    E  <- E + w (M_old Q_oldᵀ - M_new Q_newᵀ)        w = beta1 / (1 - beta1)
    D   = scale * U Qᵀ

The third line applies where a change of basis put momentum outside the subspace.

``E`` is as large as the weight, in fp32.

Source: LDAdam (Robert et al. 2024, arXiv 2410.16103), its generalised error feedback.

Deviations from the published code:

- ``E`` is kept in the state, and not in ``.grad``, where clipping, gradient scaling and ``zero_grad`` would destroy it.
- A gradient that is not finite does not change ``E``.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from subspan.parts import ALL_HERE, Rows
from subspan.residuals.base import Plain
from subspan.storage.allocation import State, allocate


@dataclass(frozen=True)
class ErrorFeedback(Plain):
    """LDAdam's error feedback."""

    keeps_momentum = True
    needs_orthonormal = True
    needs_gradient = True
    takes_rows = False  # a rank with finite rows would not know that the step is void

    def init(self, G: Tensor) -> State:
        return {"error": allocate(G, G.shape)}

    def receive(self, G: Tensor, state: State) -> Tensor:
        total = state["error"] + G
        state["error"].mul_(~total.isfinite().all())  # now ``lose_`` can add to zero, unless this step is void
        return total

    def lose_(self, momentum: Tensor, state: State) -> None:
        state["error"].add_(_void_if_not_finite_(momentum))

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
        state["error"].add_(_void_if_not_finite_(back(-R).add_(G)))
        return U.mul_(scale), None


def _void_if_not_finite_(A: Tensor) -> Tensor:
    return A.masked_fill_(~A.isfinite().all(), 0.0)
