"""A look at the subspaces of an optimizer, without changing them.

    overlap(U, V)   (1/r) sum_i ||Uᵀ V_i||² = tr(U Uᵀ V Vᵀ) / r, in [0, 1]; r/n on average for two random subspaces
    angles(U, V)    arccos of the singular values of UᵀV, rising, in degrees
    captured(G, Q)  ||G Q||² / ||G||² for orthonormal Q: the share of a gradient that the subspace holds

Shapes: ``U``, ``V`` and ``Q`` are ``(..., n, r)`` with orthonormal columns, ``G`` is ``(..., m, n)``.

Sources: the overlap is that of SARA (arXiv 2502.05790), section 3, which its figures 1 to 3 show. Angles: Björck and
Golub 1973.

Deviations: for a stack of matrices each measure is a mean.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan import linalg
from subspan.optimizer import SubspaceOptimizer
from subspan.parts import Selector
from subspan.step.carriers import layer_of
from subspan.step.layout import Layout
from subspan.storage.allocation import State


@dataclass(frozen=True)
class Subspace:
    """The subspace of one weight, or of several layers that share one."""

    name: str
    """Name of the weight, or of the first weight where several share the subspace."""
    selector: Selector
    """The selector that chose the subspace."""
    state: State
    """The optimizer's state of the parameter, which holds the basis."""
    parameter: Tensor
    """The weight, or the carrier of a backward-side layer."""
    layout: Layout | None
    """How the weight is seen as oriented matrices; ``None`` for a backward-side layer, which forms no gradient."""
    width: int
    """Size ``n`` of the side that is compressed."""

    @property
    def refreshed_at(self) -> int:
        """Number of steps before the step that chose the subspace; -1 if none has been chosen yet."""
        return int(self.state["refresh_step"])

    @property
    def skipped(self) -> int:
        """Number of refreshes that were skipped because of a zero or non-finite gradient."""
        return int(self.state["skipped_refreshes"])

    def basis(self) -> Tensor:
        """Return an orthonormal basis ``(..., n, r)`` in fp64.

        If the selector's own basis is not orthonormal, this is one of the space that its columns span.
        """
        like = self.parameter
        stack = self.layout.shape[:-2] if self.layout else ()
        eye = torch.eye(self.width, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        Q = self.selector.project(eye.expand(*stack, -1, -1), self.state).double()
        return Q if self.selector.orthonormal else linalg.orthonormalise(Q)

    def gradient(self) -> Tensor | None:
        """Return the present gradient, ``(..., m, n)``, or ``None`` if there is none."""
        if self.layout is None or self.parameter.grad is None:
            return None
        return self.layout.enter(self.parameter.grad)


def subspaces(optimizer: SubspaceOptimizer) -> Iterator[Subspace]:
    """Yield every subspace of ``optimizer``, in the order of its parameters.

    The weights must not be sharded over ranks.
    """
    for slot in optimizer.slots():
        state, layer = optimizer.state[slot.p], layer_of(slot.p)
        if "refresh_step" not in state:
            continue
        if layer is None:
            yield Subspace(
                slot.name, optimizer.selector, state, slot.p, slot.layout, slot.layout.enter(slot.p).shape[-1]
            )
        else:
            yield Subspace(layer.weight_name, optimizer.selector, state, slot.p, None, layer.weight.shape[1])


def overlap(U: Tensor, V: Tensor) -> float:
    """Return the overlap of two subspaces: 1 if they are the same, 0 if they are orthogonal."""
    return float((U.mT @ V).square().sum((-2, -1)).mean()) / U.shape[-1]


def angles(U: Tensor, V: Tensor) -> Tensor:
    """Return the principal angles of two subspaces in degrees, ``(r,)``, rising."""
    cosines = torch.linalg.svdvals(U.double().mT @ V.double())
    # The arccosine of a number near 1 has half of its digits; the sine does not.
    rest = V.double() - U.double() @ (U.double().mT @ V.double())
    sines = torch.linalg.svdvals(rest).flip(-1)
    return torch.rad2deg(torch.atan2(sines, cosines.clamp(0, 1))).reshape(-1, U.shape[-1]).mean(0)


def captured(G: Tensor, Q: Tensor) -> float:
    """Return the share of ``G`` that the subspace of ``Q`` holds, in [0, 1], or NaN if the gradient is zero."""
    whole = torch.linalg.vector_norm(G, dim=(-2, -1), dtype=torch.float64).square()
    return float(((G.to(Q.dtype) @ Q).square().sum((-2, -1)) / whole).mean())
