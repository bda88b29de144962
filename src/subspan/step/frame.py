"""``Frame``: the directions ``[Q O]`` in which one step looks at a gradient.

``Q (..., n, r)`` is the basis, which the selector keeps. ``O (..., n, s)`` are the directions outside of it that the
residual draws for this step, if it has a sketch. All that such a step needs of a gradient is

    [R T] = G [Q O]        (..., m, r + s)

so this is what backward-side layers make, and what micro-batches and ranks add up.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from subspan import linalg
from subspan.parts import Key, Residual, Selector
from subspan.step.carriers import layer_of
from subspan.step.method import Method
from subspan.step.work import Slot
from subspan.storage.allocation import State


class Frame(NamedTuple):
    """The basis of one parameter, and the sketch of one step."""

    selector: Selector
    state: State
    """What the selector keeps, and other entries."""
    rank: int
    O: Tensor | None
    """``(..., n, s)``; ``None`` for a residual without a sketch."""

    def project(self, G: Tensor) -> Tensor:
        """Map ``(m, n) -> (m, r + s)``: return ``[R T]``."""
        R = self.selector.project(G, self.state)
        return R if self.O is None else torch.cat([R, linalg.project(G, self.O)], -1)

    def project_back(self, S: Tensor) -> Tensor:
        """Map ``(m, r + s) -> (m, n)``: return the ``G`` of the smallest norm with this ``[R T]``, if ``QᵀQ = I``."""
        R, T = self.split(S)
        G = self.selector.project_back(R, self.state)
        if self.O is None:
            return G
        inverse = torch.linalg.pinv(self.O.mT @ self.O, hermitian=True)  # directions need not be orthonormal
        return G.add_(T @ inverse @ self.O.mT)

    def split(self, S: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ``R`` and the ``T`` of ``[R T]``."""
        return S[..., : self.rank].contiguous(), S[..., self.rank :]

    def look(self, G: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``R``, and what the residual sees of the gradient: ``T``, or ``G`` if there is no sketch."""
        return self.selector.project(G, self.state), G if self.O is None else linalg.project(G, self.O)

    def subtract_(self, W: Tensor, seen: Tensor, phi: Tensor) -> None:
        """Compute ``W <- W - (phi * T) Oᵀ``, or ``W <- W - phi * G`` if there is no sketch."""
        if self.O is None:
            W.addcmul_(seen, phi, value=-1)
            return
        self.subtract_sketch_(W, phi * seen)

    def subtract_sketch_(self, W: Tensor, S: Tensor) -> None:
        """Compute ``W <- W - S Oᵀ``, without another tensor of the size of ``W`` if that is possible."""
        assert self.O is not None
        if W.ndim == 2 and W.dtype == S.dtype:
            W.addmm_(S, self.O.mT, alpha=-1)
        else:
            W.sub_(S @ self.O.mT)


def draw_frame(
    selector: Selector, residual: Residual, state: State, shape: Sequence[int], rank: int, key: Key, like: Tensor
) -> Frame:
    """Return the frame of a step, for which the sketch is drawn.

    Args:
        shape: shape ``(..., m, n)`` of the oriented gradients, whose ``m`` is not read.
        key: what the draw depends on besides the basis, which is in ``state``.
        like: has the dtype and the device of the gradients.
    """
    s = residual.sketch_width(shape[-1], rank)
    if s == 0:
        return Frame(selector, state, rank, None)
    dtype = torch.promote_types(like.dtype, torch.float32)

    def outside(A: Tensor) -> Tensor:
        return A - selector.project_back(selector.project(A, state), state)

    empty = torch.empty((*shape[:-2], shape[-1], s), dtype=dtype, device=like.device)
    return Frame(selector, state, rank, residual.sketch(empty, rank, outside, key))


def frame_of(method: Method, slot: Slot, state: State) -> Frame:
    """Return the frame of the coming step on an ordinary weight."""
    assert slot.layout.rank is not None
    key = method.key(slot.name, slot.group["clock"])
    return draw_frame(method.selector, method.residual, state, slot.layout.oriented, slot.layout.rank, key, slot.p)


def whole_sketches(method: Method, slots: Iterable[Slot]) -> str | None:
    """Return a sentence on the parameters whose sketch is all of what is outside the basis, if there are any."""
    found = []
    for slot in slots:
        if (layer := layer_of(slot.p)) is not None:
            name, n, rank = layer.weight_name, layer.in_features, layer.projection.rank
        elif slot.layout.rank is not None:
            name, n, rank = slot.name, slot.layout.oriented[-1], slot.layout.rank
        else:
            continue
        if 0 < n - rank == method.residual.sketch_width(n, rank):
            found.append((name, n - rank))
    if not found:
        return None
    (name, width), count = found[0], len(found)
    return (
        f"residual={method.residual!r}: the sketch is all that is outside the basis for {count} of the matrices, such as "
        f"{name!r}, where there are only {width} directions; nothing is left to chance there"
    )
