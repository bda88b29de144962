"""Models whose blocks are alike, planned from a few of them.

What a block adds is the same for each, so every count is linear in their number. The peak of a backward pass is not:
while
block ``i`` of ``L`` is gone through, ``i`` blocks' activations are there (``a`` bytes each), and the gradients of ``L -
i``
(``g`` each; 0 where they go as they come). So it lies at one of the ends, and with ``s_j`` the peak while the ``j``-th
of
four blocks from the top is gone through,

    a = g + s_1 - s_2
    peak = max(s_0 + (L - 4) a, s_1 + (L - 4) a, s_2 + (L - 4) g, s_3 + (L - 4) g)
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from subspan.training.models.blocks import blocks_of

FEW = 4
Key = TypeVar("Key")


def shortened(config: Any, model: nn.Module) -> int | None:
    """The number of blocks of ``model``, if they are alike and worth leaving out; ``None`` if all must be run."""
    blocks = blocks_of(model)
    number = getattr(config, "num_hidden_layers", None)
    kinds = {str([(name, tuple(p.shape)) for name, p in block.named_parameters()]) for block in blocks}
    kinds_of_layer = set(getattr(config, "layer_types", None) or ["one"])
    if number != len(blocks) or number <= FEW or len(kinds) > 1 or len(kinds_of_layer) > 1:
        return None
    return len(blocks)


def with_blocks(config: Any, number: int) -> Any:
    """``config`` with so many blocks."""
    short = copy.deepcopy(config)
    if getattr(short, "layer_types", None):
        short.layer_types = short.layer_types[:number]
    short.num_hidden_layers = number
    return short


def extended(few: Mapping[Key, int], fewer: Mapping[Key, int], number: int) -> dict[Key, int]:
    """Counts of ``number`` blocks from those of ``FEW``, and of one less."""
    return {key: value + (number - FEW) * (value - fewer[key]) for key, value in few.items()}


def peak_of(segments: Sequence[int], gradients: int, number: int) -> int:
    """The peak of ``number`` blocks from those of ``FEW``, block by block from the top.

    ``gradients``: bytes of a block's that stay.
    """
    first, second, third, last = segments
    activations, more = gradients + second - third, number - FEW
    return max(
        first + more * activations, second + more * activations, third + more * gradients, last + more * gradients
    )
