"""The state of one parameter: what each part allocates, put together when the optimizer is built (contract R3)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subspan import distributed
from subspan.parts import Residual, Rule, Selector
from subspan.step.carriers import layer_of
from subspan.step.layout import Layout
from subspan.step.method import Method
from subspan.step.proximal import Proximal
from subspan.step.work import local_layout
from subspan.storage import eight_bit
from subspan.storage.allocation import State, is_plain
from subspan.utils.errors import SettingError

SCHEDULE: dict[str, int] = {"refresh_step": -1, "skipped_refreshes": 0}
"""The clock at the last refresh, -1 before the first; and the number of refreshes that a bad gradient has prevented.
They are integers on the host, because the schedule must not wait for a device."""


class Parts(NamedTuple):
    """What holds state for a parameter."""

    rule: Rule
    selector: Selector | None
    """``None`` for a full-rank method."""
    residual: Residual
    proximal: Proximal


def check_trainable(p: Tensor, name: str, group: Mapping[str, Any]) -> None:
    """Raise unless ``p`` has entries that a step can be taken on."""
    if p.is_complex():
        raise SettingError(
            f"params: {name!r} is complex ({p.dtype}), and steps are taken on real numbers only; keep its parts as "
            "torch.view_as_real(...) in a real parameter, or train it with another optimizer"
        )
    if p.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise SettingError(
            f"params: {name!r} is of {p.dtype}; weights are trained in float32, bfloat16, float16 or float64: cast it, or "
            "leave it out"
        )
    if p.ndim > 1 and p.numel() == 0 and group["rank"] is not None:
        raise SettingError(
            f"params: {name!r} of shape {tuple(p.shape)} has no entry, so there is nothing to project; leave it out, or "
            "build the optimizer when the parameter has its shape"
        )


def state_of(method: Method, p: Tensor, group: Mapping[str, Any]) -> State:
    """Allocate everything that is held for ``p``: sharded where ``p`` is, and in 8 bits where the group says so."""
    local = distributed.local(p)
    if not is_plain(local):  # only its shape, dtype and device are asked for
        local = torch.empty((), dtype=p.dtype, device=p.device).expand(p.shape)
    state = _whole(method, p, local, group)
    rows = None
    if distributed.is_sharded(p):
        rows = p.shape[0] if p.ndim else None
        # What is longer for one more row has a row for each row of the parameter, and is sharded with it.
        more = torch.empty((len(local) + 1, *local.shape[1:]), dtype=p.dtype, device="meta")
        longer = _whole(method, p, more, group)
        grown = {key for key, A in state.items() if isinstance(A, Tensor) and A.shape != longer[key].shape}
    if group["state_dtype"] == "int8":
        state = eight_bit.pack(state, method.rule_of(group).moments, group["min_8bit_size"], rows)
    return distributed.shard_state(p, state, grown) if distributed.is_sharded(p) else state


def states_of_parts(parts: Parts, local: Tensor, layout: Layout) -> dict[str, State]:
    """Allocate what each part holds for an ordinary parameter, on the device of ``local``, which may be ``meta``.

    Args:
        parts: the parts, whose names are the keys of what is returned.
        local: the rows of the parameter that are on this rank.
        layout: how they are seen.
    """
    if layout.rank is None or parts.selector is None:
        return {"rule": parts.rule.init(local, layout.shape, layout.row_dim)}
    G = layout.enter(local)
    shape = (*G.shape[:-1], layout.rank)
    return {
        "rule": parts.rule.init(local, shape, layout.row_dim),
        "selector": parts.selector.init(G, layout.rank),
        "residual": parts.residual.init(G),
        "proximal term": parts.proximal.init(local, shape),
    }


def states_of_carrier(parts: Parts, local: Tensor, rank: int, weight: Tensor | None) -> dict[str, State]:
    """Allocate what each part holds for the carrier of a backward-side layer.

    Args:
        parts: the parts, whose names are the keys of what is returned.
        local: the rows of the carrier that are on this rank.
        rank: the dimension of the subspace; a carrier is wider if there is a sketch.
        weight: the weight of the layer, if this carrier keeps the basis that its projection shares.
    """
    shape = (local.shape[0], rank)
    states = {
        "rule": parts.rule.init(local, shape, -2),
        "residual": parts.residual.init(local),
        "proximal term": parts.proximal.init(local, shape),
    }
    if weight is not None and parts.selector is not None:
        states["selector"] = parts.selector.init(weight, rank)
    return states


def _whole(method: Method, p: Tensor, local: Tensor, group: Mapping[str, Any]) -> State:
    """The state of ``p`` for those of its rows that are ``local``, in full precision."""
    parts = Parts(method.rule_of(group), method.selector, method.residual, Proximal.of(group))
    if (layer := layer_of(p)) is not None:
        weight = layer.weight if layer.number == 0 else None
        states = states_of_carrier(parts, local, layer.projection.rank, weight)
    else:
        states = states_of_parts(parts, local, local_layout(p, group, local))
    if "selector" in states:
        states["schedule"] = dict(SCHEDULE)
    return _joined(states, parts.rule)


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
