"""``Layout``: how a parameter of any shape is seen as oriented matrices, and which of their sides is compressed."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

Side = Literal["right", "left"]
PROJ_TYPES = {"std": "short", "reverse_std": "long", "right": "right", "left": "left", "short": "short", "long": "long"}
"""The names of galore_torch, and what they mean: which side of the matrix is compressed to the rank."""


class Layout(NamedTuple):
    """How a parameter is seen by the parts."""

    shape: tuple[int, ...]
    """``(..., rows, columns)``; leading dimensions are a stack. Vectors keep their own shape."""
    side: Side | None
    """``right`` compresses the columns (``R = G Q``), ``left`` the rows (``R = Gᵀ Q``), ``None`` is full rank."""

    @property
    def row_dim(self) -> int:
        """The dimension of the oriented matrix along which the rows of the weight lie."""
        return -1 if self.side == "left" else -2

    @property
    def oriented(self) -> tuple[int, ...]:
        """The shape ``(..., m, n)`` of the oriented matrices, whose side ``n`` is compressed."""
        *stack, rows, columns = self.shape
        return (*stack, columns, rows) if self.side == "left" else (*stack, rows, columns)

    def of_rows(self, rows: int) -> "Layout":
        """Return the layout of some of the rows. The columns are compressed, because no rank has all rows."""
        return Layout((rows, *self.shape[1:]), self.side and "right")

    def enter(self, A: Tensor) -> Tensor:
        """Return ``A``, which has the parameter's shape, as oriented matrices, whose last side is compressed."""
        A = A.reshape(self.shape)
        return A.mT if self.side == "left" else A

    def leave(self, D: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo ``enter``: return ``D`` in the parameter's ``shape``."""
        return (D.mT if self.side == "left" else D).reshape(shape)


def layout_of(shape: Sequence[int], rank: int | None, proj_type: str, flatten: bool = False) -> Layout:
    """Return the layout of a parameter in a group with these settings.

    A parameter of three dimensions is a stack of matrices, such as experts. One with more dimensions, or with three and
    ``flatten``, is a convolution and is flattened to ``(out, -1)``. A matrix with a side no larger than the rank is not
    compressed.
    """
    shape = tuple(shape)
    if len(shape) > 3 or (flatten and len(shape) == 3):
        shape = (shape[0], math.prod(shape[1:]))
    if rank is None or len(shape) < 2 or rank >= min(shape[-2:]):
        return Layout(shape, None)
    side = PROJ_TYPES[proj_type]
    if side in ("right", "left"):
        return Layout(shape, side)  # type: ignore[arg-type]  # narrowed by the line above
    wide = shape[-2] < shape[-1]
    return Layout(shape, "left" if wide == (side == "short") else "right")
