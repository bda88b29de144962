"""The class to derive a residual from: it holds no state and takes the gradient as it comes.

A residual is a frozen dataclass, and its fields are its settings. What changes lives in the state that ``init``
allocates. The laws that each method obeys are in ``parts.Residual``. "Adding a residual" in the documentation has a
complete example.
"""

from torch import Tensor

from subspan.parts import Residual
from subspan.storage.allocation import State


class Plain(Residual):
    """A residual without state; a subclass writes ``combine``.

    The four class attributes answer the questions of ``parts.Residual``. A subclass that reads more of the gradient
    than ``R`` sets ``needs_gradient = True``. One for which ``R Qᵀ`` must be a projection sets
    ``needs_orthonormal = True``. One that cannot work on only some of the rows sets ``takes_rows = False``. One that
    wants the momentum outside a new basis sets ``keeps_momentum = True`` and overrides ``lose_``.

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

    def lose_(self, momentum: Tensor, state: State) -> None:
        """Drop the momentum."""
