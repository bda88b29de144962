"""RSO's two conditions: its subspaces are unbiased, and eta is small enough for its subproblem to have a solution.

(1) ``E[Q Qᵀ] = I (n, n)``, so that ``E[G Q Qᵀ] = G``: for Haar columns times sqrt(n/r), and for normal entries of
variance 1/r.

(2) In each new subspace RSO moves X (m, n) to ``X + B Qᵀ``, where B (m, r) solves

    min_B g(B) = f(X + B Qᵀ) + ||B||² / (2 eta)

So ``eta`` is the strength of the proximal term, and no size of a step. With Haar columns ``QᵀQ = (n/r) I``. If the
curvatures of f lie between -L and L, those of g lie between ``(1 - c) / eta`` and ``(1 + c) / eta``, with
``c = eta L n/r``. Hence:

- On a convex f no curvature of g is below ``1 / eta``. The solution exists for every eta, and f falls, because
  ``f(X + B Qᵀ) <= g(B) < g(0) = f(X)`` unless ``B = 0``.
- Where f curves with -L, g is strongly convex exactly for c < 1. From c = 1 on it has no minimum.
- The paper's condition ``eta <= 1 / (2 L n/r)`` is c <= 1/2. There the curvatures of g differ by a factor of 3 at most.

On ``f(X) = s L ||X||² / 2``, with s = 1 or -1, the solution multiplies the part of X inside the subspace by
``k = 1 / (1 + s c)``. *One gradient step* of size eta is another method: it multiplies that part by ``k = 1 - s c``.
For both

    E||X_next||² / ||X||² = 1 + r/n (k² - 1)

so with s = 1 gradient steps diverge beyond c = 2, and solutions never.

Source: RSO (Chen et al. 2025, arXiv 2502.07222): E[P Pᵀ] = I, and eta <= 1 / (2 L max(m_l / r_l)).
Deviations: the paper solves a subproblem only nearly. Here the solution is exact, and the library's step is compared
with it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

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

Problem = Literal["convex", "uneven", "concave"]
"""A quadratic with curvature L in all directions, with curvatures from L/4 to L, or with curvature -L in all."""
Solver = Literal["exact", "gradient_step"]

STRENGTHS = (0.01, 0.25, 0.5, 0.9, 1.1, 1.9, 2.5, 4.0, 100.0, 1e6)
"""Values of ``c = eta L n/r`` that are tried: on both sides of 1 and of 2, and far from them."""

INNER = 200
"""Number of steps that the library takes in one subproblem. At c = 0.9 they shrink the error to 2e-5 of itself."""


class Trajectory(NamedTuple):
    """What happens to f over many subspaces."""

    rate: float | None
    """Mean change of ``log |f|`` in a subspace; ``None`` where a subproblem has no minimum."""
    largest: float | None
    """Largest change of f in a subspace, over ``|f|``: below 0 if f falls in each of them."""
    curvature: float | None
    """Smallest curvature of a subproblem, times eta; ``None`` where no subproblem is looked at."""


@dataclass(frozen=True)
class RsoUnbiased:
    """The mean of QQᵀ is I, and only where f curves down does RSO's subproblem need eta L n/r < 1 (RSO)."""

    n: int = 12
    """Number of columns. This side is compressed."""
    r: int = 3
    """Rank of the subspaces, below n."""
    m: int = 12
    """Number of rows."""
    smoothness: float = 4.0
    """Smoothness L of the quadratics."""
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
        """Test both conditions, and what the library's step makes of the second."""
        unbiased = {name: self.bias(selector) for name, selector in SELECTORS.items()}
        claims = [
            Claim(
                f"{name}: E[Q Qᵀ] = I",
                f"off by {z:.1f} standard errors at most, of {self.n**2} entries",
                z <= DEVIATIONS,
            )
            for name, (z, _) in unbiased.items()
        ]
        bases = self.bases()
        exact = {
            (problem, c): self.trajectory(problem, "exact", c, bases)
            for problem in get_args(Problem)
            for c in STRENGTHS
        }
        steps = {c: self.trajectory("convex", "gradient_step", c, bases) for c in STRENGTHS}
        rows = [
            {
                "c": c,
                "eta": self.eta(c),
                **{problem: exact[problem, c].rate for problem in get_args(Problem)},
                "concave_curvature": exact["concave", c].curvature,
                "convex_gradient_step": steps[c].rate,
            }
            for c in STRENGTHS
        ]
        claims += [*_of_solutions(exact), *_of_gradient_steps(steps), *self.library()]
        return {
            "settings": asdict(self),
            "bias": {name: {"largest_z": z, "largest_error": error} for name, (z, error) in unbiased.items()},
            "unit": "mean change of log |f| in a subspace, by c = eta L n/r; concave_curvature: that of the subproblem, "
            "times eta",
            "rows": rows,
            "claims": [asdict(claim) for claim in claims],
            "holds": all(claim.holds for claim in claims),
        }

    # --- the first condition ------------------------------------------------------------------------------------------

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

    # --- the second condition -----------------------------------------------------------------------------------------

    def eta(self, c: float) -> float:
        """Return the ``eta`` with ``eta L n/r = c``."""
        return c * self.r / (self.n * self.smoothness)

    def curvatures(self, problem: Problem) -> Tensor:
        """Return h ``(n,)`` of ``f(X) = sum of h_j X_ij² / 2``."""
        even = torch.full((self.n,), self.smoothness, dtype=torch.float64)
        if problem == "uneven":
            return even * torch.linspace(0.25, 1, self.n, dtype=torch.float64)
        return even if problem == "convex" else -even

    def trajectory(self, problem: Problem, solver: Solver, c: float, bases: Sequence[Tensor]) -> Trajectory:
        """Follow f through one subspace after the other, from a random start of norm 1."""
        h, X = self.curvatures(problem), self.start()
        change, largest, curvature = 0.0, -math.inf, math.inf
        for Q in bases:
            if solver == "exact":
                B, smallest = solution(X, h, Q, self.eta(c))
                curvature = min(curvature, smallest * self.eta(c))
                if B is None:
                    return Trajectory(None, None, curvature)
            else:
                B = -self.eta(c) * (X * h) @ Q
            moved = X + B @ Q.mT
            before, after = (float((h * Z.square()).sum()) for Z in (X, moved))
            change += math.log(after / before)
            largest = max(largest, (after - before) / abs(before))
            X = moved / moved.norm()  # f is quadratic: its relative change does not depend on the size
        return Trajectory(change / len(bases), largest, curvature if solver == "exact" else None)

    def library(self) -> list[Claim]:
        """Compare the library's step, with SGD and the coupled proximal term, with the solution."""
        off = max(
            self.descent(problem, c)[0]
            for problem in get_args(Problem)
            for c in STRENGTHS
            if problem != "concave" or c < 1
        )
        away = min(self.descent("concave", c)[1] for c in STRENGTHS if c > 1)
        return [
            Claim(
                f"{INNER} steps of the library with eta, proximal='coupled' arrive at the solution where there is one",
                f"off by {off:.1g} of it at most",
                off < 1e-4,
            ),
            Claim(f"where there is none, {INNER} steps run away", f"to {away:.1g} times X at least", away > 1e3),
        ]

    def descent(self, problem: Problem, c: float) -> tuple[float, float]:
        """Return how far the library ends from the solution of one subproblem, over it, and the size of its B over X's.

        The size of the steps is ``1 / (largest curvature of g)``, so eta is not a step size here.
        """
        eta, h, start = self.eta(c), self.curvatures(problem), self.start()
        X = torch.nn.Parameter(start.clone())
        optimizer = SubspaceOptimizer(
            [X], eta / (1 + c), self.r, selector=SELECTORS["haar"], rule=SGD(0.0), residual=Discard(), transfer="reset",
            update_proj_gap=INNER, scale=1.0, proj_type="right", eta=eta, proximal="coupled", seed=self.seed,
        )  # fmt: skip
        for _ in range(INNER):
            X.grad = X.detach() * h
            optimizer.step()
        state = optimizer.state[X]
        B, _ = solution(start, h, optimizer.selector.project(_eye(self.n), state), eta)
        reached = state["displacement"]
        return math.inf if B is None else float((reached - B).norm() / B.norm()), float(reached.norm() / start.norm())

    def start(self) -> Tensor:
        """Draw where all trajectories begin: X ``(m, n)`` of norm 1."""
        X = torch.randn(self.m, self.n, generator=linalg.keyed_generator("rso start", self.seed), dtype=torch.float64)
        return X / X.norm()

    def bases(self) -> list[Tensor]:
        """Draw the Haar bases ``(n, r)`` of all steps."""
        selector, like = SELECTORS["haar"], self.start()
        found = []
        for step in range(self.steps):
            state = selector.init(like, self.r)
            selector.refresh_(like, state, Key(self.seed, "X", step))
            found.append(selector.project(_eye(self.n), state))
        return found


