"""``y = x Wᵀ + b`` whose backward pass makes ``R = dyᵀ (x Q)`` and not ``G = dyᵀ x``.

Shapes: input ``x (..., in)``, weight ``W (out, in)``, basis ``Q (in, r)``, ``h = x Q (..., r)``, carrier ``B (out,
    r)``.

Layers fed by the same ``x`` meet in one ``gather`` node, which stands between their carriers and them:

    B_1, B_2, ... -> gather -> tickets -> linear_1, linear_2, ...

In the backward pass the node runs once all of them have run. In an ordinary step it hands on what they made. In a step
that forms gradients (``forming``) each has left its ``G`` in a box; the node chooses the basis from all of them,
stacked, projects them, and drops them. The carriers get their gradients from autograd in any case, so that hooks on
them fire.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Box = dict[int, Tensor]
"""``G`` of each layer by its number, until all are there."""
Choose = Callable[[Box], dict[int, Tensor]]
"""From gradients ``G (out, in)`` to ``R (out, r)``, each by its number; it may change the basis first."""


class Taken(NamedTuple):
    """How layer ``number`` takes part in one forward pass."""

    number: int
    kept: Tensor
    """``h``, or ``x`` if a gradient is to be formed: all of the input that is saved."""
    ticket: Tensor
    """``(out, r)``: receives ``R``."""
    box: Box | None
    """Where to leave ``G``; ``None`` in an ordinary step."""


def gather(carriers: list[Tensor], numbers: list[int], box: Box | None, choose: Choose) -> tuple[Tensor, ...]:
    """One ticket for each carrier; ``numbers`` are those of their layers."""
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
    x: Tensor, weight: Tensor, bias: Tensor | None, taken: Taken, moved: Tensor | None, back: Callable[[Tensor], Tensor]
) -> Tensor:
    """``x Wᵀ + b``, and ``+ (x Q) Bᵀ`` if the weight has ``moved`` by ``B Qᵀ``.

    Args:
        weight: takes no gradient. It may be of another dtype than ``x``, as under autocast, and is saved as it is.
        moved: ``B``, or ``None`` where it is zero.
        back: ``(..., r) -> (..., in)``, the adjoint of ``x -> h``.
    """
    y: Tensor = _Linear.apply(x, weight, bias, taken.ticket, moved, taken, back)
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
        taken: Taken,
        back: Any,
    ) -> Tensor:
        ctx.number, ctx.box, ctx.back, ctx.ticket = taken.number, taken.box, back, ticket.shape
        ctx.save_for_backward(taken.kept, weight, moved)
        y = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        if moved is not None:  # and then ``kept`` is h: a displacement is folded before gradients are formed
            y = y + torch.nn.functional.linear(taken.kept, moved.to(x.dtype))
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
                dx += ctx.back(dy @ moved.to(dy.dtype)).to(dx.dtype)
        if needs[2]:
            db = rows.sum(0)
        R = rows.mT @ kept.reshape(-1, kept.shape[-1])
        if ctx.box is not None:
            ctx.box[ctx.number] = R  # of the full width: the gradient
            R = R.new_zeros(()).expand(ctx.ticket)
        return dx, None, db, R, None, None, None
