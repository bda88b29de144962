"""Carriers, which are the parameters of backward-side layers, and the protocols between optimizer and layers.

Neither imports the other. The optimizer finds a layer from its carrier (``layer_of``); a projection asks its
``Driver``, which is the optimizer's ``Carriers`` (``step/backward_side.py``), for a new basis.
"""

from typing import Any, Literal, Protocol

from torch import Tensor

from subspan.parts import Key
from subspan.storage.allocation import State
from subspan.utils.ranks import Rank

Plan = Literal["keep", "draw", "form"]
"""What the next pass does with the basis: keep it, draw a new one first, or form the gradient that chooses one."""


class CarriedProjection(Protocol):
    """One basis, and the layers that share it (``backward.projection``)."""

    layers: list[Any]
    rank: int
    sketch_width: int
    """Number ``s`` of directions beside the basis, for the residual of the optimizer; 0 for none."""
    asked: Rank
    """What ``rank`` was made of: itself, or a share of the inputs."""
    by_pattern: bool
    """Whether a pattern of names has set ``asked``, and not the rank of all layers."""
    plan: Plan
    merge: str
    select_from: str
    process_group: Any
    """The data-parallel ranks that share the basis; ``None`` if there are no others."""

    def bind(self, selector: Any, residual: Any, state: State, driver: "Driver") -> None:
        """Take the basis in ``state``, and make ``driver`` the one that chooses it."""

    def follow(self, state: State, driver: "Driver") -> None:
        """Take the basis in ``state``, to which it has been moved, if ``driver`` is the one that chooses it."""

    def expect(self, plan: Plan, key: Key | None = None) -> None:
        """Note that a step is over, and what the next pass is to do.

        The sketch of the next step is drawn from ``key``; ``None`` leaves it as it is.
        """

    def fold(self) -> None:
        """Put the displacement of the carriers into the weights."""

    def back(self, A: Tensor) -> Tensor:
        """Return ``A Qᵀ (..., in)``."""

    def apply_(self, layer: Any, step: Tensor, sketched: Tensor | None, keep: float | Tensor, generator: Any) -> None:
        """Compute ``W <- keep * W - step Qᵀ - sketched Oᵀ`` for the weight of one of the layers."""


class CarriedLayer(Protocol):
    """A layer with a carrier (``backward.layer``)."""

    number: int
    weight_name: str
    in_features: int

    @property
    def weight(self) -> Tensor:
        """The frozen weight ``(out, in)``."""

    @property
    def carrier(self) -> Tensor:
        """The trained parameter ``(out, r + s)``, whose gradient is ``R``, or ``[R T]`` if there is a sketch."""

    @property
    def projection(self) -> CarriedProjection:
        """The basis, which several layers may share."""


class Driver(Protocol):
    """What a projection asks of the optimizer that is bound to it."""

    def look(self, device: Any, state: State) -> None:
        """Before a pass: let ``state``, which holds the basis, be where the weights are, on ``device``."""

    def refresh_projection(self, projection: Any, G: Tensor | None) -> None:
        """Choose a new basis and carry the moments of every carrier over.

        ``G (m, in)`` is the gradient of the layers, stacked; ``None`` if the selector needs none.
        """


def mark(carrier: Tensor, layer: Any) -> None:
    """Let ``layer`` be found from its carrier."""
    carrier.subspan_layer = layer  # type: ignore[attr-defined]


def layer_of(p: Tensor) -> CarriedLayer | None:
    """Return the backward-side layer whose carrier ``p`` is, or ``None``."""
    return getattr(p, "subspan_layer", None)
