"""A Gaussian subspace: ``Q (n, r)`` with entries ``N(0, 1/r)``, so that ``E[Q Qᵀ] = I``.

Only a seed is stored, from which every use draws ``Q`` again. The columns are not orthonormal: ``E[QᵀQ] = (n/r) I``. To
``rotate`` the moments therefore multiplies their squared norm by ``n/r`` on average, at each refresh. The period must
be long compared with the memory of the momentum, ``1 / (1 - beta1)`` steps.

Source: FLora (Hao et al. 2024, arXiv 2402.03293): a random down-projection, of which only the seed is stored.

Deviations from the paper:

- FLora projects only the momentum. Here the gradient is projected, and so every moment.
- The draw is keyed by the parameter's name and the step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from subspan import linalg
from subspan.linalg import Gram
from subspan.parts import Key
from subspan.selectors.base import Scheduled
from subspan.storage.allocation import State


@dataclass(frozen=True)
class Gaussian(Scheduled):
    """Independent normal entries. Only a seed is stored; each projection draws ``n * r`` numbers on the CPU."""

    @property
    def needs_gradient(self) -> bool:
        return False

    @property
    def orthonormal(self) -> bool:
        return False

    def init(self, G: Tensor, rank: int) -> State:
        # A seed of -1 says that there has been no refresh.
        return {"basis_seed": -1, "basis_rows": G.shape[-1], "basis_rank": rank}

    def refresh_(self, G: Tensor | Gram, state: State, key: Key) -> Tensor:
        old = self._basis(state, G)
        state["basis_seed"] = linalg.keyed_seed("gaussian", *key)
        return old.mT @ self._basis(state, G)

    def project(self, G: Tensor, state: State) -> Tensor:
        return linalg.project(G, self._basis(state, G))

    def project_back(self, R: Tensor, state: State) -> Tensor:
        return R @ self._basis(state, R).mT

    def _basis(self, state: State, like: Tensor | Gram) -> Tensor:
        """Return ``Q`` with the leading dimensions, device and precision (fp32 at least) of ``like``."""
        shape = (*like.shape[:-2], state["basis_rows"], state["basis_rank"])
        dtype = torch.promote_types(like.dtype, torch.float32)
        if state["basis_seed"] < 0:
            return torch.zeros(shape, dtype=dtype, device=like.device)
        generator = torch.Generator().manual_seed(state["basis_seed"])
        return (torch.randn(shape, generator=generator) / state["basis_rank"] ** 0.5).to(like.device, dtype)
