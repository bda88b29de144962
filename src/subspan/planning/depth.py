"""Models whose blocks are alike are planned from a few of them.

Each block adds the same, so every count is linear in the number of blocks. The peak of a backward pass is not. While it
goes through block ``i`` of ``L``, the activations of ``i`` blocks are there (``a`` bytes each), and the gradients of
``L - i`` blocks (``g`` bytes each; 0 where gradients go as they come). So the peak lies at one of the two ends. With
``s_j`` the peak while the pass goes through the ``j``-th of four blocks from the top,

    a = g + s_1 - s_2
    peak = max(s_0 + (L - 4) a, s_1 + (L - 4) a, s_2 + (L - 4) g, s_3 + (L - 4) g)
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from subspan.groups import RankPattern
from subspan.training.models.blocks import blocks_of

FEW = 4
Key = TypeVar("Key")


def shortened(config: Any, model: nn.Module, pattern: RankPattern | None = None) -> int | None:
    """The number of blocks of ``model``, or ``None`` if all of them must be run: they differ, or are too few.

    Args:
        pattern: the ranks by name. Blocks in which another part of it gives the ranks differ.
    """
    blocks = blocks_of(model)
    number = getattr(config, "num_hidden_layers", None)
    names = {p: name for name, p in model.named_parameters()}
    kinds = {
        str(
            [
                (name, tuple(p.shape), pattern.finds(names[p]) if pattern is not None else None)
                for name, p in block.named_parameters()
            ]
        )
        for block in blocks
    }
    kinds_of_layer = set(getattr(config, "layer_types", None) or ["one"])
    if number != len(blocks) or number <= FEW or len(kinds) > 1 or len(kinds_of_layer) > 1:
        return None
    return len(blocks)


def with_blocks(config: Any, number: int) -> Any:
    """A copy of ``config`` with ``number`` blocks."""
    short = copy.deepcopy(config)
    if getattr(short, "layer_types", None):
        short.layer_types = short.layer_types[:number]
    short.num_hidden_layers = number
    return short


def extended(few: Mapping[Key, int], fewer: Mapping[Key, int], number: int) -> dict[Key, int]:
    """The counts of ``number`` blocks, from those of ``FEW`` blocks and those of one block less."""
    return {key: value + (number - FEW) * (value - fewer[key]) for key, value in few.items()}


def peak_of(segments: Sequence[int], gradients: int, number: int) -> int:
    """The peak with ``number`` blocks, from what was found with ``FEW``.

    Args:
        segments: the peaks while the pass goes through each of the few blocks, from the top.
        gradients: bytes of the gradients of one block that stay.
        number: blocks of the model.
    """
    first, second, third, last = segments
    activations, more = gradients + second - third, number - FEW
    return max(
        first + more * activations, second + more * activations, third + more * gradients, last + more * gradients
    )
