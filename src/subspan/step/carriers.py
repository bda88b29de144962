"""Carriers: the parameters of backward-side layers, as the optimizer sees them. It does not know the layers
themselves.
"""

from typing import Any, Literal, Protocol

from torch import Tensor

Plan = Literal["keep", "draw", "form"]
"""What the next forward pass does with the basis: keep it, draw a new one first, or form the gradient that chooses
one.
"""


class CarriedProjection(Protocol):
    """One basis, and the layers that share it (``backward.projection``)."""

    layers: list[Any]
    plan: Plan
    merge: str
    select_from: str

    def bind(self, selector: Any, state: dict[str, Any], driver: Any) -> None:
        """Make ``driver`` the optimizer that chooses the basis."""

    def expect(self, plan: Plan) -> None:
        """A step is over: this is what the next pass does."""

    def fold(self) -> None:
        """Put the displacement of the carriers into the weights."""

    def apply_(self, layer: Any, step: Tensor, keep: float | Tensor, generator: Any) -> None:
        """``W <- keep * W - step Qᵀ`` for the weight of one of the layers."""


class CarriedLayer(Protocol):
    """A layer with a carrier (``backward.layer``)."""

    weight: Tensor
    carrier: Tensor
    projection: CarriedProjection
    number: int
    weight_name: str


def mark(carrier: Tensor, layer: Any) -> None:
    """Let ``layer`` be found from its carrier."""
    carrier.subspan_layer = layer  # type: ignore[attr-defined]


def layer_of(p: Tensor) -> CarriedLayer | None:
    """The backward-side layer whose carrier ``p`` is, or ``None``."""
    return getattr(p, "subspan_layer", None)