def solution(X: Tensor, h: Tensor, Q: Tensor, eta: float) -> tuple[Tensor | None, float]:
    """Return the B ``(m, r)`` that solves the subproblem of a quadratic, and the smallest curvature of the subproblem.

    With ``S = Qᵀ diag(h) Q + I / eta (r, r)`` the gradient is ``X diag(h) Q + B S``. Where S is not positive definite
    there is no minimum, and B is ``None``.
    """
    S = Q.mT @ (h[:, None] * Q) + _eye(Q.shape[1]) / eta
    smallest = float(torch.linalg.eigvalsh(S)[0])
    if smallest <= 0:
        return None, smallest
    return -torch.linalg.solve(S, ((X * h) @ Q).mT).mT, smallest


def _eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def _of_solutions(found: Mapping[tuple[Problem, float], Trajectory]) -> Iterator[Claim]:
    """Compare exact solutions with what the derivation says of them."""
    for problem in get_args(Problem):
        falls = {c: found[problem, c].largest for c in STRENGTHS if problem != "concave" or c < 1}
        least = min(-math.inf if fall is None else -fall for fall in falls.values())
        yield Claim(
            f"{problem}, solved exactly: f falls in every subspace, for c from {min(falls):g} to {max(falls):g}",
            f"by {least:.2g} |f| at least",
            least > 0,
        )
    beyond = [found["concave", c] for c in STRENGTHS if c > 1]
    yield Claim(
        "concave, c above 1: the subproblem has no minimum",
        f"its curvature is {max(one.curvature or 0.0 for one in beyond):+.2f} / eta at most",
        all(one.rate is None for one in beyond),
    )


def _of_gradient_steps(found: Mapping[float, Trajectory]) -> Iterator[Claim]:
    """Compare single gradient steps of size eta with what the derivation says of them."""
    within, beyond = ([one.rate or 0.0 for c, one in found.items() if (c < 2) == small] for small in (True, False))
    yield Claim(
        "convex, one gradient step of size eta: converges for c below 2",
        f"log |f| changes by {max(within):+.3f} a subspace at most",
        max(within) < 0,
    )
    yield Claim(
        "convex, one gradient step of size eta: diverges for c above 2",
        f"log |f| changes by {min(beyond):+.3f} a subspace at least",
        min(beyond) > 0,
    )
