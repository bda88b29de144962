"""The cover leaves no pair out, is small, and is the same every time."""

from itertools import product

import pytest
from support.pairs import cover, every_pair, pairs


@pytest.mark.parametrize("sizes", [(1,), (3, 4), (2, 2, 2), (19, 7, 4, 4, 2)], ids=str)
def test_every_pair_of_a_product(sizes: tuple[int, ...]) -> None:
    rows = list(product(*map(range, sizes)))
    found = cover(rows)
    assert {pair for row in found for pair in pairs(row)} == {pair for row in rows for pair in pairs(row)}
    two = sorted(sizes)[-2:]
    assert len(found) <= 1.5 * two[0] * two[-1]
    assert found == cover(rows) == sorted(found)


def test_what_does_not_go_together_is_in_no_case() -> None:
    rows = [row for row in product("abc", "xyz", (1, 2)) if row[:2] != ("a", "x")]
    found = cover(rows)
    assert set(found) <= set(rows)
    assert {pair for row in found for pair in pairs(row)} == {pair for row in rows for pair in pairs(row)}
    assert len(found) < len(rows)


def test_the_rest_is_slow() -> None:
    rows = list(product("ab", "xy", (1, 2)))
    parameters = every_pair("first, second, third", rows).mark.args[1]
    assert [parameter.values for parameter in parameters] == rows
    assert [parameter.values for parameter in parameters if not parameter.marks] == cover(rows)
    assert {mark.name for parameter in parameters for mark in parameter.marks} == {"slow"}
