"""The basis of a matrix: when it is due, how it is chosen, who chooses it for whom, and how the moments follow.

Where the rows of a weight are sharded, the refreshes come first: the Gram matrices of the local gradients are summed,
one rank factorises each sum, and the bases are sent to all ranks.
"""

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subspan import distributed, linalg
from subspan.distributed import Ranks
from subspan.linalg import Gram, LinAlgError
from subspan.parts import Key, Rule
from subspan.step.carriers import layer_of
from subspan.step.method import Method
from subspan.step.refresh_schedule import offset_of, refresh_due
from subspan.step.work import Held, Slot, Work
from subspan.storage.allocation import State

logger = logging.getLogger(__name__)

Changes = Mapping[Tensor, Tensor | None]
"""The change ``Q_oldᵀ Q_new (r, r)`` of each basis that was due, by parameter; ``None`` where the old one stays."""


def is_due(method: Method, state: State, group: Mapping[str, Any], order: int) -> bool:
    """Tell whether the next step is to choose a new basis."""
    period = method.selector.period(group["update_proj_gap"], state)
    return refresh_due(state["refresh_step"], group["clock"], period, offset(method, group, order))


def offset(method: Method, group: Mapping[str, Any], order: int) -> int:
    """Return where in a period the refreshes of a matrix fall: at its beginning, or elsewhere if staggered."""
    return offset_of(order, group["update_proj_gap"]) if method.stagger else 0


def low_rank_suffices(method: Method, slot: Slot, states: Mapping[Tensor, State]) -> bool:
    """Tell whether ``R`` is all that the coming step needs of a gradient. That of a carrier is ``R`` already."""
    if slot.layout.side is None or layer_of(slot.p) is not None:
        return False
    if method.residual.needs_gradient or method.selector.tracks:
        return False
    return not is_due(method, states[slot.p], slot.group, slot.order)


def move_basis(method: Method, G: Tensor, held: Held, work: Work) -> None:
    """Refresh the basis if that is due, or else let it follow the gradient if it can. The moments follow the basis."""
    state, rule, selector = held.state, work.rule, method.selector
    due = is_due(method, state, work.slot.group, work.slot.order)
    if not due and not selector.tracks:
        return
    momentum = rule.first_moment(held.moments)
    watched = momentum if method.residual.keeps_momentum else None
    before = None if watched is None else selector.project_back(watched.value, state)
    change = choose(method, G, state, work.key) if due else selector.track_(G, state, momentum)
    carry_over(method, change, state, held.moments, rule)
    if change is not None and watched is not None and before is not None:  # its value has been changed in place
        lost = before.sub_(selector.project_back(watched.value, state))
        method.residual.lose_(lost.mul_(watched.weight), state)


def choose(method: Method, G: Tensor | Gram, state: State, key: Key) -> Tensor | None:
    """Choose a new basis from ``G``; return the change, or ``None`` where the old basis stays.

    This is the only place in a step that waits for the device. A gradient that is zero or not finite says nothing about
    a subspace (contract R4), and a factorisation that fails leaves the old basis (R11).
    """
    if 0 < linalg.largest(G) < float("inf"):
        try:
            change = method.selector.refresh_(G, state, key)
            state["refresh_step"] = key.step
            return change
        except LinAlgError as error:
            logger.warning("refresh of %s at step %d keeps the old basis: %s", key.name, key.step, error)
    state["skipped_refreshes"] += 1
    return None


def carry_over(method: Method, change: Tensor | None, state: State, moments: State, rule: Rule) -> None:
    """Let the moments follow a change of basis, and set the way since the last refresh to zero."""
    if change is None:
        return
    if "displacement" in state:
        state["displacement"].zero_()
    if method.transfer != "keep":
        rule.transfer_(moments, change, method.transfer)


class Wanted(NamedTuple):
    """A basis that one rank is to choose for all."""

    state: State
    key: Key
    rank: int
    like: Tensor
    """A row ``(1, n)`` with the dtype and the device of the gradient."""
    owner: int
    """Number of the rank that chooses."""
    G: Tensor | Gram | None
    """What it chooses from; on the other ranks it may be ``None``."""


def choose_by_owner(method: Method, wanted: Sequence[Wanted], ranks: Ranks) -> list[Tensor | None]:
    """Let the owner of each basis choose it and send it to all ranks; return the changes, the same everywhere."""
    before = [one.state["refresh_step"] for one in wanted]
    own: dict[int, Tensor | None] = {}
    for number, one in enumerate(wanted):  # all choose before any sends
        if one.owner == ranks.index and one.G is not None:
            own[number] = choose(method, one.G, one.state, one.key)
    changes: list[Tensor | None] = []
    for number, (one, old) in enumerate(zip(wanted, before, strict=True)):
        dtype = torch.promote_types(one.like.dtype, torch.float32)
        sent = torch.zeros(one.rank, one.rank, dtype=dtype, device=one.like.device)
        if (change := own.get(number)) is not None:
            sent.copy_(change)
        keys = [*method.selector.init(one.like, one.rank), "refresh_step", "skipped_refreshes"]
        ranks.share_(one.state, keys, [sent], one.owner)
        changes.append(sent if one.state["refresh_step"] != old else None)
    return changes


def choose_sharded(
    method: Method, works: Iterable[Work], states: Mapping[Tensor, State]
) -> dict[Tensor, Tensor | None]:
    """Choose the new bases that are due of weights whose rows are sharded, and return their ``Changes``."""
    due: dict[Any, list[Work]] = {}
    for work in works:
        slot = work.slot
        projected = distributed.is_sharded(slot.p) and slot.layout.side is not None and layer_of(slot.p) is None
        if projected and not work.low_rank and is_due(method, states[slot.p], slot.group, slot.order):
            due.setdefault(distributed.mesh_of(slot.p), []).append(work)
    changes: dict[Tensor, Tensor | None] = {}
    for some in due.values():
        ranks = distributed.ranks_of(some[0].slot.p)
        if not method.selector.needs_gradient:
            good = ranks.usable([work.grad for work in some])
            for work, usable in zip(some, good, strict=True):
                row = work.grad.new_full((1, work.slot.layout.shape[-1]), float(usable))
                changes[work.slot.p] = choose(method, row, states[work.slot.p], work.key)
            continue
        # Each round has one for each rank. Those of similar cost are in one round, so that no rank waits long.
        some.sort(key=lambda work: -work.slot.layout.shape[-1])
        remaining = iter(some)
        while chunk := list(itertools.islice(remaining, ranks.count)):
            wanted = [_wanted(work, number, len(chunk), ranks, states) for number, work in enumerate(chunk)]
            chosen = choose_by_owner(method, wanted, ranks)
            changes |= dict(zip((work.slot.p for work in chunk), chosen, strict=True))
    return changes


def _wanted(work: Work, number: int, count: int, ranks: Ranks, states: Mapping[Tensor, State]) -> Wanted:
    """Sum the Gram matrices of the local rows, and name the rank that is to factorise the sum."""
    slot = work.slot
    # Where they come one at a time, as in the backward pass, another rank has its turn.
    owner = (number + slot.order * (count == 1)) % ranks.count
    G = slot.layout.enter(work.grad)
    row = G.new_zeros(1, G.shape[-1])
    S = ranks.add_rows_(linalg.gram(G))
    whole = Gram(S, row, slot.p.shape[0]) if owner == ranks.index else None  # the other ranks let the sum go
    assert slot.layout.rank is not None
    return Wanted(states[slot.p], work.key, slot.layout.rank, row, owner, whole)
