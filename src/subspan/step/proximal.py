"""The proximal term of randomized subspace optimization: a pull back to where the present subspace was entered.

The subproblem of one subspace is ``min_B f(W + B Qᵀ) + ||B||² / (2 eta)``, so the gradient has a part ``B / eta``:

    coupled      R <- R + B / eta, and the rule sees the sum, as in the paper's subproblem
    decoupled    B <- B - lr scale (step of the rule + B / eta), as decoupled weight decay is to Adam

``B (m, r)`` is how far the weight has moved since the basis was chosen. It is kept in the state as ``displacement``,
only where there is such a term, and starts from zero at every refresh.

Source: RSO (Chen et al. 2025, arXiv 2502.07222). Deviations: none known; the paper does not say which form its code
takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from subspan.storage.allocation import State, allocate


@dataclass(frozen=True)
class Proximal:
    """The proximal term of a parameter group.

    Args:
        strength: ``eta``; the smaller it is, the stronger is the pull. ``None`` stands for no term.
        coupled: whether the rule sees the pull as a part of the gradient.
    """

    strength: float | None
    coupled: bool

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "Proximal":
        """Read the keys ``eta`` and ``proximal`` of a parameter group."""
        return cls(group["eta"], group["proximal"] == "coupled")

    def init(self, like: Tensor, shape: tuple[int, ...]) -> State:
        """Allocate the displacement, if there is a term."""
        return {} if self.strength is None else {"displacement": allocate(like, shape)}

    def pull(self, R: Tensor, state: State) -> Tensor:
        """Return the gradient that the rule is to see."""
        if self.strength is None or not self.coupled:
            return R
        return R + state["displacement"] / self.strength

    def move_(self, U: Tensor, factor: Tensor, state: State, group: Mapping[str, Any]) -> None:
        """Add the decoupled term to the direction ``U``, and note how far it will take the weight."""
        if self.strength is None:
            return
        B = state["displacement"]
        if not self.coupled:
            U.add_(B / (self.strength * factor))
        B.sub_(U * (group["lr"] * group["scale"] * factor))
