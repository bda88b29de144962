"""The parts of the step, as protocols. The optimizer knows these alone; ``recipes`` binds them to the concrete ones.

Shapes: oriented gradient ``G (m, n)`` (the side to compress is last), basis ``Q (n, r)``, low-rank gradient
``R = G Q (m, r)``, update inside the subspace ``U (m, r)``.

Parts are frozen dataclasses that hold settings only. What changes lives in the ``State`` of a parameter, which is
allocated when the optimizer is built, changed in place, and passed in.
"""

from collections.abc import Callable
from dataclasses import Field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeGuard

from torch import Tensor

from subspan.state import State

Transfer = Literal["keep", "rotate", "moments", "reset"]
"""What becomes of the moments at a refresh, with ``C = Q_oldᵀ Q_new (r, r)``:

- ``keep``: nothing (GaLore; SARA, Algorithm 1): the coordinates are reused as they are;
- ``rotate``: the first moment is re-projected, ``M <- M C`` (GoLore's momentum projection; the theory of SARA);
- ``moments``: both moments are transported (LDAdam);
- ``reset``: moments and step count start over (RSO, FRUGAL).
"""


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` compares with numbers, so that a setting of another kind gets the same error as one out of range."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Key(NamedTuple):
    """What a refresh may depend on besides the gradient. The same key gives the same draw on every rank and device."""

    seed: int
    name: str
    """Name of the parameter."""
    step: int
    """How many steps the optimizer had taken when the refresh fell due."""


class Selector(Protocol):
    """Which subspace?"""

    @property
    def needs_gradient(self) -> bool:
        """False if ``refresh_`` reads no more of ``G`` than its shape."""

    def init(self, G: Tensor, rank: int) -> State:
        """The state for gradients of the shape, dtype and device of ``G``."""

    def refresh_(self, G: Tensor, state: State, key: Key) -> Tensor:
        """Choose a new basis and store it in ``state``; returns the change ``Q_oldᵀ Q_new (r, r)``.

        Law: the result depends on ``G``, ``state`` and ``key`` alone. If it raises, ``state`` is unchanged.
        """

    def project(self, G: Tensor, state: State) -> Tensor:
        """``(m, n) -> (m, r)``. Law: linear in ``G``."""

    def project_back(self, R: Tensor, state: State) -> Tensor:
        """``(m, r) -> (m, n)``, a fresh tensor. Law: the adjoint of ``project``."""


class Rule(Protocol):
    """Which step inside it? A rule's fields become keys of the parameter groups, where schedulers can change them."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def init(self, like: Tensor, shape: tuple[int, ...]) -> State:
        """The state for low-rank gradients of ``shape`` that belong to the parameter ``like``."""

    def transfer_(self, state: State, change: Tensor, how: Transfer) -> None:
        """Carry the moments into the new basis; see ``Transfer``. Not called for ``keep``."""

    def update_(self, R: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """The direction ``U`` and the 0-d fp64 step-size factor that corrects it (bias correction, or one), on the CPU.

        Law: ``U`` is a fresh tensor, which the caller may overwrite. No branch on a tensor's value.
        """


class Residual(Protocol):
    """What becomes of the part of the gradient outside the subspace?"""

    def init(self, G: Tensor) -> State:
        """The state for gradients of the shape, dtype and device of ``G``."""

    def combine(self, G: Tensor, R: Tensor, U: Tensor, scale: float, back: Callable[[Tensor], Tensor], state: State) -> Tensor:
        """``scale * back(U) + residual``, a fresh full-size tensor. ``back`` is the selector's ``project_back``."""
