"""``Layout``: how a parameter of any shape is seen as oriented matrices, which side is compressed, to which rank."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from subspan.utils.ranks import Rank, rank_of_side

Side = Literal["right", "left"]
PROJ_TYPES = {"std": "short", "reverse_std": "long", "right": "right", "left": "left", "short": "short", "long": "long"}
"""The names of galore_torch, and what they mean: which side of the matrix is compressed to the rank."""


class Layout(NamedTuple):
    """How a parameter is seen by the parts."""

    shape: tuple[int, ...]
    """``(..., rows, columns)``; leading dimensions are a stack. Vectors keep their own shape."""
    side: Side | None
    """``right`` compresses the columns (``R = G Q``), ``left`` the rows (``R = Gᵀ Q``), ``None`` is full rank."""
    rank: int | None = None
    """Number of columns of ``Q`` and ``R``, ``None`` for full rank."""

    @property
    def row_dim(self) -> int:
        """The dimension of the oriented matrix along which the outputs lie: the rows of a weight ``(out, in)``."""
        return -1 if self.side == "left" else -2

    @property
    def oriented(self) -> tuple[int, ...]:
        """The shape ``(..., m, n)`` of the oriented matrices, whose side ``n`` is compressed."""
        *stack, rows, columns = self.shape
        return (*stack, columns, rows) if self.side == "left" else (*stack, rows, columns)

    def of_rows(self, rows: int) -> "Layout":
        """Return the layout of some of the rows. The columns are compressed, because no rank has all rows."""
        return Layout((rows, *self.shape[1:]), self.side and "right", self.rank)

    def enter(self, A: Tensor) -> Tensor:
        """Return ``A``, which has the parameter's shape, as oriented matrices, whose last side is compressed."""
        A = A.reshape(self.shape)
        return A.mT if self.side == "left" else A

    def leave(self, D: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo ``enter``: return ``D`` in the parameter's ``shape``."""
        return (D.mT if self.side == "left" else D).reshape(shape)


class TransposedLayout(Layout):
    """The layout of matrices ``(in, out)``, whose columns stand for the outputs.

    With some of the rows only (``of_rows``) it is a plain one: a mean over an output would need rows of other ranks.
    """

    __slots__ = ()

    @property
    def row_dim(self) -> int:
        return -2 if self.side == "left" else -1


def layout_of(
    shape: Sequence[int],
    rank: Rank | None,
    proj_type: str,
    flatten: bool = False,
    sharded: bool = False,
    transposed: bool = False,
) -> Layout:
    """Return the layout of a parameter in a group with these settings.

    A parameter of three dimensions is a stack of matrices, such as experts. One with more dimensions, or with three and
    ``flatten``, is a convolution and is flattened to ``(out, -1)``. A matrix with a side no larger than the rank is not
    compressed.

    Args:
        shape: the shape of the whole parameter.
        rank: the rank, or its share of the side that is compressed; ``None`` for full rank.
        proj_type: one of ``PROJ_TYPES``.
        flatten: whether three dimensions are those of a convolution.
        sharded: whether its rows are sharded over ranks. Then the columns are compressed, unless ``proj_type`` asks for
            the other side by name.
        transposed: whether the matrices are ``(in, out)``. ``right`` compresses the inputs, ``left`` the outputs.
    """
    shape = tuple(shape)
    if len(shape) > 3 or (flatten and len(shape) == 3):
        shape = (shape[0], math.prod(shape[1:]))
    kind = TransposedLayout if transposed else Layout
    if rank is None or len(shape) < 2:
        return kind(shape, None)
    rows, columns = shape[-2:]
    outputs, inputs = (columns, rows) if transposed else (rows, columns)
    named = PROJ_TYPES[proj_type]
    of_outputs = named == "left" or (named != "right" and (outputs < inputs) == (named == "short"))
    side: Side = "left" if of_outputs != transposed else "right"
    if sharded and (named != "left" or transposed):
        side = "right"
    own = rank_of_side(rank, columns if side == "right" else rows)
    return kind(shape, None) if own >= min(rows, columns) else kind(shape, side, own)
