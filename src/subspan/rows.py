"""Sums over the rows of a matrix, some of which may be on other ranks. What is done with a rank's own rows needs no word."""

from torch import Tensor


class Rows:
    """The rows of a matrix, all of them here. ``distributed`` has those that are spread over a mesh."""

    def total(self, A: Tensor) -> Tensor:
        """``A``, which is a sum over the rows here, as the sum over all rows."""
        return A

    def count(self, here: int) -> int:
        """How many rows there are, ``here`` of them on this rank."""
        return here


ALL_HERE = Rows()
