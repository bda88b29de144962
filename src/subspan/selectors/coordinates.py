"""Chooses ``r`` columns of the gradient: to project gathers them, and to project back scatters them.

No matrices are multiplied. The basis is

    Q = [e_i for i in I] diag(rho)

The indices ``I`` are sorted ascending. ``sample`` says how they are chosen from the column norms ``c_i = ||G_i||``:

    uniform  drawn without replacement, each column with the same probability
    top      the r columns with the largest c_i
    norm     drawn one after another without replacement, with probability q_i = c_i^power / sum_j c_j^power

``rho`` is 1. With ``scaled`` the indices are drawn with replacement, and ``rho_i = 1 / sqrt(r q_i)``, so that
``E[Q Qᵀ] = I``.

Sources: GoLore (He et al. 2024, arXiv 2410.11289) has GaSare (``top``) and GoSare (``uniform``). GRASS (Muhamed et al.
2024, arXiv 2406.17660) has ``top``, and ``norm`` with ``power=2, scaled=True``.

Deviations:

- GaSare and GoSare mask single entries. Here a mask covers whole columns, so that the state is a matrix like any other.
- GRASS has no published code. This is written from its equations.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from subspan import linalg
from subspan.linalg import Gram
from subspan.parts import Key
from subspan.selectors.base import Scheduled
from subspan.storage.allocation import State
from subspan.utils.checks import LARGEST, is_factor
from subspan.utils.errors import SettingError

_SAMPLES = ("uniform", "top", "norm")


@dataclass(frozen=True)
class Coordinates(Scheduled):
    """Columns of the oriented gradient.

    Args:
        sample: ``"uniform"``, ``"top"`` or ``"norm"``.
        power: exponent of the column norms, >= 0; only for ``"norm"``.
        scaled: whether to draw with replacement and scale to ``E[Q Qᵀ] = I``; not for ``"top"``.
    """

    sample: Literal["uniform", "top", "norm"] = "uniform"
    power: float = 2.0
    scaled: bool = False

    def __post_init__(self) -> None:
        if self.sample not in _SAMPLES:
            raise SettingError(f"sample={self.sample!r}: expected one of {', '.join(_SAMPLES)}")
        if not is_factor(self.power):
            raise SettingError(f"power={self.power!r}: expected a number from 0 to {LARGEST:g} (2 is GRASS)")
        if self.scaled and self.sample == "top":
            raise SettingError(
                "scaled=True: the top columns are not drawn, so they have no probability to be scaled by; use 'norm'"
            )

    @property
    def needs_gradient(self) -> bool:
        return self.sample != "uniform"

    @property
    def takes_gram(self) -> bool:
        return True

    @property
    def orthonormal(self) -> bool:
        return not self.scaled

    def init(self, G: Tensor, rank: int) -> State:
        # The first columns, until the first refresh chooses.
        index = torch.arange(rank, device=G.device).expand(*G.shape[:-2], rank).clone()
        state: State = {"indices": index, "columns": G.shape[-1]}
        if self.scaled:
            state["weights"] = torch.ones(
                index.shape, device=G.device, dtype=torch.promote_types(G.dtype, torch.float32)
            )
        return state

    def refresh_(self, G: Tensor | Gram, state: State, key: Key) -> Tensor:
        old = {name: state[name].clone() for name in ("indices", "weights") if name in state}
        norms = linalg.column_norms(G).cpu()
        index, weights = self._choose(norms, old["indices"].shape[-1], key)
        idle = (norms == 0).all(-1, keepdim=True).to(G.device) if self.needs_gradient else torch.tensor(False)
        state["indices"].copy_(torch.where(idle, old["indices"], index.to(G.device)))
        if self.scaled:
            state["weights"].copy_(torch.where(idle, old["weights"], weights.to(G.device)))
        change = old["indices"].unsqueeze(-1) == state["indices"].unsqueeze(-2)
        change = change.to(torch.promote_types(G.dtype, torch.float32))
        if self.scaled:
            change = change * old["weights"].unsqueeze(-1) * state["weights"].unsqueeze(-2)
        return change

    def _choose(self, norms: Tensor, rank: int, key: Key) -> tuple[Tensor, Tensor]:
        """Return indices, ascending, and ``rho``, both ``(..., r)``, given the column norms ``(..., n)``."""
        if self.sample == "top":
            index = norms.sort(dim=-1, descending=True, stable=True).indices[..., :rank]
            return index.sort(-1).values, torch.ones(())
        generator = linalg.keyed_generator("coordinates", *key)
        log_q = torch.xlogy(0.0 if self.sample == "uniform" else self.power, norms)
        if not self.scaled:
            return linalg.sample_without_replacement(log_q, rank, generator), torch.ones(())
        # A column of norm zero is never drawn; if all are zero, they are equally likely.
        q = (log_q - log_q.amax(-1, keepdim=True)).exp().nan_to_num(1.0)
        q = q / q.sum(-1, keepdim=True)
        index = torch.multinomial(q.flatten(0, -2) if q.ndim > 1 else q, rank, replacement=True, generator=generator)
        index = index.reshape(*norms.shape[:-1], rank).sort(-1).values
        return index, (rank * q.gather(-1, index)).rsqrt()

    def project(self, G: Tensor, state: State) -> Tensor:
        R = G.gather(-1, self._index(G, state)).to(torch.promote_types(G.dtype, torch.float32))
        return R * state["weights"].unsqueeze(-2) if self.scaled else R

    def project_back(self, R: Tensor, state: State) -> Tensor:
        D = torch.zeros(*R.shape[:-1], state["columns"], dtype=R.dtype, device=R.device)
        if self.scaled:  # a column may have been drawn twice
            return D.scatter_add_(-1, self._index(R, state), R * state["weights"].unsqueeze(-2))
        return D.scatter_(-1, self._index(R, state), R)

    def _index(self, A: Tensor, state: State) -> Tensor:
        index: Tensor = state["indices"]
        return index.unsqueeze(-2).expand(*A.shape[:-1], index.shape[-1])
