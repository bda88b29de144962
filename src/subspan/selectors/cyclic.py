"""Chooses ``r`` singular vectors of the gradient in turn: ``ceil(k / r)`` refreshes, a cycle, visit every one of
them.

With ``G = S diag(sigma) Vᵀ (m, n)``, ``sigma`` descending, and ``k = min(m, n)``: each cycle draws a permutation ``pi``
of the ``k`` places of the spectrum. Its refresh number ``t`` takes the next ``r`` of them:

    Q = V[:, I],    I = { pi[(t r + j) mod k] : 0 <= j < r },    sorted ascending

Uniform sampling visits each place on average. Here this is certain: no place waits for more than two cycles. Where
``r`` does not divide ``k``, the last refresh of a cycle also takes the first places of ``pi``.

Source: sampling without replacement over time (random reshuffling), in place of SARA's weighted draw (Zhang et al.
2025, arXiv 2502.05790, Alg. 2).

Deviations: none, since no paper has this selector.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from subspan import linalg
from subspan.linalg import Gram
from subspan.parts import Key
from subspan.selectors.base import DrawnSelector
from subspan.storage.allocation import State


@dataclass(frozen=True)
class Cyclic(DrawnSelector):
    """Singular vectors in turn.

    Args:
        method: ``"gram"`` or ``"svd"``, see ``linalg.right_singular``.
    """

    method: str = "gram"

    def init(self, G: Tensor, rank: int) -> State:
        return {**super().init(G, rank), "turn": 0}

    def refresh_(self, G: Tensor | Gram, state: State, key: Key) -> Tensor:
        # The draw depends on the number of the refresh, and not on the step.
        change = super().refresh_(G, state, key._replace(step=state["turn"]))
        state["turn"] += 1
        return change

    def draw(self, sigma: Tensor, r: int, key: Key) -> Tensor:
        k = sigma.shape[-1]
        cycle, turn = divmod(key.step, -(-k // r))
        generator = linalg.keyed_generator("cyclic", key.seed, key.name, cycle)
        order = torch.rand(sigma.shape, generator=generator, dtype=torch.float64).argsort(-1)
        return order[..., (turn * r + torch.arange(r)) % k].sort(-1).values
