"""``y = x Wᵀ + b`` with a backward pass that makes ``R = dyᵀ (x Q)`` and not ``G = dyᵀ x``.

Shapes: input ``x (..., in)``, weight ``W (out, in)``, basis ``Q (in, r)``, ``h = x Q (..., r)``, and carrier
``B (out, r)``. Where the residual has a sketch ``O (in, s)``, ``[Q O]`` takes the place of ``Q``, and ``[R T]`` that of
``R``; then a carrier has ``r + s`` columns, of which only ``r`` can be a displacement.

Where the widths of several bases add up to that of ``x``, layers keep ``x``, which is one tensor for all of them, and
make ``h`` in the backward pass (``backward.inputs``).

Layers with the same basis meet in one ``gather`` node, which stands between their carriers and them:

    B_1, B_2, ... -> gather -> tickets -> linear_1, linear_2, ...

In the backward pass the node runs after all of these layers. In an ordinary step it hands their ``R`` on. In a step
that forms gradients, each layer has left its ``G`` in a box. The node then chooses the basis from all of them, stacked,
projects them, and drops them. In both cases the carriers get their gradients from autograd, so hooks on them run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Box = dict[int, Tensor]
"""The ``G`` of each layer, by its number, until all are there."""
Choose = Callable[[Box], dict[int, Tensor]]
"""Turns gradients ``G (out, in)`` into ``R (out, r)``, both by number of their layer. It may change the basis first."""


class Directions(Protocol):
    """``[Q O]`` of a pass, as maps. Nothing in them is part of a graph."""

    def down(self, A: Tensor) -> Tensor:
        """Map ``x (..., in) -> h (..., r + s)``."""

    def inside(self, A: Tensor) -> Tensor:
        """Map ``x (..., in) -> x Q (..., r)``."""

    def back(self, A: Tensor) -> Tensor:
        """Map ``(..., r) -> (..., in)``, the adjoint of ``inside``."""


class LayerPass(NamedTuple):
    """What one layer needs for one forward pass and the backward pass after it."""

    number: int
    """Number of the layer."""
    kept: Tensor
    """What is saved of the input: ``h`` or ``x``."""
    whole: bool
    """Whether it is ``x``."""
    ticket: Tensor
    """Node of the graph, ``(out, r)``, which receives ``R``."""
    box: Box | None
    """Where the backward pass leaves ``G``; ``None`` in an ordinary step."""


def gather(carriers: list[Tensor], numbers: list[int], box: Box | None, choose: Choose) -> tuple[Tensor, ...]:
    """Return one ticket for each carrier; ``numbers`` are the numbers of their layers."""
    tickets: tuple[Tensor, ...] = _Gather.apply(numbers, box, choose, *carriers)
    return tickets


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: list[int], box: Box | None, choose: Choose, *carriers: Tensor) -> tuple[Tensor, ...]:
        ctx.numbers, ctx.box, ctx.choose = numbers, box, choose
        ctx.set_materialize_grads(False)
        return tuple(carrier.view_as(carrier) for carrier in carriers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.box is None:
            return None, None, None, *grads
        R = ctx.choose(ctx.box)
        ctx.box.clear()
        return None, None, None, *(R.get(number) for number in ctx.numbers)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_pass: LayerPass,
    moved: Tensor | None,
    directions: Directions,
) -> Tensor:
    """Compute ``x Wᵀ + b``, and add ``(x Q) Bᵀ`` if the weight has moved by ``B Qᵀ``.

    Args:
        weight: gets no gradient. It may be of another dtype than ``x``, as under autocast, and is saved as it is.
        moved: ``B``, or ``None`` if it is zero.
        directions: those of the basis.
    """
    y: Tensor = _Linear.apply(x, weight, bias, layer_pass.ticket, moved, layer_pass, directions)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ticket: Tensor,
        moved: Tensor | None,
        layer_pass: LayerPass,
        directions: Directions,
    ) -> Tensor:
        ctx.number, ctx.box, ctx.whole = layer_pass.number, layer_pass.box, layer_pass.whole
        ctx.directions, ctx.ticket = directions, ticket.shape
        ctx.save_for_backward(layer_pass.kept, weight, moved)
        y = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        if moved is not None:
            kept = layer_pass.kept
            h = directions.inside(kept) if layer_pass.whole else kept[..., : moved.shape[1]]
            y = y + torch.nn.functional.linear(h, moved.to(x.dtype))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, moved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx = db = None
        rows = dy.reshape(-1, dy.shape[-1])
        if needs[0]:
            dx = dy @ weight.to(dy.dtype)
            if moved is not None:
                dx += ctx.directions.back(dy @ moved.to(dy.dtype)).to(dx.dtype)
        if needs[2]:
            db = rows.sum(0)
        if ctx.whole and ctx.box is None:
            with torch.autocast(kept.device.type, enabled=False):  # as in the forward pass
                kept = ctx.directions.down(kept)
        R = rows.mT @ kept.reshape(-1, kept.shape[-1])
        if ctx.box is not None:
            ctx.box[ctx.number] = R  # this is G, since ``kept`` is x
            R = R.new_zeros(()).expand(ctx.ticket)
        return dx, None, db, R, None, None, None
