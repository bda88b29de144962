"""The bytes of a state as an expression that can be read, such as ``8*m*r + 4*n*r + 4``.

Nobody writes these expressions down. The parts allocate their state on ``meta`` for a matrix whose sides are primes,
and the length of every dimension is divided back into those primes.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from subspan.storage import eight_bit
from subspan.utils.errors import SettingError

VARIABLES = {
    "m": "longer side of a projected matrix",
    "n": "its shorter side",
    "r": "rank",
    "rows": "rows of a projected matrix",
    "columns": "its columns, which are the inputs of its layer",
    "a": "rows of a matrix that is not projected",
    "b": "its columns",
    "k": "length of a vector",
    "q(a, b)": "bytes of a moment of a x b entries in 8 bits: 4*a*b if a*b < min_8bit_size (4096), else a*b + 4*a*ceil(b/256)",
}

_PRIMES = ((1_000_003, 100_003, 10_007), (2_000_003, 200_003, 20_011))
"""Two choices of sizes: only a length that is a product of sizes reads the same under both."""


class Stored(NamedTuple):
    """A tensor of a parameter's state, as far as its bytes depend on it."""

    shape: tuple[int, ...]
    width: int
    """Bytes of an entry."""
    eight_bit: bool = False
    """Whether ``storage.eight_bit`` packs it, if it has enough entries."""

    def bytes(self, smallest: int, length: int | None = None) -> int:
        """Bytes of the tensor.

        Args:
            smallest: entries of the smallest moment that is packed.
            length: length of the first dimension on all ranks together, if this rank holds only a part of it.
        """
        if self.eight_bit and eight_bit.is_packed(self.shape, smallest, length):
            return eight_bit.packed_bytes(self.shape)
        return self.width * math.prod(self.shape)


def expression(names: Sequence[str], allocate: Callable[..., Iterable[Stored]]) -> str:
    """Write the bytes of what ``allocate`` makes of sizes that are called ``names``; the first size is the largest.

    Raises:
        SettingError: a tensor has a length that is no product of the sizes.
    """
    read = []
    for primes in _PRIMES:
        sizes = dict(zip(names, primes, strict=False))
        read.append([_term(tensor, sizes) for tensor in allocate(*sizes.values())])
    if read[0] != read[1]:
        raise SettingError(
            f"init: allocates a tensor whose length is no product of {', '.join(names)}, so its bytes cannot be "
            "written as a formula; count them for given shapes with StateCosts.bytes_held"
        )
    return _sum(read[0])


def _term(tensor: Stored, sizes: Mapping[str, int]) -> tuple[int, str]:
    """The bytes of a tensor as a number and the sizes that multiply it: ``(4, "m*r")``."""
    if tensor.eight_bit:
        sides = (_factors([math.prod(tensor.shape[:-1])], sizes), _factors(tensor.shape[-1:], sizes))
        return 1, f"q({', '.join(_product(*side) for side in sides)})"
    number, names = _factors(tensor.shape, sizes)
    return tensor.width * number, "*".join(names)


def _factors(lengths: Iterable[int], sizes: Mapping[str, int]) -> tuple[int, list[str]]:
    number, names = 1, []
    for length in lengths:
        for name, size in sizes.items():
            while length and length % size == 0:
                length //= size
                names.append(name)
        number *= length
    return number, names


def _product(number: int, names: Sequence[str]) -> str:
    return "*".join([str(number)] * (number != 1 or not names) + [*names])


def _sum(terms: Iterable[tuple[int, str]]) -> str:
    """``[(4, ""), (4, "m*r"), (4, "m*r"), (4, "n*r")]`` as ``8*m*r + 4*n*r + 4``."""
    numbers: dict[str, int] = {}
    for number, names in terms:
        numbers[names] = numbers.get(names, 0) + number
    ordered = sorted(numbers.items(), key=lambda item: item[0] == "")  # the constant last
    return " + ".join(_product(number, [names] * (names != "")) for names, number in ordered if number) or "0"
