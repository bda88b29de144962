"""GoLore's counterexample: GaLore does not converge, and the others do.

    min f(X) = ||A X||² / 2 + <B, X>,   X (n, n)
    A = [I 0] (n-r, n),   B = [[D, 0], [0, 0]],   D (n-r, n-r) normal with deviation sigma
    stochastic gradient   grad f(X) + xi sigma C,   C = [[0, 0], [0, I_r]],   xi = +-1

so ``f - f* = ||A X + [D 0]||² / 2`` with ``f* = -||D||² / 2``, and the noise itself does not touch f. Once every
singular value of ``grad f`` is below sigma, the dominant r directions of the stochastic gradient are those of the
noise, and GaLore stands still. It is then at most ``(n-r) sigma² / 2`` above the optimum. This is the *noise level*, in
which the excess is reported.

The mean of a batch of b draws has the level divided by b. But it may be small by chance, even zero, and then GaLore
gets past it: only a single draw is never smaller than sigma. Isotropic noise (normal, with the same energy
``r sigma²``) prefers no direction.

*With the sketch* the step goes outside the subspace too, along what ``residuals.Sketch`` sees of the gradient in s = r
directions. On average that is all that lies outside. So it does not matter that the subspace is that of the noise, nor
that it is never chosen again (*fixed*). The mean square of this step is ``(n - r) / s`` times the square of what lies
outside. Descent therefore needs ``lr < 2 s / (n - r)``. Noise that lies outside, too, goes into all directions in this
proportion, and leaves a distance that shrinks with the rate, as it does with random subspaces.

These rows have factors of 1 on the sketch. With Fira's row factors (*norms*) a row of the oriented gradient does not
move where its gradient lies wholly outside the subspace: there both U and R are zero, and their quotient is taken for
zero. Here that happens to all rows that matter, so this row is no claim.

Source: GoLore (He et al. 2024, arXiv 2410.11289), section 4; MSGD with momentum projection, ``beta1 = 0.1``.
Deviations: 6,000 steps at ``lr=1e-2``, where its code takes 200,000 at 3e-5: ten times the way.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from subspan import linalg
from subspan.optimizer import SubspaceOptimizer
from subspan.parts import Selector
from subspan.recipes import find
from subspan.residuals import Discard, Sketch
from subspan.rules import MSGD
from subspan.selectors import Dominant, Importance, Switch
from subspan.theory.experiment import Claim, check, check_at_least, check_rank

_UNTIL_THE_END = 10**9  # a period that no run is as long as
_ONES, _NORMS = Sketch(factor=None, limiter=None), Sketch()
_DOMINANT = {
    "galore": (Discard(), None),
    "galore_fixed": (Discard(), _UNTIL_THE_END),
    "galore_sketch": (_ONES, None),
    "galore_fixed_sketch": (_ONES, _UNTIL_THE_END),
    "galore_sketch_norms": (_NORMS, None),
}
"""The methods with GaLore's subspaces: the residual, and a period other than that of the setting."""
_SKETCHES = ("galore_sketch", "galore_fixed_sketch")
_CLAIMED = ("sgd", "golore", "golore_hybrid", "sara", "sara_floor", *_SKETCHES)
"""The methods that are claimed to reach the optimum."""
METHODS = ("sgd", *_DOMINANT, "golore", "golore_hybrid", "sara", "sara_floor")
BETA1 = 0.1  # the weight of the new gradient
LARGE_BATCH = 1000
NEAR = 0.02
"""A distance to the optimum, in noise levels, that counts as having reached it."""

Noise = Literal["adversarial", "isotropic"]


class Gradients(NamedTuple):
    """How the stochastic gradient differs from the true one."""

    noise: Noise
    batch: int

    def draws(self, setting: "Nonconvergence", steps: int) -> Iterator[Tensor]:
        """Yield the difference, ``(n, n)``, for each step."""
        n, r, sigma = setting.n, setting.r, setting.sigma
        generator = linalg.keyed_generator("nonconvergence", setting.seed, *self)
        if self.noise == "isotropic":
            for _ in range(steps):
                yield torch.randn(n, n, generator=generator, dtype=torch.float64) * (
                    sigma * (r / self.batch) ** 0.5 / n
                )
        else:
            C = torch.diag(torch.tensor([0.0] * (n - r) + [sigma] * r, dtype=torch.float64))
            counts = torch.full((steps,), float(self.batch), dtype=torch.float64)
            heads = torch.binomial(counts, torch.full_like(counts, 0.5), generator=generator)
            yield from ((2 * head / self.batch - 1) * C for head in heads)


