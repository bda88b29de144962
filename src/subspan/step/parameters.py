"""One step on some of an optimizer's parameters: the entrance that ``optimizer.step()`` and the backward pass share."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from subspan.step import backward_side, refresh, weights
from subspan.step.carriers import layer_of
from subspan.step.method import Method
from subspan.step.weights import Inside
from subspan.step.work import Work, open_
from subspan.storage.allocation import State


def step_on_(method: Method, states: Mapping[Tensor, State], works: Sequence[Work], inside: Inside) -> None:
    """Take a step on each of ``works``. Bases of sharded weights are chosen first, by all ranks together."""
    changes = refresh.choose_sharded(method, works, states)
    for work in works:
        slot = work.slot
        if (layer := layer_of(slot.p)) is not None:
            held = open_(slot.p, work.rule, states[slot.p], slot.group, 2)
            backward_side.step_(method, work, layer, held, inside)
        else:
            held = open_(slot.p, work.rule, states[slot.p], slot.group, len(slot.layout.shape))
            weights.step_(method, work, held, inside, changes)
