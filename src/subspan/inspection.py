"""Looking at the subspaces of an optimizer, without changing them.

    overlap(U, V)   (1/r) sum_i ||Uᵀ V_i||² = tr(U Uᵀ V Vᵀ) / r, in [0, 1]; r/n on average for two random ones
                    (SARA, arXiv 2502.05790, section 3; the measure of its figures 1 to 3)
    angles(U, V)    arccos of the singular values of UᵀV, rising, in degrees (Björck and Golub 1973)
    captured(G, Q)  ||G Q||² / ||G||² for orthonormal Q: how much of a gradient the subspace holds

Shapes: U, V, Q ``(..., n, r)`` with orthonormal columns, G ``(..., m, n)``. Deviations: of a stack each is a mean.
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
    """The subspace of one weight, or of the layers that share one."""

    name: str
    """Of the weight; of the first where several share it."""
    selector: Selector
    state: State
    parameter: Tensor
    layout: Layout | None
    """``None`` of a backward-side layer, which forms no gradient."""
    width: int
    """n, the side that is compressed."""

    @property
    def refreshed_at(self) -> int:
        """Steps before the one that chose it; -1 before the first."""
        return int(self.state["refresh_step"])

    @property
    def skipped(self) -> int:
        """Refreshes that a zero or non-finite gradient has cost."""
        return int(self.state["skipped_refreshes"])

    def basis(self) -> Tensor:
        """An orthonormal basis ``(..., n, r)`` in fp64: that of the columns, where the selector's own is not
        orthonormal.
        """
        like = self.parameter
        stack = self.layout.shape[:-2] if self.layout else ()
        eye = torch.eye(self.width, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        Q = self.selector.project(eye.expand(*stack, -1, -1), self.state).double()
        return Q if self.selector.orthonormal else linalg.orthonormalise(Q)

    def gradient(self) -> Tensor | None:
        """The gradient as it is now, ``(..., m, n)``: ``None`` where there is none."""
        if self.layout is None or self.parameter.grad is None:
            return None
        return self.layout.enter(self.parameter.grad)


def subspaces(optimizer: SubspaceOptimizer) -> Iterator[Subspace]:
    """Every subspace of ``optimizer``, in the order of its parameters. Not of weights that are spread over ranks."""
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
    """1 for the same subspace, 0 for orthogonal ones."""
    return float((U.mT @ V).square().sum((-2, -1)).mean()) / U.shape[-1]


def angles(U: Tensor, V: Tensor) -> Tensor:
    """Principal angles in degrees, ``(r,)``, rising."""
    cosines = torch.linalg.svdvals(U.double().mT @ V.double())
    # The arccosine of a number near 1 has half of its digits; the sine does not.
    rest = V.double() - U.double() @ (U.double().mT @ V.double())
    sines = torch.linalg.svdvals(rest).flip(-1)
    return torch.rad2deg(torch.atan2(sines, cosines.clamp(0, 1))).reshape(-1, U.shape[-1]).mean(0)


def captured(G: Tensor, Q: Tensor) -> float:
    """In [0, 1]; not a number for a zero gradient."""
    whole = torch.linalg.vector_norm(G, dim=(-2, -1), dtype=torch.float64).square()
    return float(((G.to(Q.dtype) @ Q).square().sum((-2, -1)) / whole).mean())
