"""A basis that follows the gradient: at every step, one step of gradient descent on the reconstruction error.

    L(Q)  = ||Ĝ Q Qᵀ - Ĝ||²,   Ĝ = G / ||G||                     Y = Ĝ Q
    dL/dQ = 2 (Q YᵀY + ĜᵀY (QᵀQ - 2 I))
    Q <- orth(Q - lr * Adam(dL/dQ))

The first basis is that of the leading singular vectors.

Source: Online Subspace Descent (Liang et al. 2024, arXiv 2408.12857); "online PCA" in SARA's table 3.

Deviations from the published code:

- The basis is orthonormalised again after each step. The code leaves this out, and its columns drift together. Its
  literal form is ``orthonormalise=False, weight_decay=0.01``; this decay is the default of its inner optimizer.
- The inner learning rate is constant. The code multiplies ``1 / period`` by the schedule of the outer learning rate.
- The basis moves before the gradient is projected, and not after.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from subspan import linalg
from subspan.parts import Momentum, check_betas
from subspan.selectors.base import TrackingSelector
from subspan.storage.allocation import State, allocate
from subspan.utils.checks import LARGEST, is_factor
from subspan.utils.errors import SettingError


@dataclass(frozen=True)
class OnlinePCA(TrackingSelector):
    """Adam on the basis.

    Args:
        lr: learning rate of the basis, >= 0. The published code has one over its period, which is 200.
        betas: decay of the two moments of the basis, each in [0, 1).
        weight_decay: decoupled decay of the basis, >= 0.
        orthonormalise: whether the basis is made orthonormal after each step.
    """

    lr: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    orthonormalise: bool = True

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if not is_factor(value):
                raise SettingError(f"{name}={value!r}: expected a number from 0 to {LARGEST:g}")
        check_betas(self.betas)

    @property
    def orthonormal(self) -> bool:
        return self.orthonormalise

    def init(self, G: Tensor, rank: int) -> State:
        shape = (*G.shape[:-2], G.shape[-1], rank)
        moments = {"basis_exp_avg": allocate(G, shape), "basis_exp_avg_sq": allocate(G, shape)}
        # A tensor with one count for each matrix: unusable gradients are not counted, and no device is waited for.
        return {**super().init(G, rank), **moments, "basis_step": allocate(G, (*G.shape[:-2], 1, 1))}

    def track_(self, G: Tensor, state: State, momentum: Momentum | None) -> Tensor | None:
        beta1, beta2 = self.betas
        Q, M, V = (state[name] for name in ("basis", "basis_exp_avg", "basis_exp_avg_sq"))
        good = linalg.usable(G)
        slope = self.slope(G, Q)
        step = state["basis_step"].add_(good)
        c1, c2 = (self.correction(beta, step).to(Q.dtype) for beta in self.betas)
        M.copy_(torch.where(good, beta1 * M + (1 - beta1) * slope, M))
        V.copy_(torch.where(good, beta2 * V + (1 - beta2) * slope.square(), V))
        new = Q * (1 - self.lr * self.weight_decay) - self.lr * (M / c1) / ((V / c2).sqrt() + 1e-8)
        if self.orthonormalise:
            new = linalg.orthonormalise(new)
        old = Q.clone()
        Q.copy_(torch.where(good, new, Q))
        return old.mT @ Q

    @staticmethod
    def correction(beta: float, step: Tensor) -> Tensor:
        """Return ``1 - beta^step``, in fp64 on the CPU, and to the precision of fp32 where there may be no fp64."""
        if step.device.type == "cpu":
            return 1 - beta ** step.double()
        return -torch.expm1(step * math.log(beta)) if beta > 0 else torch.where(step > 0, 1.0, 0.0)

    @staticmethod
    def slope(G: Tensor, Q: Tensor) -> Tensor:
        """Return ``dL/dQ (n, r)``."""
        Y = linalg.project(G, Q)
        norms, unit = linalg.scaled_norm(G, (-2, -1))  # the square of a small gradient would underflow
        norm = (norms * unit).to(Q.dtype)[..., None, None]
        A = Q.mT @ Q
        A.diagonal(dim1=-2, dim2=-1).sub_(2)
        Y = Y / norm
        return 2 * (Q @ (Y.mT @ Y) + linalg.project(G.mT, Y / norm) @ A)
