"""What every selector with a stored matrix for a basis shares."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from subspan import linalg
from subspan.linalg import Gram
from subspan.parts import Key, Momentum, Selector
from subspan.storage.allocation import State, allocate
from subspan.utils.errors import SettingError


class Scheduled(Selector, ABC):
    """What every selector shares that moves at its refreshes alone, and looks at the gradient then."""

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
        """See ``parts.Selector``."""

    def subtract_(self, W: Tensor, R: Tensor, state: State) -> None:
        W.sub_(self.project_back(R, state))


class MatrixSelector(Scheduled):
    """Keeps the basis as a matrix ``Q (n, r)``; a subclass chooses it."""

    def init(self, G: Tensor, rank: int) -> State:
        return {"basis": allocate(G, (*G.shape[:-2], G.shape[-1], rank))}

    @abstractmethod
    def choose(self, G: Tensor | Gram, old: Tensor, key: Key) -> Tensor:
        """A new basis in the shape of ``old``, which is all zero before the first refresh."""

    def refresh_(self, G: Tensor | Gram, state: State, key: Key) -> Tensor:
        old = state["basis"].clone()
        new = self.choose(G, old, key).to(old.dtype)
        if (
            not isinstance(G, Gram) and G.ndim > 2 and self.needs_gradient
        ):  # an expert that saw no token keeps what it has, if it has anything
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
    """Starts from the leading singular vectors and moves at every step; a subclass says how, in ``track_``."""

    @property
    def tracks(self) -> bool:
        return True

    def period(self, gap: int, state: State) -> int | None:
        return None

    def choose(self, G: Tensor | Gram, old: Tensor, key: Key) -> Tensor:
        return leading(G, old)


class SpectralSelector(MatrixSelector):
    """Chooses among the singular vectors of the gradient; a subclass is a dataclass with the field ``method``."""

    method: str

    def __post_init__(self) -> None:
        if self.method not in ("gram", "svd"):
            raise SettingError(
                f"method={self.method!r}: expected 'gram' (eigh of the Gram matrix) or 'svd' (the slow reference)"
            )

    @property
    def takes_gram(self) -> bool:
        return self.method == "gram"


class DrawnSelector(SpectralSelector):
    """``Q = V[:, I]``: draws which singular vectors; a subclass says how, in ``draw``."""

    @abstractmethod
    def draw(self, sigma: Tensor, r: int, key: Key) -> Tensor:
        """Indices ``I (..., r)``, ascending, of singular values ``sigma (..., k)``, which fall. On the CPU."""

    def choose(self, G: Tensor | Gram, old: Tensor, key: Key) -> Tensor:
        sigma, V = linalg.right_singular(G, self.method)
        return linalg.fix_signs(columns(V, self.draw(sigma, old.shape[-1], key)), old)


def leading(G: Tensor | Gram, old: Tensor, method: str = "gram") -> Tensor:
    """The leading right singular vectors of ``G``, as many as ``old`` has columns, and with their signs."""
    _, V = linalg.right_singular(G, method)
    return linalg.fix_signs(V[..., : old.shape[-1]], old)


def columns(V: Tensor, index: Tensor) -> Tensor:
    """Columns ``index (..., r)`` of ``V (..., n, k)``."""
    index = index.to(V.device).unsqueeze(-2).expand(*V.shape[:-1], index.shape[-1])
    return torch.gather(V, -1, index)