@dataclass(frozen=True)
class Nonconvergence:
    """GaLore stops above the optimum where random and importance-sampled subspaces reach it (GoLore, section 4)."""

    n: int = 10
    """Side of the matrix."""
    r: int = 4
    """Rank of the subspaces and of the noise, below n."""
    sigma: float = 1.0
    """Size of the noise and of the optimum."""
    seed: int = 0
    """Random seed for the problem, the noise and the subspaces."""
    batch: int = 1
    """Number of noise draws; each step sees their mean."""
    noise: Noise = "adversarial"
    """Noise along r directions (adversarial), or equally along all of them (isotropic)."""
    steps: int | None = None
    """Number of steps; null means 6,000, or more where random subspaces need more to shrink the error by exp(20)."""
    lr: float = 1e-2
    """Learning rate."""
    period: int = 100
    """Steps between refreshes."""
    floor: float = 0.1
    """Share of the probability that is spread over all directions, for SARA with a floor."""

    def __post_init__(self) -> None:
        check_rank(self.n, self.r)
        check_at_least(1, batch=self.batch, period=self.period, **({} if self.steps is None else {"steps": self.steps}))
        check("sigma", self.sigma, 0 < self.sigma < math.inf, "a number above 0")
        check("lr", self.lr, 0 < self.lr < 2, "a number above 0 and below 2, where gradient descent is stable (L = 1)")
        check("floor", self.floor, 0 < self.floor <= 1, "a share above 0 and at most 1")
        check("noise", self.noise, self.noise in ("adversarial", "isotropic"), "'adversarial' or 'isotropic'")

    def run(self) -> dict[str, Any]:
        """Run all methods on a stack of three problems: the one asked for, a large batch, and isotropic noise."""
        steps = self.steps or max(6000, math.ceil(20 * self.n / (self.r * self.lr)))
        problems = {
            "asked": Gradients(self.noise, self.batch),
            "large_batch": Gradients("adversarial", LARGE_BATCH),
            "isotropic": Gradients("isotropic", 1),
        }
        final = {method: self.final(method, list(problems.values()), steps) for method in METHODS}
        optimum = -0.5 * float(self.target().square().sum())
        level = 0.5 * (self.n - self.r) * self.sigma**2
        excess = {
            method: {name: (value - optimum) / level for name, value in zip(problems, values, strict=True)}
            for method, values in final.items()
        }
        claims = self._claims(excess)
        return {
            "optimum": optimum,
            "final": {method: values[0] for method, values in final.items()},
            "settings": asdict(replace(self, steps=steps))
            | {"beta1": BETA1, "golore_hybrid": "random for the last 20 %"},
            "variants": {
                name: problem._asdict() | {"final": {method: values[number] for method, values in final.items()}}
                for number, (name, problem) in enumerate(problems.items())
                if name != "asked"
            },
            "noise_level": level,
            "unit": "f - f* in noise levels, (n - r) sigma² / 2",
            "rows": [{"method": method} | row for method, row in excess.items()],
            "claims": [asdict(claim) for claim in claims],
            "holds": all(claim.holds for claim in claims),
        }

    def target(self) -> Tensor:
        """Return ``D (n-r, n-r)``; the optimum is at ``A X = [-D 0]``."""
        generator = linalg.keyed_generator("nonconvergence target", self.seed)
        k = self.n - self.r
        return self.sigma * torch.randn(k, k, generator=generator, dtype=torch.float64)

    def start(self) -> Tensor:
        """Return the start, ``X_0 (n, n) = [sigma/2 [I 0]; sigma normal]``."""
        generator = linalg.keyed_generator("nonconvergence start", self.seed)
        X = 0.5 * self.sigma * torch.eye(self.n, dtype=torch.float64)
        X[self.n - self.r :] = self.sigma * torch.randn(self.r, self.n, generator=generator, dtype=torch.float64)
        return X

    def final(self, method: str, problems: list[Gradients], steps: int) -> list[float]:
        """Return ``f`` after training on each of the problems."""
        X = torch.nn.Parameter(self.start().repeat(len(problems), 1, 1))
        W, D, k = X.detach(), self.target(), self.n - self.r
        optimizer = self._optimizer(method, X, steps)
        for noise in zip(*(problem.draws(self, steps) for problem in problems), strict=True):
            G = torch.stack(noise)
            G[:, :k] += W[:, :k]
            G[:, :k, :k] += D
            X.grad = G
            optimizer.step()
        return [float(0.5 * x[:k].square().sum() + (D * x[:k, :k]).sum()) for x in W]

    def _optimizer(self, method: str, X: torch.nn.Parameter, steps: int) -> torch.optim.Optimizer:
        if method == "sgd":
            return torch.optim.SGD([X], lr=self.lr, momentum=1 - BETA1, dampening=1 - BETA1)
        selector: Selector | None
        residual, period = _DOMINANT.get(method, (Discard(), None))
        if method in _DOMINANT:
            selector = Dominant()
        elif method == "sara_floor":
            selector = Importance(floor=self.floor)
        else:
            selector = find(f"{method}_sgd").selector
        if isinstance(selector, Switch):
            selector = replace(selector, total_steps=steps)
        assert selector is not None
        return SubspaceOptimizer(
            [X], self.lr, self.r, selector=selector, rule=MSGD(BETA1), residual=residual, transfer="rotate",
            update_proj_gap=period or self.period, scale=1.0, proj_type="left", seed=self.seed,
        )  # fmt: skip

    def _claims(self, excess: dict[str, dict[str, float]]) -> list[Claim]:
        galore, near = excess["galore"], f"within {NEAR:.0%} of the noise level"
        claims = []
        if self.noise == "adversarial":
            left = galore["asked"] * self.batch
            words, stuck = ("GaLore stops above the optimum, below the noise level", NEAR < left <= 1)
            if self.batch > 1:
                words, stuck = (f"GaLore ends within the noise level of a batch of {self.batch:,}", left <= 1)
            claims.append(Claim(words, f"{left:.3g} levels", stuck))
        descends = self.lr * (self.n - self.r) < 2 * min(self.r, self.n - self.r)
        for method in METHODS:
            claimed = method in _CLAIMED and (descends or method not in _SKETCHES)
            if claimed or (method == "galore" and self.noise == "isotropic"):
                left = excess[method]["asked"] * self.batch
                claims.append(Claim(f"{method} reaches the optimum, {near}", f"{left:.2g} levels", left <= NEAR))
        for name, words in (("large_batch", f"a batch of {LARGE_BATCH:,}"), ("isotropic", "isotropic noise")):
            claims.append(
                Claim(f"with {words} GaLore reaches it too, {near}", f"{galore[name]:.2g} levels", galore[name] <= NEAR)
            )
        return claims
