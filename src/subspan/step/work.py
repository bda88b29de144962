"""What a step knows of a parameter: where it is kept (``Slot``), what is to do (``Work``), what is open (``Held``)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subspan import distributed
from subspan.parts import Key, Rows, Rule
from subspan.step.carriers import layer_of
from subspan.step.layout import Layout, layout_of
from subspan.step.method import Method
from subspan.storage import eight_bit
from subspan.storage.allocation import State
from subspan.utils.names import canonical_names


class Slot(NamedTuple):
    """Where an optimizer keeps a parameter."""

    p: Tensor
    name: str
    """The canonical name, or the position where the parameters came without names."""
    number: int
    """Number of its group."""
    group: dict[str, Any]
    layout: Layout
    """How the local rows are seen."""
    order: int
    """Its number among the projected matrices, for staggered refreshes."""


class Work(NamedTuple):
    """One parameter in one step."""

    slot: Slot
    grad: Tensor
    """The local rows of the gradient, in the parameter's shape; or ``R`` with ``low_rank``."""
    rule: Rule
    """The rule with the settings of the group."""
    key: Key
    low_rank: bool = False
    """Whether ``grad`` is ``R`` already, in a basis that stays."""


class Held(NamedTuple):
    """What this rank has of one parameter, opened for one step and stored once."""

    p: Tensor
    """The local rows of the weight."""
    state: State
    """The local rows of the state, in the memory of the state."""
    moments: State
    """The state with its moments in full precision: the state itself, or copies where it keeps 8 bits."""
    rows: Rows

    def store_(self, rule: Rule) -> None:
        """Store moments that were opened from 8 bits in 8 bits again."""
        if self.moments is not self.state:
            eight_bit.store_(self.state, self.moments, rule.moments)


def open_(p: Tensor, rule: Rule, state: State, group: Mapping[str, Any], dimensions: int) -> Held:
    """Open the state of ``p``, seen as a vector (1), a matrix (2) or a stack of them (3)."""
    own = distributed.local_state(state)
    moments = own
    if group["state_dtype"] == "int8":
        moments = eight_bit.unpack(own, rule.moments, torch.promote_types(p.dtype, torch.float32))
    return Held(distributed.local(p), own, moments, distributed.rows_of(p, dimensions))


def whole_layout(p: Tensor, group: Mapping[str, Any]) -> Layout:
    """Return how all rows of ``p`` are seen, wherever they are. A carrier is not compressed: its gradient is ``R``."""
    if layer_of(p) is not None:
        return Layout(tuple(p.shape), None)
    sharded = distributed.is_sharded(p)
    # A key of these groups only: in all of them, torch's sharded checkpoints of earlier versions would lack it.
    transposed = group.get("transposed", False)
    return layout_of(p.shape, group["rank"], group["proj_type"], group["flatten"], sharded, transposed)


def local_layout(p: Tensor, group: Mapping[str, Any], local: Tensor | None = None) -> Layout:
    """Return how the local rows of ``p`` are seen. If they are not all rows, the columns are compressed."""
    layout = whole_layout(p, group)
    if not distributed.is_sharded(p) or p.ndim == 0:
        return layout
    return layout.of_rows(len(distributed.local(p) if local is None else local))


def slots(groups: Sequence[dict[str, Any]]) -> Iterator[Slot]:
    """Yield where each parameter of the groups is kept, in order."""
    order = 0
    for number, (group, names) in enumerate(zip(groups, names_of(groups), strict=True)):
        for name, p in zip(names, group["params"], strict=True):
            layout = local_layout(p, group)
            yield Slot(p, name, number, group, layout, order)
            order += layout.side is not None


def names_of(groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return names for messages and keyed draws, by group; positions where the parameters came without names.

    A wrapper around the model or a part of it, such as torch.compile's, changes no name.
    """
    canonical = canonical_names(name for group in groups for name in group.get("param_names") or ())
    return [
        [canonical[name] for name in group.get("param_names") or ()]
        or [f"{number}.{index}" for index in range(len(group["params"]))]
        for number, group in enumerate(groups)
    ]


def work_of(method: Method, slot: Slot, grad: Tensor, rule: Rule) -> Work:
    """Return what is to be done on one parameter, given the local rows of its gradient."""
    return Work(slot, grad, rule, method.key(slot.name, slot.group["clock"]))
