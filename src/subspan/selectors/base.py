"""The classes to derive a selector from.

    class              for a selector that                                    and write
    Scheduled          changes its basis only at refreshes                    init, refresh_, project, project_back
    MatrixSelector     also stores its basis as a matrix Q (n, r)             choose
    SpectralSelector   also looks at the singular vectors of the gradient     choose
    DrawnSelector      also draws its basis among these singular vectors      draw
    TrackingSelector   stores a matrix too, and moves it at every step        track_

A selector is a frozen dataclass, and its fields are its settings. What changes lives in the state that ``init``
allocates. The laws that each method obeys are in ``parts.Selector``. The most important one: a new basis depends only
on the gradient, the state and the key. A class that forgets a method fails when it is constructed, and the error names
the method. "Adding a selector" in the documentation has a complete example.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from subspan import linalg
from subspan.linalg import Gram
from subspan.parts import Key, Momentum, Selector
from subspan.storage.allocation import State, allocate
from subspan.utils.errors import SettingError


class Scheduled(Selector, ABC):
    """A selector that changes its basis only at refreshes, and looks at the gradient then.

    A subclass writes ``init``, ``refresh_``, ``project`` and ``project_back``. It overrides ``needs_gradient`` if it
    only draws, ``takes_gram`` if the Gram matrix of the gradient is enough for it, and ``orthonormal`` if its basis
    is not. ``subtract_`` makes a tensor of the size of the weight; a selector that can do without overrides it too.
    """

    @property
    def needs_gradient(self) -> bool:
        return True

    @property
    def takes_gram(self) -> bool:
        return False

    @property
    def orthonormal(self) -> bool:
        return True

    @property
    def tracks(self) -> bool:
        return False

    def period(self, gap: int, state: State) -> int | None:
        return gap

    def track_(self, G: Tensor, state: State, momentum: Momentum | None) -> Tensor | None:
        return None

    @abstractmethod
    def project_back(self, R: Tensor, state: State) -> Tensor:
        """Map ``(m, r) -> (m, n)``, into a fresh tensor: the adjoint of ``project``."""

    def subtract_(self, W: Tensor, R: Tensor, state: State) -> None:
        W.sub_(self.project_back(R, state))


class MatrixSelector(Scheduled):
    """A selector that stores its basis as a matrix ``Q (n, r)``; a subclass writes ``choose``.

    The matrix is ``state["basis"]``, in fp32 at least. It is zero until the first refresh.
    """

    def init(self, G: Tensor, rank: int) -> State:
        return {"basis": allocate(G, (*G.shape[:-2], G.shape[-1], rank))}

    @abstractmethod
    def choose(self, G: Tensor | Gram, old: Tensor, key: Key) -> Tensor:
        """Return a new basis in the shape of ``old``, the basis that it replaces.

        ``G`` is finite and not entirely zero; it is a ``Gram`` only if ``takes_gram``. Before the first refresh ``old``
        is zero. Random numbers come from ``linalg.keyed_generator("a word of its own", *key)`` and from nowhere else,
        so that every rank draws the same.
        """

    def refresh_(self, G: Tensor | Gram, state: State, key: Key) -> Tensor:
        old = state["basis"].clone()
        new = self.choose(G, old, key).to(old.dtype)
        # An expert that saw no token keeps its basis, if it has one.
        if not isinstance(G, Gram) and G.ndim > 2 and self.needs_gradient:
            idle = (G == 0).flatten(-2).all(-1) & (old != 0).flatten(-2).any(-1)
            new = torch.where(idle[..., None, None], old, new)
        state["basis"].copy_(new)
        return old.mT @ state["basis"]

    def project(self, G: Tensor, state: State) -> Tensor:
        return linalg.project(G, state["basis"])

    def project_back(self, R: Tensor, state: State) -> Tensor:
        return R @ state["basis"].mT

    def subtract_(self, W: Tensor, R: Tensor, state: State) -> None:
        if W.ndim == 2 and W.dtype == R.dtype:
            W.addmm_(R, state["basis"].mT, alpha=-1)
        else:
            super().subtract_(W, R, state)


class TrackingSelector(MatrixSelector):
    """A selector that moves its basis at every step; a subclass writes ``track_``.

    The basis starts from the leading singular vectors of the first gradient. There is no other refresh.
    """

    @property
    def tracks(self) -> bool:
        return True

    def period(self, gap: int, state: State) -> int | None:
        return None

    def choose(self, G: Tensor | Gram, old: Tensor, key: Key) -> Tensor:
        return leading(G, old)


class SpectralSelector(MatrixSelector):
    """A selector that looks at the singular vectors of the gradient; a subclass writes ``choose``.

    The subclass is a dataclass with the field ``method``, which it hands to ``linalg.right_singular``. If it has a
    ``__post_init__`` of its own, that calls this one.
    """

    method: str

    def __post_init__(self) -> None:
        if self.method not in ("gram", "svd"):
            raise SettingError(
                f"method={self.method!r}: expected 'gram' (eigh of the Gram matrix) or 'svd' (slower; for comparison)"
            )

    @property
    def takes_gram(self) -> bool:
        return self.method == "gram"


class DrawnSelector(SpectralSelector):
    """A selector that draws its basis among the singular vectors, ``Q = V[:, I]``; a subclass writes ``draw``."""

    @abstractmethod
    def draw(self, sigma: Tensor, r: int, key: Key) -> Tensor:
        """Return the indices ``I (..., r)``, ascending and on the CPU, of the singular vectors to keep.

        ``sigma (..., k)`` are the singular values in descending order. Random numbers come from the key, as in
        ``choose``.
        """

    def choose(self, G: Tensor | Gram, old: Tensor, key: Key) -> Tensor:
        sigma, V = linalg.right_singular(G, self.method)
        return linalg.fix_signs(columns(V, self.draw(sigma, old.shape[-1], key)), old)


def with_entry(state: State, name: str, value: int) -> State:
    """Return the state of the selectors that a selector is made of, with an entry of its own.

    Raises:
        SettingError: one of them has an entry of this name.
    """
    if name in state:
        raise SettingError(
            f"selector: its state entry {name!r} belongs to what holds it; give it another name in init()"
        )
    return {**state, name: value}


def leading(G: Tensor | Gram, old: Tensor, method: str = "gram") -> Tensor:
    """Return as many leading right singular vectors of ``G`` as ``old`` has columns, with the signs of those."""
    _, V = linalg.right_singular(G, method)
    return linalg.fix_signs(V[..., : old.shape[-1]], old)


def columns(V: Tensor, index: Tensor) -> Tensor:
    """Return the columns ``index (..., r)`` of ``V (..., n, k)``."""
    index = index.to(V.device).unsqueeze(-2).expand(*V.shape[:-1], index.shape[-1])
    return torch.gather(V, -1, index)
