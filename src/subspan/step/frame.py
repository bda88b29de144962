"""``Frame``: the directions ``[Q O]`` in which one step looks at a gradient.

``Q (..., n, r)`` is the basis, which the selector keeps. ``O (..., n, s)`` are the directions outside of it that the
residual draws for this step, if it has a sketch. All that such a step needs of a gradient is

    [R T] = G [Q O]        (..., m, r + s)

so this is what backward-side layers make, and what micro-batches and ranks add up.

Where the directions are axes, ``O = c (I - Q Qᵀ) E``, they take no product of the size of ``O``. With ``C = Qᵀ E (r,
s)``,

    T = c (G E - R C),        S Oᵀ = c (S Eᵀ - (S Cᵀ) Qᵀ)

where ``G E`` gathers columns, and ``S Eᵀ`` adds to columns.
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


class Axes(NamedTuple):
    """The directions ``O = c (I - Q Qᵀ) E`` of one matrix, where ``E`` has columns of the identity."""

    j: Tensor
    """``(s,)``: which columns."""
    c: float
    C: Tensor
    """``Qᵀ E (r, s)``."""


class Frame(NamedTuple):
    """The basis of one parameter, and the sketch of one step."""

    selector: Selector
    state: State
    """What the selector keeps, and other entries."""
    rank: int
    O: Tensor | Axes | None
    """``(..., n, s)``; ``None`` for a residual without a sketch."""

    def project(self, G: Tensor) -> Tensor:
        """Map ``(m, n) -> (m, r + s)``: return ``[R T]``."""
        R = self.selector.project(G, self.state)
        return R if self.O is None else torch.cat([R, self._along(G, R)], -1)

    def project_back(self, S: Tensor) -> Tensor:
        """Map ``(m, r + s) -> (m, n)``: return the ``G`` of the smallest norm with this ``[R T]``, if ``QᵀQ = I``."""
        R, T = self.split(S)
        G = self.selector.project_back(R, self.state)
        if self.O is None:
            return G
        O = self._directions()
        inverse = torch.linalg.pinv(O.mT @ O, hermitian=True)  # directions need not be orthonormal
        return G.add_(T @ inverse @ O.mT)

    def split(self, S: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ``R`` and the ``T`` of ``[R T]``."""
        return S[..., : self.rank].contiguous(), S[..., self.rank :]

    def look(self, G: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``R``, and what the residual sees of the gradient: ``T``, or ``G`` if there is no sketch."""
        R = self.selector.project(G, self.state)
        return R, G if self.O is None else self._along(G, R)

    def subtract_(self, W: Tensor, seen: Tensor, phi: Tensor) -> None:
        """Compute ``W <- W - (phi * T) Oᵀ``, or ``W <- W - phi * G`` if there is no sketch."""
        if self.O is None:
            W.addcmul_(seen, phi, value=-1)
            return
        self.subtract_sketch_(W, phi * seen)

    def subtract_sketch_(self, W: Tensor, S: Tensor) -> None:
        """Compute ``W <- W - S Oᵀ``, without another tensor of the size of ``W`` if that is possible."""
        in_place = W.ndim == 2 and W.dtype == S.dtype
        if in_place and isinstance(self.O, Axes):
            W.index_add_(1, self.O.j, S, alpha=-self.O.c)
            self.selector.subtract_(W, (S @ self.O.C.mT).mul_(-self.O.c), self.state)
        elif in_place:
            W.addmm_(S, self._directions().mT, alpha=-1)
        else:
            W.sub_(S @ self._directions().mT)

    def _along(self, G: Tensor, R: Tensor) -> Tensor:
        """Return ``T = G O``, given ``R = G Q``."""
        if not isinstance(self.O, Axes):
            return linalg.project(G, self._directions())
        gathered = G.index_select(-1, self.O.j).to(R.dtype)
        return gathered.addmm_(R, self.O.C, beta=self.O.c, alpha=-self.O.c)

    def _directions(self) -> Tensor:
        """Return ``O`` as a matrix."""
        assert self.O is not None
        if isinstance(self.O, Tensor):
            return self.O
        inside = self.selector.project_back(self.O.C.mT, self.state)  # of the axes, (s, n)
        E = torch.zeros_like(inside).scatter_(1, self.O.j[:, None], 1)
        return (E - inside).mT * self.O.c


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

    found = residual.sketch_axes(shape[-1], rank, key) if len(shape) == 2 else None
    if found is not None:
        index, c = found[0].to(like.device), found[1]
        E = torch.zeros(s, shape[-1], dtype=dtype, device=like.device).scatter_(1, index[:, None], 1)
        return Frame(selector, state, rank, Axes(index, c, selector.project(E, state).mT))
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
