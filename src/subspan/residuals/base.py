"""A residual that holds nothing and takes the gradient as it comes."""

from torch import Tensor

from subspan.parts import Residual
from subspan.storage.allocation import State


class Plain(Residual):
    """The defaults of ``parts.Residual``."""

    keeps_momentum = False
    needs_orthonormal = False
    needs_gradient = False
    takes_rows = True

    def init(self, G: Tensor) -> State:
        return {}

    def receive(self, G: Tensor, state: State) -> Tensor:
        return G

    def lose_(self, momentum: Tensor, state: State) -> None:
        """Forget it."""
