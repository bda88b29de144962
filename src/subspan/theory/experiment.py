"""What the experiments share: checks of settings, claims and whether they held, means with their errors."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from subspan.utils.errors import SettingError

DEVIATIONS = 5.0
"""Standard errors that a mean may lie from its expectation: of normal means one in 1,700,000 goes farther by chance."""


class Experiment(Protocol):
    """Settings, as a frozen dataclass that checks itself; its docstring opens with the claim."""

    def run(self) -> dict[str, Any]:
        """What was found, in primitives: ``settings``, ``rows`` (a table), ``claims``, ``holds`` and more."""


@dataclass(frozen=True)
class Claim:
    """A sentence that the experiment can refute."""

    claim: str
    found: str
    """The figures that decide it."""
    holds: bool


class Mean(NamedTuple):
    """A Monte Carlo mean."""

    value: float
    error: float
    """Standard error."""

    def agrees(self, expected: float) -> bool:
        """Whether the difference is one of chance; ``1e-9`` allows for rounding where there is no chance."""
        return abs(self.value - expected) <= DEVIATIONS * self.error + 1e-9


def mean_of(samples: Tensor) -> Mean:
    """Of independent ``samples``, at least two."""
    return Mean(float(samples.mean()), float(samples.std() / samples.numel() ** 0.5))


def chance(variance: float, count: int) -> float:
    """How far the mean of ``count`` independent samples, each in [0, 1], may lie from its expectation by chance.

    Bernstein's inequality, ``z sqrt(variance / count) + z² / (6 count)``, which also holds of rare events; beyond it
    lies
    a share of at most ``2 exp(-z² / 2)``, 7e-6.
    """
    return DEVIATIONS * max(variance, 0.0) ** 0.5 / count**0.5 + DEVIATIONS**2 / (6 * count) + 1e-9


def check(name: str, value: object, fine: bool, allowed: str) -> None:
    """Raise, unless the setting is ``fine``."""
    if not fine:
        raise SettingError(f"{name}={value!r}: expected {allowed}")


def check_rank(n: int, r: int) -> None:
    """Raise, unless ``r`` is the dimension of a subspace proper of ``n`` dimensions."""
    check("n", n, n >= 2, "a whole number >= 2")
    check("r", r, 1 <= r < n, f"a whole number from 1 to {n - 1}, below n={n}: with r >= n there is no subspace")


def check_at_least(least: int, **settings: int) -> None:
    """Raise, unless each setting is at least ``least``."""
    for name, value in settings.items():
        check(name, value, value >= least, f"a whole number >= {least}")
