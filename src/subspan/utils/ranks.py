"""Dimensions of subspaces: a whole number, or a share of the side in which the subspace lies."""

import math
from typing import Annotated, TypeGuard

Rank = Annotated[int | float, "whole or share"]
"""The dimension of subspaces: a whole number, or a share of the side that is compressed, above 0 and below 1.

Python may answer ``Optional[int | float | None]`` with a union that it has met in another order. A command line that
tries the types in turn would then read 4 as 4.0. An annotated union is told apart from others, and keeps its order.
"""
RANKS = "a whole number >= 1, or a share of each compressed side, above 0 and below 1"
"""What a rank may be, in words for messages."""


def is_rank(value: object) -> TypeGuard[Rank]:
    """Whether ``value`` is a whole number >= 1 or a share above 0 and below 1."""
    if isinstance(value, float):
        return 0 < value < 1
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def rank_of_side(rank: Rank, side: int) -> int:
    """Return the number of directions in a side of this length: ``rank``, or its share of them, at least 1.

    A share is rounded to the nearest whole number, and a half upwards.

    >>> rank_of_side(16, 172), rank_of_side(0.25, 172), rank_of_side(0.25, 10), rank_of_side(0.25, 1)
    (16, 43, 3, 1)
    """
    return rank if isinstance(rank, int) else max(1, math.floor(rank * side + 0.5))
