"""Tools that the experiments share: checks of settings, claims and whether they held, means with their errors."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from subspan.utils.errors import SettingError

DEVIATIONS = 5.0
"""Standard errors that a mean may lie from its expectation.

By chance one normal mean in 1,700,000 goes farther.
"""


class Experiment(Protocol):
    """The settings of an experiment, a frozen dataclass that checks itself. Its docstring opens with the claim."""

    def run(self) -> dict[str, Any]:
        """Return what was found, in primitives: ``settings``, ``rows`` (a table), ``claims``, ``holds`` and more."""


@dataclass(frozen=True)
class Claim:
    """A claim that the experiment can refute."""

    claim: str
    """The claim as a sentence."""
    found: str
    """The figures that decide it."""
    holds: bool
    """Whether the figures agree with it."""


class Mean(NamedTuple):
    """A Monte Carlo mean."""

    value: float
    error: float
    """Standard error."""

    def agrees(self, expected: float) -> bool:
        """Whether the difference may be chance. ``1e-9`` allows for rounding where there is no chance."""
        return abs(self.value - expected) <= DEVIATIONS * self.error + 1e-9


def mean_of(samples: Tensor) -> Mean:
    """Return the mean of at least two independent ``samples``."""
    return Mean(float(samples.mean()), float(samples.std() / samples.numel() ** 0.5))


def chance(variance: float, count: int) -> float:
    """Return how far the mean of ``count`` independent samples in [0, 1] may lie from its expectation by chance.

    This is Bernstein's inequality, ``z sqrt(variance / count) + z² / (6 count)``, which also holds for rare events. A
    share of at most ``2 exp(-z² / 2)``, 7e-6, lies beyond it.
    """
    return DEVIATIONS * max(variance, 0.0) ** 0.5 / count**0.5 + DEVIATIONS**2 / (6 * count) + 1e-9


def check(name: str, value: object, fine: bool, allowed: str) -> None:
    """Raise a ``SettingError`` unless the setting is ``fine``."""
    if not fine:
        raise SettingError(f"{name}={value!r}: expected {allowed}")


def check_rank(n: int, r: int) -> None:
    """Raise a ``SettingError`` unless ``r`` is the dimension of a proper subspace of ``n`` dimensions."""
    check("n", n, n >= 2, "a whole number >= 2")
    check("r", r, 1 <= r < n, f"a whole number from 1 to {n - 1}, below n={n}: with r >= n there is no subspace")


def check_at_least(least: int, **settings: int) -> None:
    """Raise a ``SettingError`` unless each setting is at least ``least``."""
    for name, value in settings.items():
        check(name, value, value >= least, f"a whole number >= {least}")
