"""The state of one parameter: what each part allocates, put together when the optimizer is built (contract R3)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from subspan import distributed
from subspan.parts import Rule
from subspan.step.carriers import layer_of
from subspan.step.method import Method
from subspan.step.proximal import Proximal
from subspan.step.work import local_layout
from subspan.storage import eight_bit
from subspan.storage.allocation import State
from subspan.utils.errors import SettingError

SCHEDULE: dict[str, int] = {"refresh_step": -1, "skipped_refreshes": 0}
"""The clock at the last refresh, -1 before the first; and how many a bad gradient has cost. They are integers of the
host, for the schedule must not wait for a device."""


def state_of(method: Method, p: Tensor, group: Mapping[str, Any]) -> State:
    """Allocate everything that is held for ``p``: sharded where ``p`` is, and in 8 bits where the group says so."""
    local = distributed.local(p)
    state = _whole(method, p, local, group)
    rows = None
    if distributed.is_sharded(p):
        rows = p.shape[0] if p.ndim else None
        # What grows with a row more has a row for each row of the parameter, and is sharded with it.
        more = torch.empty((len(local) + 1, *local.shape[1:]), dtype=p.dtype, device="meta")
        longer = _whole(method, p, more, group)
        grown = {key for key, A in state.items() if isinstance(A, Tensor) and A.shape != longer[key].shape}
    if group["state_dtype"] == "int8":
        state = eight_bit.pack(state, method.rule_of(group).moments, group["min_8bit_size"], rows)
    return distributed.shard_state(p, state, grown) if distributed.is_sharded(p) else state


def _whole(method: Method, p: Tensor, local: Tensor, group: Mapping[str, Any]) -> State:
    """The state of ``p`` for those of its rows that are ``local``, in full precision."""
    layout, rule, rank = local_layout(p, group, local), method.rule_of(group), group["rank"]
    proximal = Proximal.of(group)
    if (layer := layer_of(p)) is not None:
        shape = tuple(local.shape)
        parts = {"rule": rule.init(local, shape, -2), "proximal term": proximal.init(local, shape)}
        if layer.number == 0:  # it keeps the basis that its projection shares
            parts |= {"selector": method.selector.init(layer.weight, p.shape[1]), "schedule": dict(SCHEDULE)}
        return _joined(parts, rule)
    if layout.side is None:
        return _joined({"rule": rule.init(local, layout.shape, layout.row_dim)}, rule)
    G = layout.enter(local)
    shape = (*G.shape[:-1], rank)
    return _joined({
        "rule": rule.init(local, shape, layout.row_dim),
        "selector": method.selector.init(G, rank),
        "residual": method.residual.init(G),
        "proximal term": proximal.init(local, shape),
        "schedule": dict(SCHEDULE),
    }, rule)  # fmt: skip


def _joined(parts: Mapping[str, State], rule: Rule) -> State:
    """Join the states of all parts; raises if two of them use one name, for one would overwrite the other.

    Some names are taken even where nothing has them yet: by the schedule, by the proximal term, and by moments that are
    kept in 8 bits.
    """
    state: State = {}
    owner = dict.fromkeys(SCHEDULE, "schedule") | {"displacement": "proximal term"}
    owner |= {f"{moment}.{kind}": "8-bit moments" for moment in rule.moments for kind in ("codes", "absmax")}
    for what, own in parts.items():
        for key in own:
            if owner.setdefault(key, what) != what:
                raise SettingError(
                    f"{what}: its state entry {key!r} belongs to the {owner[key]}; give it a name of its own in init()"
                )
        state |= own
    return state
