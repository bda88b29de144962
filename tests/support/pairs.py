"""Chooses cases so that every pair of values meets in one of them; the rest of a product is marked slow.

A fault that only shows when three parts meet is rare, and the full product of five axes is minutes long. So the
ordinary run takes a cover of all pairs, and ``pytest -m "slow or not slow"`` takes the product.
"""

import heapq
from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations
from typing import Any

import pytest

Row = tuple[Hashable, ...]


def cover(rows: Iterable[Row]) -> list[Row]:
    """Some of ``rows``, in their order: every pair of values that stands in one of ``rows`` stands in one of these.

    The choice is greedy, and the same every time: again and again the first row that adds the most new pairs. What a
    row adds only shrinks as others are taken, so a heap of what each added when it was last looked at is enough.
    """
    rows = list(rows)
    left = {pair for row in rows for pair in pairs(row)}
    taken = []
    heap = [(-len(pairs(row)), index) for index, row in enumerate(rows)]
    heapq.heapify(heap)
    while left:
        _, index = heap[0]
        new = sum(pair in left for pair in pairs(rows[index]))
        if not new:
            heapq.heappop(heap)
            continue
        heapq.heapreplace(heap, (-new, index))
        if heap[0] == (-new, index):
            left.difference_update(pairs(rows[index]))
            taken.append(index)
    return [rows[index] for index in sorted(taken)]


def pairs(row: Row) -> list[tuple[int, Hashable, int, Hashable]]:
    """All pairs of values of a row, with the axes on which they stand."""
    return [(i, a, j, b) for (i, a), (j, b) in combinations(enumerate(row), 2)]


def every_pair(names: str, rows: Sequence[Row]) -> Any:
    """Parametrises a test over ``rows``; a row that the cover does without is marked slow.

    ``names`` are the arguments of the test, one for each axis, or one that receives the row.
    """
    chosen = set(cover(rows))
    whole = "," not in names
    parameters = [
        pytest.param(
            *((row,) if whole else row),
            id="-".join(map(str, row)),
            marks=[] if row in chosen else [pytest.mark.slow],
        )
        for row in rows
    ]
    return pytest.mark.parametrize(names, parameters)
