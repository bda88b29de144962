"""RSO's two conditions: its subspaces are unbiased, and its steps are small enough.

(1) ``E[Q Qᵀ] = I (n, n)``, so that ``E[G Q Qᵀ] = G``: for Haar columns times sqrt(n/r), and for normal entries of
variance 1/r.

(2) On ``f(X) = L ||X||² / 2``, X (m, n), one gradient step of size eta in each new subspace is

    X <- X (I - eta L Q Qᵀ)

With Haar columns ``Q Qᵀ`` is n/r times a projector, so with ``c = eta L n/r``

    E||X_next||² / ||X||² = 1 - r/n (1 - (1 - c)²)

which is below 1 exactly for ``0 < c < 2``. The paper's condition ``eta <= 1 / (2 L n/r)`` is c <= 1/2, well inside.

Source: RSO (Chen et al. 2025, arXiv 2502.07222): E[P Pᵀ] = I, and eta <= 1 / (2 L max(m_l / r_l)).
Deviations: one gradient step takes the place of the solution of the subproblem, which never diverges on a convex f.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from subspan import linalg
from subspan.optimizer import SubspaceOptimizer
from subspan.parts import Key, Selector
from subspan.residuals import Discard
from subspan.rules import SGD
from subspan.selectors import Gaussian, Random
from subspan.theory.experiment import DEVIATIONS, Claim, check, check_at_least, check_rank

SELECTORS: dict[str, Selector] = {"haar": Random(scaled=True), "gaussian": Gaussian()}


@dataclass(frozen=True)
class RsoUnbiased:
    """The mean of QQᵀ is I, and steps with eta <= 1 / (2 L n/r) converge where larger ones may diverge (RSO)."""

    n: int = 12
    """Number of columns. This side is compressed."""
    r: int = 3
    """Rank of the subspaces, below n."""
    m: int = 12
    """Number of rows."""
    smoothness: float = 4.0
    """Smoothness L of the quadratic."""
    draws: int = 20_000
    """Number of subspaces for the mean of Q Qᵀ."""
    steps: int = 400
    """Number of subspaces that a trajectory enters."""
    seed: int = 0
    """Random seed for the subspaces and the starts."""

    def __post_init__(self) -> None:
        check_rank(self.n, self.r)
        check_at_least(self.n, m=self.m)
        check_at_least(100, draws=self.draws)
        check_at_least(1, steps=self.steps)
        check("smoothness", self.smoothness, 0 < self.smoothness < math.inf, "a number above 0")

    def run(self) -> dict[str, Any]:
        """Test both conditions."""
        unbiased = {name: self.bias(selector) for name, selector in SELECTORS.items()}
        claims = [
            Claim(
                f"{name}: E[Q Qᵀ] = I",
                f"off by {z:.1f} standard errors at most, of {self.n**2} entries",
                z <= DEVIATIONS,
            )
            for name, (z, _) in unbiased.items()
        ]
        rows = []
        for c in (0.25, 0.5, 1.0, 1.9, 2.5, 4.0):
            rate, expected = self.rate(c), math.log(1 - self.r / self.n * (1 - (1 - c) ** 2))
            rows.append(
                {"c": c, "eta": c * self.r / (self.n * self.smoothness), "log_rate": rate, "log_mean": expected}
            )
            outcome = rate < 0 if c < 2 else rate > 0
            word = (
                "within the condition: converges" if c <= 0.5 else "beyond it: still converges" if c < 2 else "diverges"
            )
            claims.append(
                Claim(f"eta = {c:g} / (L n/r), {word}", f"log of ||X||² changes by {rate:+.3f} a step", outcome)
            )
        return {
            "settings": asdict(self),
            "bias": {name: {"largest_z": z, "largest_error": error} for name, (z, error) in unbiased.items()},
            "unit": "log_rate: mean change of log ||X||² in a step, in expectation at most log_mean (Jensen)",
            "rows": rows,
            "claims": [asdict(claim) for claim in claims],
            "holds": all(claim.holds for claim in claims),
        }

    def bias(self, selector: Selector) -> tuple[float, float]:
        """Return the largest error of an entry of the mean of ``Q Qᵀ``, in standard errors and in absolute terms."""
        G = torch.ones(self.m, self.n, dtype=torch.float64)
        eye = torch.eye(self.n, dtype=torch.float64)
        total, squares = torch.zeros_like(eye), torch.zeros_like(eye)
        largest = 2000
        for number, start in enumerate(range(0, self.draws, largest)):
            stack = G.expand(min(largest, self.draws - start), *G.shape)
            state = selector.init(stack, self.r)
            selector.refresh_(stack, state, Key(self.seed, "G", number))
            Q = selector.project(eye.expand(len(stack), -1, -1), state)
            P: Tensor = Q @ Q.mT
            total, squares = total + P.sum(0), squares + P.square().sum(0)
        mean, second = total / self.draws, squares / self.draws
        error = ((second - mean.square()) / self.draws).clamp_min(1e-24).sqrt()
        off = (mean - eye).abs()
        return float((off / error).max()), float(off.max())

    def rate(self, c: float) -> float:
        """Return the mean change of ``log ||X||²`` in a step of RSO with ``eta = c r / (n L)``, without momentum."""
        generator = linalg.keyed_generator("rso start", self.seed)
        X = torch.nn.Parameter(torch.randn(self.m, self.n, generator=generator, dtype=torch.float64))
        optimizer = SubspaceOptimizer(
            [X], c * self.r / (self.n * self.smoothness), self.r, selector=SELECTORS["haar"], rule=SGD(0.0), residual=Discard(),
            transfer="reset", update_proj_gap=1, scale=1.0, proj_type="right", seed=self.seed,
        )  # fmt: skip
        change = 0.0
        for _ in range(self.steps):
            before = float(X.detach().norm())
            X.grad = self.smoothness * X.detach()
            optimizer.step()
            after = float(X.detach().norm())
            change += 2 * math.log(after / before)
            X.data /= after  # f is quadratic: the rate does not depend on the size
        return change / self.steps
