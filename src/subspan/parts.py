"""The parts of the step, as protocols. The optimizer knows these alone; ``recipes`` binds them to the concrete ones.

Shapes: oriented gradient ``G (..., m, n)`` (the side to compress is last; leading dimensions are a stack of matrices,
    such as
experts), basis ``Q (..., n, r)``, low-rank gradient ``R = G Q (..., m, r)``, update inside the subspace ``U (..., m,
r)``.

Parts are frozen dataclasses that hold settings only. What changes lives in the ``State`` of a parameter, which is
allocated when the optimizer is built, changed in place, and passed in.
"""

from collections.abc import Callable, Mapping
from dataclasses import Field, is_dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor

from subspan.linalg import Gram
from subspan.storage.allocation import State
from subspan.utils.checks import is_number
from subspan.utils.errors import SettingError


class Rows:
    """The rows of a matrix, all of them here. ``distributed`` has those that are spread over a mesh."""

    def total(self, A: Tensor) -> Tensor:
        """``A``, which is a sum over the rows here, as the sum over all rows."""
        return A

    def count(self, here: int) -> int:
        """How many rows there are, ``here`` of them on this rank."""
        return here


ALL_HERE = Rows()

Transfer = Literal["keep", "rotate", "moments", "reset"]
"""What becomes of the moments when the basis changes, with ``C = Q_oldᵀ Q_new (r, r)``:

- ``keep``: nothing (GaLore; SARA, Algorithm 1): the coordinates are reused as they are;
- ``rotate``: the first moment is re-projected, ``M <- M C`` (GoLore's momentum projection; the theory of SARA);
- ``moments``: both moments are transported (LDAdam);
- ``reset``: moments and step count start over (RSO, FRUGAL, GRASS).
"""


def check_selector(value: object, argument: str) -> None:
    """Raise unless ``value`` is a selector."""
    if isinstance(value, type) or not is_dataclass(value) or not hasattr(value, "refresh_"):
        raise SettingError(
            f"{argument}={value!r}: expected a selector as an object, such as subspan.selectors.Importance()"
        )


def holds(part: object, kind: type) -> bool:
    """Whether ``part`` is of this kind, or made of such a part."""
    inner = vars(part).values() if is_dataclass(part) else ()
    return isinstance(part, kind) or any(is_dataclass(value) and holds(value, kind) for value in inner)


def check_betas(betas: object) -> None:
    """Raise unless ``betas`` are two rates of decay."""
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not pair or not all(is_number(beta) and 0 <= beta < 1 for beta in betas):  # type: ignore[attr-defined]
        raise SettingError(f"betas={betas!r}: expected two numbers, each at least 0 and below 1, such as (0.9, 0.999)")


class Key(NamedTuple):
    """What a refresh may depend on besides the gradient. The same key gives the same draw on every rank and device."""

    seed: int
    name: str
    """Name of the parameter."""
    step: int
    """How many steps the optimizer had taken when the refresh fell due."""


class Momentum(NamedTuple):
    """The first moment of a rule, for the parts of LDAdam, which look at it."""

    value: Tensor
    """``M (m, r)``, in the coordinates of the present basis."""
    mean: Tensor
    """The average of past ``R`` that ``M`` stands for, ``M / (1 - beta1^step)``; zero before the first step."""
    weight: float
    """The gradient that would leave ``M`` to later steps is ``weight * M``: ``decay / gain`` of ``M <- decay M + gain
    R``.
    """


