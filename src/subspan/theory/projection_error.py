"""SARA's projection error: how much an importance-sampled subspace leaves of the gradient it was sampled from.

With ``G = S diag(sigma) Vᵀ (n, n)`` and ``p_i`` the probability that ``v_i`` is among the r vectors drawn,

    E||G - G Q Qᵀ||² = sum_i (1 - p_i) sigma_i² <= (1 - delta) ||G||²,      delta = min_i p_i

The gradient in the lemma is the true one, which need not be the one that the subspace was drawn from. Of a gradient
along the least likely ``v_i`` exactly ``1 - delta`` is left. A Haar-random subspace has ``p_i = r/n``, and leaves
``1 - r/n`` of any gradient.

Source: SARA (Zhang et al. 2025, arXiv 2502.05790), Lemma 3.3 (A.2); GoLore (He et al. 2024, arXiv 2410.11289).
Deviations: the basis is on the right.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subspan import linalg
from subspan.parts import Key, Selector
from subspan.selectors import Importance, Random
from subspan.theory.experiment import DEVIATIONS, Claim, Mean, chance, check, check_at_least, check_rank, mean_of

ENUMERABLE = 12
"""The largest n for which the probabilities are summed over all subsets."""


def successive_sampling(weights: Sequence[float], r: int) -> dict[frozenset[int], float]:
    """Return the probability of each subset of r items, drawn one after another in proportion to ``weights``.

    ``P(S) = sum_{i in S} P(S - i) w_i / w(not in S - i)``. No item is drawn twice. Items of weight zero come last, and
    are equally likely.
    """
    reached = {frozenset[int](): 1.0}
    for _ in range(r):
        larger: dict[frozenset[int], float] = {}
        for drawn, chance_of_it in reached.items():
            rest = [i for i in range(len(weights)) if i not in drawn]
            total = sum(weights[i] for i in rest)
            for i in rest:
                share = weights[i] / total if total > 0 else 1 / len(rest)
                if share > 0:
                    larger[drawn | {i}] = larger.get(drawn | {i}, 0.0) + chance_of_it * share
        reached = larger
    return reached


class Exact(NamedTuple):
    """The exact figures for a spectrum, summed over all subsets."""

    included: list[float]
    """The inclusion probabilities ``p_i``."""
    error: float
    """Mean of ``||G - G Q Qᵀ||² / ||G||²``."""
    variance: float
    """Variance of that error for one draw."""

    @classmethod
    def of(cls, weights: Sequence[float], squares: Sequence[float], r: int) -> "Exact":
        """Sum over all subsets, where ``squares`` are the ``sigma_i²``."""
        subsets = successive_sampling(weights, r)
        n, total = len(weights), sum(squares)
        included = [sum(p for drawn, p in subsets.items() if i in drawn) for i in range(n)]
        lost = {drawn: sum(squares[i] for i in range(n) if i not in drawn) / total for drawn in subsets}
        mean = sum((1 - p) * square for p, square in zip(included, squares, strict=True)) / total
        return cls(included, mean, sum(p * (lost[drawn] - mean) ** 2 for drawn, p in subsets.items()))


class Sampled(NamedTuple):
    """The figures of many draws."""

    error: Mean
    """Mean of ``||G - G Q Qᵀ||² / ||G||²``."""
    included: list[float]
    """Means of ``v_iᵀ Q Qᵀ v_i``, which estimate the ``p_i``."""


@dataclass(frozen=True)
class ProjectionError:
    """SARA leaves at most 1 - delta of a gradient, where delta is the least inclusion probability (SARA, Lemma 3.3)."""

    n: int = 8
    """Side of the gradient."""
    r: int = 3
    """Rank of the subspaces, below n."""
    powers: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    """Powers of the spectra, sigma_i = 1 / i^power."""
    floor: float = 0.1
    """Share of the probability that is spread over all directions, for the rows with a floor."""
    draws: int = 20_000
    """Number of subspaces for each row of the table."""
    seed: int = 0
    """Random seed for the singular vectors and the draws."""

    def __post_init__(self) -> None:
        check_rank(self.n, self.r)
        check_at_least(100, draws=self.draws)
        check("floor", self.floor, 0 < self.floor <= 1, "a share above 0 and at most 1")
        check(
            "powers",
            self.powers,
            bool(self.powers) and all(0 <= power <= 8 for power in self.powers),
            "numbers from 0 to 8",
        )

    def run(self) -> dict[str, Any]:
        """Measure every spectrum without and with the floor, and random subspaces."""
        generator = linalg.keyed_generator("projection error", self.seed)
        vectors = linalg.haar(torch.zeros(2, self.n, self.n, dtype=torch.float64), generator)
        place = torch.arange(1, self.n + 1, dtype=torch.float64)
        spectra = {f"1/i^{power:g}": place**-power for power in sorted(set(self.powers))}
        if self.r <= self._low_rank:
            spectra[f"rank {self._low_rank}"] = (place <= self._low_rank).double()
        rows = [
            self._sara(name, sigma, vectors, floor) for floor in (0.0, self.floor) for name, sigma in spectra.items()
        ]
        random = [self._random(name, sigma, vectors) for name, sigma in spectra.items()]
        claims = self._claims(rows[: len(spectra)], rows[len(spectra) :], random)
        return {
            "settings": asdict(self),
            "unit": "error: what is left of ||G||²",
            "rows": [*rows, *random],
            "claims": [asdict(claim) for claim in claims],
            "holds": all(claim.holds for claim in claims),
        }

    @property
    def _low_rank(self) -> int:
        return (self.n + 1) // 2

    def _sara(self, name: str, sigma: Tensor, vectors: Tensor, floor: float) -> dict[str, Any]:
        selector = Importance(floor=floor)
        error, included = self._sample(sigma, vectors, selector)
        exact = None
        if self.n <= ENUMERABLE:
            exact = Exact.of(selector.log_weights(sigma).exp().tolist(), sigma.square().tolist(), self.r)
        delta = min(exact.included if exact else included)
        allowed = chance(exact.variance, self.draws) if exact else DEVIATIONS * error.error
        return {
            "spectrum": name,
            "selector": "sara",
            "floor": floor,
            "delta": min(included),
            "delta_exact": exact and delta,
            "error": error.value,
            "standard_error": error.error,
            "error_exact": exact and exact.error,
            "bound": 1 - delta,
            "bounded": error.value <= 1 - delta + allowed,
            "equal": exact and abs(error.value - exact.error) <= allowed,
            "probabilities_equal": exact
            and all(
                abs(a - p) <= chance(p * (1 - p), self.draws) for a, p in zip(included, exact.included, strict=True)
            ),
        }

    def _random(self, name: str, sigma: Tensor, vectors: Tensor) -> dict[str, Any]:
        error, included = self._sample(sigma, vectors, Random())
        share = self.r / self.n
        return {
            "spectrum": name,
            "selector": "random",
            "floor": None,
            "delta": min(included),
            "delta_exact": share,
            "error": error.value,
            "standard_error": error.error,
            "error_exact": 1 - share,
            "bound": 1 - share,
            "bounded": error.value <= 1 - share + DEVIATIONS * error.error + 1e-9,
            "equal": error.agrees(1 - share),
        }

    def _sample(self, sigma: Tensor, vectors: Tensor, selector: Selector) -> Sampled:
        """Draw the subspaces from stacks of copies of ``G``; the selector draws a basis for each copy."""
        S, V = vectors
        G = S * sigma @ V.mT
        largest = max(1, 2**21 // self.n**2)
        errors, included = [], []
        for number, start in enumerate(range(0, self.draws, largest)):
            stack = G.expand(min(largest, self.draws - start), *G.shape)
            state = selector.init(stack, self.r)
            selector.refresh_(stack, state, Key(self.seed, "G", number))
            rest = stack - selector.project_back(selector.project(stack, state), state)
            errors.append(rest.square().sum((-2, -1)) / G.square().sum())
            included.append(selector.project(V.mT.expand_as(stack), state).square().sum(-1))
        return Sampled(mean_of(torch.cat(errors)), torch.cat(included).mean(0).tolist())

    def _claims(
        self, bare: list[dict[str, Any]], floored: list[dict[str, Any]], random: list[dict[str, Any]]
    ) -> list[Claim]:
        rows, enumerated = [*bare, *floored], self.n <= ENUMERABLE
        which = "delta_exact" if enumerated else "delta"
        deltas, lifted = ([row[which] for row in some] for some in (bare, floored))
        falling, least = deltas[: len(set(self.powers))], self.floor / self.n
        slack = 1e-12 if enumerated else chance(least * (1 - least), self.draws)
        off = max(abs(row["error"] - row["error_exact"]) for row in random)
        claims = [
            Claim(
                "sara leaves at most 1 - delta",
                f"{len(bare)} spectra, with and without a floor",
                all(row["bounded"] for row in rows),
            ),
            Claim("random leaves 1 - r/n", f"off by {off:.2g} at most", all(row["equal"] for row in random)),
            Claim(
                "without a floor delta falls as the spectrum does",
                ", ".join(f"{delta:.2g}" for delta in falling),
                all(a >= b - slack for a, b in itertools.pairwise(falling)),
            ),
            Claim(
                f"with the floor delta is at least floor / n = {least:.2g}",
                f"{min(lifted):.2g}",
                min(lifted) >= least - slack,
            ),
        ]
        if self.r <= self._low_rank:
            words = "for a gradient of low rank delta is 0 without a floor: the lemma says nothing"
            claims.append(Claim(words, f"{deltas[-1]:.2g}", deltas[-1] < 1e-9))
        if enumerated:
            gap = max(abs(row["error"] - row["error_exact"]) for row in rows)
            claims += [
                Claim(
                    "sara leaves sum (1 - p_i) sigma_i², p_i enumerated",
                    f"off by {gap:.2g} at most",
                    all(row["equal"] for row in rows),
                ),
                Claim(
                    "sara draws with the enumerated probabilities",
                    f"{len(rows) * self.n} of them",
                    all(row["probabilities_equal"] for row in rows),
                ),
            ]
        return claims
