"""One block power iteration at every step, which starts from the last basis.

    B  = rho * M̂ Qᵀ + (1 - rho) G          M̂: the mean of the first moment, in the old basis
    Q <- orth(Bᵀ (B Q))

``B`` is never formed. The first basis is that of the leading singular vectors. With a rule that has no momentum,
``rho`` is 0.

Source: LDAdam (Robert et al. 2024, arXiv 2410.16103). The whole of LDAdam is this selector, the ``moments`` transfer
and ``residuals.ErrorFeedback``.

Deviations: none known.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from subspan import linalg
from subspan.parts import Momentum
from subspan.selectors.base import TrackingSelector
from subspan.storage.allocation import State
from subspan.utils.checks import is_number
from subspan.utils.errors import SettingError


@dataclass(frozen=True)
class PowerIteration(TrackingSelector):
    """Power iteration that starts from the last basis.

    Args:
        rho: share of the momentum in ``B``, in [0, 1].
    """

    rho: float = 0.908

    def __post_init__(self) -> None:
        if not is_number(self.rho) or not 0 <= self.rho <= 1:
            raise SettingError(f"rho={self.rho!r}: expected a share between 0 and 1")

    def track_(self, G: Tensor, state: State, momentum: Momentum | None) -> Tensor | None:
        Q = state["basis"]
        Y = linalg.project(G, Q)
        if momentum is not None:
            Y = _scaled(self.rho * momentum.mean + (1 - self.rho) * Y)
            Z = self.rho * Q @ (momentum.mean.mT @ Y) + (1 - self.rho) * linalg.project(G.mT, Y)
        else:
            Z = linalg.project(G.mT, _scaled(Y))
        good = linalg.usable(G) & linalg.usable(Z)
        new = torch.where(good, linalg.orthonormalise(torch.where(good, _scaled(Z), Q)), Q)
        change = Q.mT @ new
        Q.copy_(new)
        return change


def _scaled(A: Tensor) -> Tensor:
    """Scale ``A`` to a largest entry of one, because the product of two small gradients would underflow."""
    return A / torch.linalg.vector_norm(A, ord=torch.inf, dim=(-2, -1), keepdim=True)