class Selector(Protocol):
    """Which subspace?"""

    @property
    def needs_gradient(self) -> bool:
        """False if neither ``refresh_`` nor ``track_`` reads more of ``G`` than its shape."""

    @property
    def takes_gram(self) -> bool:
        """Whether ``refresh_`` also takes the Gram matrix of ``G``: all there is where rows are on several ranks."""

    @property
    def orthonormal(self) -> bool:
        """Whether ``QᵀQ = I``, so that ``Q Qᵀ`` is a projection."""

    @property
    def tracks(self) -> bool:
        """Whether the basis moves at steps without a refresh too, and so needs every gradient."""

    def init(self, G: Tensor, rank: int) -> State:
        """The state for gradients of the shape, dtype and device of ``G``."""

    def period(self, gap: int, state: State) -> int | None:
        """Steps between refreshes, given the group's ``update_proj_gap``; ``None`` for no other after the first."""

    def refresh_(self, G: Tensor | Gram, state: State, key: Key) -> Tensor:
        """Choose a new basis and store it in ``state``; returns the change ``Q_oldᵀ Q_new (r, r)``. It may wait for the
        device.

        ``G`` is finite and not entirely zero. Law: the result depends on ``G``, ``state`` and ``key`` alone. If it
        raises,
        ``state`` is unchanged.
        """

    def track_(self, G: Tensor, state: State, momentum: Momentum | None) -> Tensor | None:
        """Move the basis at a step without a refresh; returns the change, or ``None`` if this selector does not.

        Law: it never waits for the device, and a ``G`` that is zero or not finite changes nothing.
        """

    def project(self, G: Tensor, state: State) -> Tensor:
        """``(m, n) -> (m, r)``. Law: linear in ``G``."""

    def project_back(self, R: Tensor, state: State) -> Tensor:
        """``(m, r) -> (m, n)``, a fresh tensor. Law: the adjoint of ``project``."""

    def subtract_(self, W: Tensor, R: Tensor, state: State) -> None:
        """``W <- W - project_back(R)``, without another tensor of the size of ``W`` if it can."""


class Rule(Protocol):
    """Which step inside it? A rule's fields become keys of the parameter groups, where schedulers can change them."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def moments(self) -> Mapping[str, bool]:
        """The entries of the state that may be kept in 8 bits, and whether they are signed."""

    def init(self, like: Tensor, shape: tuple[int, ...], rows: int) -> State:
        """The state for low-rank gradients of ``shape`` that belong to the parameter ``like``.

        ``rows`` is the dimension of ``shape`` along which the rows of the weight lie: -2, or -1 if it is the rows that
        are
        compressed.
        """

    def transfer_(self, state: State, change: Tensor, how: Transfer) -> None:
        """Carry the moments into the new basis; see ``Transfer``. Not called for ``keep``."""

    def first_moment(self, state: State) -> Momentum | None:
        """The first moment; ``None`` if there is none, or none that is a sum of gradients."""

    def update_(self, R: Tensor, state: State, rows: Rows = ALL_HERE) -> tuple[Tensor, Tensor]:
        """The direction ``U`` and the 0-d fp64 step-size factor that corrects it (bias correction, or one), on the CPU.

        ``R`` and the moments may be some of the rows of a matrix, or entries of a vector; ``rows`` adds up over all.

        Law: ``U`` is a fresh tensor, which the caller may overwrite. No branch on a tensor's value.
        """


class Residual(Protocol):
    """What becomes of the part of the gradient outside the subspace?"""

    def init(self, G: Tensor) -> State:
        """The state for gradients of the shape, dtype and device of ``G``."""

    def receive(self, G: Tensor, state: State) -> Tensor:
        """What every other part takes for the gradient: ``G``, or a fresh tensor."""

    def lose_(self, momentum: Tensor, state: State) -> None:
        """Momentum that a change of basis put outside the subspace, ``(m, n)``, as a gradient. Called if
        ``keeps_momentum``.
        """

    @property
    def keeps_momentum(self) -> bool:
        """Whether ``lose_`` wants to know."""

    @property
    def needs_orthonormal(self) -> bool:
        """Whether ``(I - Q Qᵀ) G`` must be what lies outside the subspace."""

    @property
    def needs_gradient(self) -> bool:
        """Whether it reads more of the gradient than ``R``. Law: if not, ``combine`` is ``(scale * U, None)``."""

    @property
    def takes_rows(self) -> bool:
        """Whether ``combine`` and the others serve where only some of the rows are here."""

    def combine(
        self,
        G: Tensor,
        R: Tensor,
        U: Tensor,
        scale: float,
        back: Callable[[Tensor], Tensor],
        state: State,
        rows: Rows = ALL_HERE,
    ) -> tuple[Tensor, Tensor | None]:
        """``A (..., m, r)`` and ``phi (..., m, 1)`` of the update ``D = back(A) + phi * G``, without ``phi`` ``D =
        back(A)``.

        ``back`` is the selector's ``project_back``. Law: ``A`` is a fresh tensor, or ``U``, which it may overwrite. The
        caller
        lifts both into a weight of the step's precision without a tensor of its size.
        """
