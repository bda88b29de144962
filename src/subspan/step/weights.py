"""The step on a weight that has a gradient of its own: refresh if one is due, project, step inside, combine, apply."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from subspan import distributed, linalg
from subspan.parts import Rows, Rule
from subspan.step import refresh
from subspan.step.frame import frame_of
from subspan.step.layout import Layout
from subspan.step.method import Method
from subspan.step.proximal import Proximal
from subspan.step.work import Held, Work
from subspan.storage.allocation import State, is_plain
from subspan.storage.stochastic_rounding import add_rounded_

Inside = Callable[[Rule, Tensor, State, Rows], tuple[Tensor, Tensor]]
"""``step_inside``, or what ``torch.compile`` makes of it."""


def step_inside(rule: Rule, R: Tensor, moments: State, rows: Rows) -> tuple[Tensor, Tensor]:
    """Take the rule's step: a function of tensors, for ``torch.compile``."""
    return rule.update_(R, moments, rows)


def step_(method: Method, work: Work, held: Held, inside: Inside, changes: refresh.Changes) -> None:
    """Step on one weight.

    Args:
        held: the weight and its state, opened; they are changed in place.
        changes: the changes of the bases that have been chosen already.
    """
    if work.slot.layout.side is None:
        G = work.slot.layout.enter(work.grad)
        D, factor = inside(work.rule, G, held.moments, held.rows)
        held.store_(work.rule)
        _apply_(work, held.p, D, factor)
    else:
        _projected_(method, work, held, inside, changes)


def _projected_(method: Method, work: Work, held: Held, inside: Inside, changes: refresh.Changes) -> None:
    """Step inside a subspace.

    The equations are ``R = G Q``, ``U = rule(R)``, ``D = scale * U Qᵀ + residual(G, R, U)``, ``W <- W - lr * D``. A
    residual with a sketch is given ``T = G O`` for ``G``.
    """
    (p, state, moments, rows), slot = held, work.slot
    group, layout, selector, proximal = slot.group, slot.layout, method.selector, Proximal.of(slot.group)
    G = work.grad
    if not work.low_rank:
        G = method.residual.receive(layout.enter(G), state)
        if slot.p in changes:
            refresh.carry_over(method, changes[slot.p], state, moments, work.rule)
        else:
            refresh.move_basis(method, G, held, work)
    frame = frame_of(method, slot, state)
    R, seen = frame.split(G) if work.low_rank else frame.look(G)
    U, factor = inside(work.rule, proximal.pull(R, state), moments, rows)
    held.store_(work.rule)
    proximal.move_(U, factor, state, group)
    A, phi = method.residual.combine(seen, R, U, group["scale"], lambda A: selector.project_back(A, state), state, rows)
    if _lifts_in_place(p, layout, group, phi):
        _decay_(p, group)
        W, step = layout.enter(p), group["lr"] * factor
        selector.subtract_(W, A.mul_(step), state)
        if phi is not None:
            frame.subtract_(W, seen, phi.mul_(step))
        return
    D = selector.project_back(A, state)
    if phi is not None:
        frame.subtract_(D, seen, phi.neg_())
    _apply_(work, p, D, factor)


def _apply_(work: Work, p: Tensor, D: Tensor, factor: Tensor) -> None:
    """Compute ``W <- (1 - lr * wd) W - lr * factor * D``, where ``D`` is an oriented matrix, which is overwritten."""
    group = work.slot.group
    D = work.slot.layout.leave(D, p.shape).mul_(group["lr"] * factor)
    if (generator := rounding_generator(work, p)) is not None:
        add_rounded_(p, D.neg_(), 1 - group["lr"] * group["weight_decay"], generator)
        return
    if not is_plain(p):
        keep = 1 - group["lr"] * group["weight_decay"]
        p.add_(D.neg_()) if group["weight_decay"] == 0 else p.copy_(p.detach() * keep - D)
        return
    _decay_(p, group)
    p.sub_(D)


def rounding_generator(work: Work, weight: Tensor) -> torch.Generator | None:
    """Return what draws the stochastic rounding of this step; ``None`` where ``weight`` is rounded to nearest.

    A tensor subclass rounds in its own way.
    """
    if not work.slot.group["bf16_stochastic_round"] or weight.dtype != torch.bfloat16 or not is_plain(weight):
        return None
    return linalg.keyed_generator("round", *work.key, *distributed.place_of(work.slot.p), device=weight.device)


def _lifts_in_place(p: Tensor, layout: Layout, group: Mapping[str, Any], phi: Tensor | None) -> bool:
    """Tell whether ``A Qᵀ + phi G`` may be subtracted from the weight itself, without a tensor of its size.

    For that the weight must be seen as matrices without a copy. It must also be as precise as what is subtracted, or be
    rounded to nearest once.
    """
    rounded = p.dtype == torch.bfloat16 and group["bf16_stochastic_round"]
    if rounded or not is_plain(p) or (phi is not None and phi.dtype != p.dtype):
        return False
    return p.ndim == len(layout.shape) or p.is_contiguous()


def _decay_(p: Tensor, group: Mapping[str, Any]) -> None:
    if group["weight_decay"] != 0:
        p.mul_(1 - group["lr"] * group["weight_decay"])
