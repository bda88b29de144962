"""Times side by side in one process: contenders take turns, ratios are those of a turn, intervals come from the
bootstrap.
"""

import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from subspan.utils.errors import SettingError

FEWEST = 3
"""Rounds without which no interval is given."""


def check_rounds(name: str, value: int) -> None:
    """A ``ValueError`` if there are too few."""
    if value < FEWEST:
        raise SettingError(f"{name}={value}: expected a whole number >= {FEWEST}")


def rounds(
    contenders: Mapping[str, Callable[[], object]], count: int, warm_up: int = 1, budget: float = float("inf")
) -> dict[str, list[float]]:
    """Seconds of each contender: one call of each a round, in an order that turns around from round to round.

    Args:
        count: of the rounds that are timed.
        warm_up: rounds before.
        budget: seconds after which no further round begins, once there are ``FEWEST``.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.perf_counter()
    for number in range(-warm_up, count):
        if number >= FEWEST and time.perf_counter() - began > budget:
            break
        for name, call in list(contenders.items())[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            call()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(values: Sequence[float]) -> float:
    """The middle one, or the mean of the middle two."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def interval(statistic: Callable[..., Tensor], *samples: Iterable[Sequence[float]]) -> dict[str, float]:
    """``statistic`` of the samples, as ``median``, and a bootstrap interval of 95 % of it, ``low`` and ``high``.

    Each sample ``(n, k)`` has a row for every round; rows are drawn anew, within each sample. ``statistic`` takes
    tensors
    ``(..., n, k)`` and returns ``(...)``.
    """
    values = [torch.tensor([*sample], dtype=torch.float64) for sample in samples]
    generator = torch.Generator().manual_seed(0)
    drawn = statistic(*(rows[torch.randint(len(rows), (2000, len(rows)), generator=generator)] for rows in values))
    return {
        "median": float(statistic(*values)),
        "low": float(drawn.quantile(0.025)),
        "high": float(drawn.quantile(0.975)),
    }


def median_ratio(rows: Tensor) -> Tensor:
    """The median over rounds of the first column over the second, ``(..., n, 2)`` to ``(...)``."""
    return (rows[..., 0] / rows[..., 1]).quantile(0.5, dim=-1)


def mean_of_ratios(*samples: Tensor) -> Tensor:
    """The geometric mean over samples of their ``median_ratio``."""
    return torch.stack([median_ratio(rows) for rows in samples]).log().mean(0).exp()


def machine(packages: Iterable[str] = ()) -> dict[str, Any]:
    """What the times are of: processor, threads, load at the moment, versions of what is installed of ``packages``."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "versions": {"python": platform.python_version()} | versions(["torch", "subspan", *packages]),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # no Linux
        pass
    return platform.processor() or platform.machine()
