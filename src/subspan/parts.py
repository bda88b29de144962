"""The parts of a step, as protocols. The optimizer knows only these; ``recipes`` binds them to concrete classes.

Shapes: oriented gradient ``G (..., m, n)``, basis ``Q (..., n, r)``, low-rank gradient ``R = G Q (..., m, r)``, update
inside the subspace ``U (..., m, r)``. The side to compress is last. Leading dimensions are a stack of matrices, such as
experts.

A part is a frozen dataclass that derives from its protocol and holds only settings. What changes lives in the ``State``
of a parameter, which is allocated when the optimizer is built, changed in place, and passed in. Every member of a
protocol is abstract: a part that forgets one fails when it is constructed, with the name of what is missing.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import Field, is_dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor

from subspan.linalg import Gram
from subspan.storage.allocation import State
from subspan.utils.checks import is_number
from subspan.utils.errors import SettingError

Transfer = Literal["keep", "rotate", "moments", "reset"]
"""What becomes of the moments when the basis changes, with ``C = Q_oldᵀ Q_new (r, r)``:

- ``keep``: nothing (GaLore; SARA, Algorithm 1): the coordinates are reused as they are;
- ``rotate``: the first moment is re-projected, ``M <- M C`` (GoLore's momentum projection; the theory of SARA);
- ``moments``: both moments are transported (LDAdam);
- ``reset``: moments and step count start over (RSO, FRUGAL, GRASS).
"""


class Rows:
    """The rows of a matrix, all of them on this rank. ``distributed`` has a subclass for rows that are sharded.

    A part that sums over rows asks this object, and needs to know nothing of ranks.
    """

    def total(self, A: Tensor) -> Tensor:
        """Turn ``A``, a sum over the local rows, into the sum over all rows."""
        return A

    def count(self, local: int) -> int:
        """Return the number of all rows, ``local`` of which are on this rank."""
        return local


ALL_HERE = Rows()


class Key(NamedTuple):
    """What a draw may depend on besides the gradient and the state. The same key gives the same draw on every rank and
    device.
    """

    seed: int
    name: str
    """Name of the parameter."""
    step: int
    """How many steps the optimizer had taken when the basis, or the sketch, fell due."""


class Momentum(NamedTuple):
    """The first moment of a rule, for the parts of LDAdam, which look at it."""

    value: Tensor
    """``M (m, r)``, in the coordinates of the present basis."""
    mean: Tensor
    """The average of past ``R`` that ``M`` stands for, ``M / (1 - beta1^step)``; zero before the first step."""
    weight: float
    """The gradient that would leave ``M`` to later steps is ``weight * M``: ``decay / gain`` of ``M <- decay M + gain
    R``."""


class Selector(Protocol):
    """Which subspace? ``selectors.base`` has what most selectors share."""

    @property
    @abstractmethod
    def needs_gradient(self) -> bool:
        """False if neither ``refresh_`` nor ``track_`` reads more of ``G`` than its shape."""

    @property
    @abstractmethod
    def takes_gram(self) -> bool:
        """Whether ``refresh_`` also takes the Gram matrix of ``G``, which is all there is where rows are sharded."""

    @property
    @abstractmethod
    def orthonormal(self) -> bool:
        """Whether ``QᵀQ = I``, so that ``Q Qᵀ`` is a projection."""

    @property
    @abstractmethod
    def tracks(self) -> bool:
        """Whether the basis also moves at steps without a refresh, and so needs every gradient."""

    @abstractmethod
    def init(self, G: Tensor, rank: int) -> State:
        """Allocate the state for gradients of the shape, dtype and device of ``G``."""

    @abstractmethod
    def period(self, gap: int, state: State) -> int | None:
        """Return the steps between refreshes, given the group's ``update_proj_gap``; ``None`` for only one refresh."""

    @abstractmethod
    def refresh_(self, G: Tensor | Gram, state: State, key: Key) -> Tensor:
        """Choose a new basis, store it in ``state`` and return the change ``Q_oldᵀ Q_new (r, r)``. It may wait for the
        device.

        ``G`` is finite and not entirely zero. Law: the result depends only on ``G``, ``state`` and ``key``. If it
        raises, ``state`` is unchanged.
        """

    @abstractmethod
    def track_(self, G: Tensor, state: State, momentum: Momentum | None) -> Tensor | None:
        """Move the basis at a step without a refresh; return the change, or ``None`` if this selector does not move it.

        Law: it never waits for the device, and a ``G`` that is zero or not finite changes nothing.
        """

    @abstractmethod
    def project(self, G: Tensor, state: State) -> Tensor:
        """Map ``(m, n) -> (m, r)``. Law: linear in ``G``."""

    @abstractmethod
    def project_back(self, R: Tensor, state: State) -> Tensor:
        """Map ``(m, r) -> (m, n)``, into a fresh tensor. Law: the adjoint of ``project``."""

    @abstractmethod
    def subtract_(self, W: Tensor, R: Tensor, state: State) -> None:
        """Compute ``W <- W - project_back(R)``, without another tensor of the size of ``W`` if that is possible."""


class Rule(Protocol):
    """Which step inside the subspace? A rule's fields become keys of the parameter groups, where schedulers can change
    them.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    @abstractmethod
    def moments(self) -> Mapping[str, bool]:
        """The entries of the state that may be kept in 8 bits, and whether they are signed."""

    @abstractmethod
    def init(self, like: Tensor, shape: tuple[int, ...], row_dim: int) -> State:
        """Allocate the state for low-rank gradients of ``shape`` that belong to the parameter ``like``.

        ``row_dim`` is the dimension of ``shape`` along which the rows of the weight lie: -2, or -1 if it is the rows
        that are compressed.
        """

    @abstractmethod
    def transfer_(self, state: State, change: Tensor, how: Transfer) -> None:
        """Carry the moments into the new basis; see ``Transfer``. Not called for ``keep``."""

    @abstractmethod
    def first_moment(self, state: State) -> Momentum | None:
        """Return the first moment; ``None`` if there is none, or none that is a sum of gradients."""

    @abstractmethod
    def update_(self, R: Tensor, state: State, rows: Rows = ALL_HERE) -> tuple[Tensor, Tensor]:
        """Return the direction ``U`` and the 0-d fp64 step-size factor that corrects it (bias correction, or one), on
        the CPU.

        ``R`` and the moments may be some of the rows of a matrix, or entries of a vector; ``rows`` sums over all.

        Law: ``U`` is a fresh tensor, which the caller may overwrite. No branch on a tensor's value.
        """


class Residual(Protocol):
    """What becomes of the part of the gradient outside the subspace? ``residuals.base`` has defaults."""

    @abstractmethod
    def init(self, G: Tensor) -> State:
        """Allocate the state for gradients of the shape, dtype and device of ``G``."""

    @abstractmethod
    def receive(self, G: Tensor, state: State) -> Tensor:
        """Return what every other part takes for the gradient: ``G``, or a fresh tensor."""

    @abstractmethod
    def lose_(self, momentum: Tensor, state: State) -> None:
        """Take momentum ``(m, n)`` that a change of basis put outside the subspace, as a gradient. Called if
        ``keeps_momentum``.
        """

    @property
    @abstractmethod
    def keeps_momentum(self) -> bool:
        """Whether ``lose_`` wants to know."""

    @property
    @abstractmethod
    def needs_orthonormal(self) -> bool:
        """Whether ``(I - Q Qᵀ) G`` must be what lies outside the subspace."""

    @property
    @abstractmethod
    def needs_gradient(self) -> bool:
        """Whether it reads all of the gradient. Law: if it does not, and has no sketch, ``combine`` is ``(scale * U,
        None)``.
        """

    @abstractmethod
    def sketch_width(self, columns: int, rank: int) -> int:
        """Return the number ``s`` of directions outside the basis in which it looks at a gradient with ``columns``
        columns; 0 if it has no sketch. Law: at most ``columns - rank``, and 0 if it ``needs_gradient``.
        """

    @abstractmethod
    def sketch(self, like: Tensor, rank: int, outside: Callable[[Tensor], Tensor], key: Key) -> Tensor:
        """Draw the directions ``O (..., n, s)`` of one step, in the shape, dtype and device of ``like``. Called if
        ``sketch_width`` is not 0.

        ``outside`` maps ``(..., k, n)`` to what of it lies outside the basis. Law: ``Qᵀ O = 0``. The result depends
        only on the basis and the key, so that all ranks and all micro-batches of a step have the same.
        """

    @abstractmethod
    def sketch_axes(self, columns: int, rank: int, key: Key) -> tuple[Tensor, float] | None:
        """Return the axes ``(s,)`` and the factor ``c`` of the directions of one matrix, or ``None``.

        Law: where it is not ``None``, ``sketch`` with this key gives ``O = c (I - Q Qᵀ) E``, with these columns of the
        identity for ``E``. Then ``G O`` takes a gather and a small product.
        """

    @property
    @abstractmethod
    def takes_rows(self) -> bool:
        """Whether ``combine`` and the other methods also serve where only some of the rows are on this rank."""

    @abstractmethod
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
        """Return ``A (..., m, r)`` and ``phi (..., m, 1)`` of the update ``D = back(A) + phi * G``; without ``phi`` it
        is ``D = back(A)``.

        A residual with a sketch gets ``T = G O (..., m, s)`` for ``G``, and the update is ``D = back(A) + (phi * T)
        Oᵀ``.

        ``back`` is the selector's ``project_back``. Law: ``A`` is a fresh tensor, or ``U``, which it may overwrite. The
        caller lifts both into a weight of the step's precision without a tensor of its size.
        """


def check_part(value: object, kind: type, argument: str, example: str) -> None:
    """Raise unless ``value`` is a part of this ``kind``, complete and given as an object.

    A part that derives from its protocol is complete once it is constructed; one that only looks like a part is asked
    for each member.
    """
    if isinstance(value, type) or not is_dataclass(value):
        raise SettingError(f"{argument}={value!r}: expected a {kind.__name__.lower()}, such as subspan.{example}")
    missing = [name for name in sorted(kind.__abstractmethods__) if not hasattr(value, name)]  # type: ignore[attr-defined]
    if missing:
        raise SettingError(
            f"{argument}={value!r}: {type(value).__name__} has no {', '.join(missing)}; expected a "
            f"{kind.__name__.lower()}, such as subspan.{example}: derive from subspan.parts.{kind.__name__}"
        )


def check_selector(value: object, argument: str) -> None:
    """Raise unless ``value`` is a selector."""
    check_part(value, Selector, argument, "selectors.Importance()")


def holds(part: object, kind: type) -> bool:
    """Tell whether ``part`` is of this kind, or made of such a part."""
    inner = vars(part).values() if is_dataclass(part) else ()
    return isinstance(part, kind) or any(is_dataclass(value) and holds(value, kind) for value in inner)


def check_betas(betas: object) -> None:
    """Raise unless ``betas`` are two rates of decay."""
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not pair or not all(is_number(beta) and 0 <= beta < 1 for beta in betas):  # type: ignore[attr-defined]
        raise SettingError(f"betas={betas!r}: expected two numbers, each at least 0 and below 1, such as (0.9, 0.999)")
