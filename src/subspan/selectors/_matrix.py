"""What every selector with a dense orthonormal basis shares."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from subspan import linalg
from subspan.parts import Key
from subspan.state import State, allocate


class MatrixSelector(ABC):
    """Keeps the basis as a matrix ``Q (n, r)`` with orthonormal columns; a subclass chooses it."""

    @property
    def needs_gradient(self) -> bool:
        return True

    def init(self, G: Tensor, rank: int) -> State:
        return {"basis": allocate(G, (*G.shape[:-2], G.shape[-1], rank))}

    @abstractmethod
    def choose(self, G: Tensor, old: Tensor, key: Key) -> Tensor:
        """A new basis in the shape of ``old``, which is all zero before the first refresh."""

    def refresh_(self, G: Tensor, state: State, key: Key) -> Tensor:
        old = state["basis"].clone()
        state["basis"].copy_(self.choose(G, old, key))
        return old.mT @ state["basis"]

    def project(self, G: Tensor, state: State) -> Tensor:
        return linalg.project(G, state["basis"])

    def project_back(self, R: Tensor, state: State) -> Tensor:
        return R @ state["basis"].mT


def check_method(method: str) -> None:
    if method not in ("gram", "svd"):
        raise ValueError(f"method={method!r}: expected 'gram' (eigh of the Gram matrix) or 'svd' (the slow reference)")


def columns(V: Tensor, index: Tensor) -> Tensor:
    """Columns ``index (..., r)`` of ``V (..., n, k)``."""
    index = index.to(V.device).unsqueeze(-2).expand(*V.shape[:-1], index.shape[-1])
    return torch.gather(V, -1, index)
