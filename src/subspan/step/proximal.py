"""The proximal term of randomized subspace optimization: a pull back to where the present subspace was entered.

The subproblem of one subspace is ``min_B f(W + B Qᵀ) + ||B||² / (2 eta)``, so the gradient has a part ``B / eta``:

    coupled      R <- R + B / eta, and the rule sees the sum, as in the paper's subproblem
    decoupled    B <- B - lr scale (step of the rule + B / eta), as decoupled weight decay is to Adam

``B (m, r)`` is how far the weight has moved since the basis was chosen; it is kept in the state as ``displacement``,
only where
``eta`` is set, and starts from zero at every refresh.

Source: RSO (Chen et al. 2025, arXiv 2502.07222). Deviations: none known; the paper does not say which form its code
    takes.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from subspan.storage.allocation import State, allocate


def init(like: Tensor, shape: tuple[int, ...], group: Mapping[str, Any]) -> State:
    """The displacement, if ``group`` has a proximal term."""
    return {} if group["eta"] is None else {"displacement": allocate(like, shape)}


def pull(R: Tensor, state: State, group: Mapping[str, Any]) -> Tensor:
    """The gradient that the rule is to see."""
    if group["eta"] is None or group["proximal"] != "coupled":
        return R
    return R + state["displacement"] / group["eta"]


def move_(U: Tensor, factor: Tensor, state: State, group: Mapping[str, Any]) -> None:
    """Add the decoupled term to the direction, and note how far it will take the weight."""
    if group["eta"] is None:
        return
    B = state["displacement"]
    if group["proximal"] == "decoupled":
        U.add_(B / (group["eta"] * factor))
    B.sub_(U * (group["lr"] * group["scale"] * factor))
