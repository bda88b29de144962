"""How far the momentum of a moving subspace stays from the gradient, by what becomes of it at a refresh.

A gradient that turns, ``grad(t) = cos(2 pi t / turn) A + sin(2 pi t / turn) B (m, n)``, is seen with noise of energy
``sigma²``; its own energy is 1. An optimizer of the library follows it without moving anything. With ``Mt = M Qᵀ`` its
momentum in full,

    error = mean over t of ||Mt - grad(t)||² / ||grad(t)||²

which is the left side of the lemma over its scale. After a refresh from ``Q_old`` to ``Q_new`` the momentum is

    keep      M Q_newᵀ                  coordinates of one basis read in another
    rotate    M Q_oldᵀ Q_new Q_newᵀ     the part that lies in both
    reset     0

With one moment ``moments`` is ``rotate``.

Source: SARA (Zhang et al. 2025, arXiv 2502.05790), Lemma A.4, about MSGD with momentum re-projection (rotate).
Deviations: the gradient is given, and is not that of a trajectory; so the error is only that of the momentum.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from subspan import linalg
from subspan.optimizer import SubspaceOptimizer
from subspan.parts import Transfer
from subspan.residuals import Discard
from subspan.rules import MSGD
from subspan.selectors import Dominant, Importance, Random
from subspan.theory.experiment import Claim, check, check_at_least, check_rank

SELECTORS = {"random": Random(), "importance": Importance(), "dominant": Dominant()}
TRANSFERS: tuple[Transfer, ...] = ("keep", "rotate", "moments", "reset")


@dataclass(frozen=True)
class Momentum:
    """Re-projected momentum stays nearer to a slowly turning gradient than momentum kept or reset (SARA, Lemma A.4)."""

    n: int = 16
    """Number of columns of the gradient. This side is compressed."""
    r: int = 4
    """Rank of the subspaces, below n."""
    m: int = 24
    """Number of rows of the gradient."""
    sigma: float = 0.5
    """Size of the noise divided by that of the signal."""
    turn: int = 2000
    """Number of steps in which the gradient turns once."""
    periods: tuple[int, int] = (20, 200)
    """Steps between refreshes: a short and a long one."""
    beta1: float = 0.1
    """Weight of the new gradient in the momentum."""
    steps: int = 4000
    """Number of steps for each row of the table."""
    seed: int = 0
    """Random seed for the gradients, the noise and the subspaces."""

    def __post_init__(self) -> None:
        check_rank(self.n, self.r)
        check_at_least(self.n, m=self.m)
        check_at_least(2, turn=self.turn, steps=self.steps)
        check("sigma", self.sigma, 0 <= self.sigma < math.inf, "a number >= 0")
        check("beta1", self.beta1, 0 < self.beta1 < 1, "a number above 0 and below 1")
        rising = len(self.periods) == 2 and 1 <= self.periods[0] < self.periods[1]
        check("periods", self.periods, rising, "two whole numbers >= 1, the shorter first")

    def run(self) -> dict[str, Any]:
        """Measure every selector with every transfer and period."""
        errors = {
            (selector, transfer, period): self.error(selector, transfer, period)
            for selector in SELECTORS
            for transfer in TRANSFERS
            for period in self.periods
        }
        short, long = self.periods
        rows = [
            {"selector": s, "transfer": t, f"period {short}": errors[s, t, short], f"period {long}": errors[s, t, long]}
            for s in SELECTORS
            for t in TRANSFERS
        ]
        claims = []
        for selector in SELECTORS:
            for period in self.periods:
                rotate = errors[selector, "rotate", period]
                for transfer in ("keep", "reset"):
                    other = errors[selector, transfer, period]
                    words = (
                        f"{selector}, period {period}: rotated momentum is nearer to the gradient than after {transfer}"
                    )
                    claims.append(Claim(words, f"{rotate:.4f} and {other:.4f}", rotate < other))
        same = max(abs(errors[s, "rotate", p] - errors[s, "moments", p]) for s in SELECTORS for p in self.periods)
        claims.append(Claim("with one moment, moments is rotate", f"off by {same:.1g}", same == 0))
        # The part of the gradient that a random subspace does not hold is lost, whatever the momentum.
        held = min(errors["random", t, p] for t in TRANSFERS for p in self.periods)
        claims.append(
            Claim(
                "random subspaces: no momentum is nearer than 1 - r/n on average",
                f"{held:.4f}",
                held > 0.95 * (1 - self.r / self.n),
            )
        )
        return {
            "settings": asdict(self),
            "unit": "mean of ||momentum - gradient||² / ||gradient||²",
            "rows": rows,
            "claims": [asdict(claim) for claim in claims],
            "holds": all(claim.holds for claim in claims),
        }

    def error(self, selector: str, transfer: Transfer, period: int) -> float:
        """Return the error of one selector, transfer and period: the mean over all steps."""
        generator = linalg.keyed_generator("momentum", self.seed)
        A, B = (self._unit(generator) for _ in range(2))
        X = torch.nn.Parameter(torch.zeros(self.m, self.n, dtype=torch.float64))
        optimizer = SubspaceOptimizer(
            [X], 0.0, self.r, selector=SELECTORS[selector], rule=MSGD(self.beta1), residual=Discard(), transfer=transfer,
            update_proj_gap=period, scale=1.0, proj_type="right", seed=self.seed,
        )  # fmt: skip
        state, total = optimizer.state[X], 0.0
        for step in range(self.steps):
            angle = 2 * math.pi * step / self.turn
            true = math.cos(angle) * A + math.sin(angle) * B
            noise = torch.randn(self.m, self.n, generator=generator, dtype=torch.float64)
            X.grad = true + noise * (self.sigma / (self.m * self.n) ** 0.5)
            optimizer.step()
            momentum = optimizer.selector.project_back(state["exp_avg"], state)
            total += float((momentum - true).square().sum() / true.square().sum())
        return total / self.steps

    def _unit(self, generator: torch.Generator) -> torch.Tensor:
        """Return a matrix of norm 1 with a falling spectrum."""
        G = torch.randn(self.m, self.n, generator=generator, dtype=torch.float64) * torch.linspace(
            2, 0.2, self.n, dtype=torch.float64
        )
        return G / G.norm()
