"""The class to derive a residual from: it holds no state and takes the gradient as it comes.

A residual is a frozen dataclass, and its fields are its settings. What changes lives in the state that ``init``
allocates. The laws that each method obeys are in ``parts.Residual``. "Adding a residual" in the documentation has a
complete example.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from subspan.parts import Key, Residual, Rows
from subspan.storage.allocation import State, allocate
from subspan.utils.checks import DIVISORS, is_divisor
from subspan.utils.errors import SettingError

_TINY = 1e-8  # the value that Fira's authors add to ||R_i||


class Plain(Residual):
    """A residual without state; a subclass writes ``combine``.

    The four class attributes answer the questions of ``parts.Residual``. A subclass that reads more of the gradient
    than ``R`` sets ``needs_gradient = True``. One for which ``R Qᵀ`` must be a projection sets
    ``needs_orthonormal = True``. One that cannot work on only some of the rows sets ``takes_rows = False``. One that
    wants the momentum outside a new basis sets ``keeps_momentum = True`` and overrides ``lose_``.

    A residual that looks at the gradient only in some directions, which it draws, overrides ``sketch_width`` and
    ``sketch``, as ``residuals.Sketch`` does.

    A residual that keeps something from step to step overrides ``init``. One that changes the gradient before all other
    parts see it overrides ``receive``.
    """

    keeps_momentum = False
    needs_orthonormal = False
    needs_gradient = False
    takes_rows = True

    def init(self, G: Tensor) -> State:
        return {}

    def receive(self, G: Tensor, state: State) -> Tensor:
        return G

    def sketch_width(self, columns: int, rank: int) -> int:
        return 0

    def sketch(self, like: Tensor, rank: int, outside: Callable[[Tensor], Tensor], key: Key) -> Tensor:
        raise AssertionError("this residual has no sketch")

    def sketch_axes(self, columns: int, rank: int, key: Key) -> tuple[Tensor, float] | None:
        return None

    def lose_(self, momentum: Tensor, state: State) -> None:
        """Drop the momentum."""


def row_norms(A: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the norms of the rows, ``(..., m, 1)``, accumulated in ``dtype``."""
    return torch.linalg.vector_norm(A, dim=-1, keepdim=True, dtype=dtype)


def row_factors(U: Tensor, inside: Tensor, whole: Tensor) -> Tensor:
    """Return Fira's ``phi_i = ||U_i|| / max(||R_i||, 1e-8 ||G_i||)``, and 0 where ``G_i = 0``.

    ``inside`` and ``whole`` are the norms of the rows of ``R`` and ``G``, ``(..., m, 1)``.
    """
    phi = row_norms(U, inside.dtype) / torch.maximum(inside, _TINY * whole)
    # Momentum may be so much larger than the gradient that the quotient overflows, and inf times 0 is not a number.
    return phi.clamp_max(torch.finfo(phi.dtype).max).masked_fill(whole == 0, 0)


def last_norm(G: Tensor, limiter: float | None) -> State:
    """Allocate what ``limited_`` keeps from step to step: one number for each matrix, and nothing without a limiter."""
    return {} if limiter is None else {"residual_norm": allocate(G, G.shape[:-2])}


def limited_(phi: Tensor, outside: Tensor, largest: float, state: State, rows: Rows) -> Tensor:
    """Return ``phi``, scaled so that the norm of ``phi * S`` grows by at most ``largest`` in a step: Fira's limiter.

    ``outside`` are the norms of the rows of ``S``, ``(..., m, 1)``. The state keeps the limited norm, unless that is
    zero or not finite (contract R4). A kept norm of zero says that there has been none, and limits nothing.
    """
    norm, previous = rows.total((phi * outside).square().sum((-2, -1))).sqrt(), state["residual_norm"]
    factor = torch.where(previous > 0, (largest * (previous / norm)).clamp_max(1), 1.0)
    limited = norm * factor
    previous.copy_(torch.where(limited.isfinite() & (limited > 0), limited, previous))
    return phi * factor[..., None, None]


def check_limiter(limiter: object) -> None:
    """Raise unless ``limiter`` is a growth factor or ``None``."""
    if limiter is not None and not is_divisor(limiter):
        raise SettingError(
            f"limiter={limiter!r}: expected a growth factor {DIVISORS}, such as 1.01, or None to turn it off"
        )
