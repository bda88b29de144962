"""Timing of contenders in one process: they take turns, and times are compared within a turn.

Intervals come from the bootstrap.
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
    """Raise unless there are enough rounds."""
    if value < FEWEST:
        raise SettingError(f"{name}={value}: expected a whole number >= {FEWEST}")


def rounds(
    contenders: Mapping[str, Callable[[], object]], count: int, warm_up: int = 1, budget: float = float("inf")
) -> dict[str, list[float]]:
    """Time each contender once a round, in an order that turns around from round to round.

    Args:
        contenders: what is called, by name.
        count: number of rounds that are timed.
        warm_up: number of rounds before.
        budget: seconds after which no further round begins, if there have been ``FEWEST``.

    Returns:
        The seconds of each contender, by name.
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
    """The middle value, or the mean of the two middle ones."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


def interval(statistic: Callable[..., Tensor], *samples: Iterable[Sequence[float]]) -> dict[str, float]:
    """Compute ``statistic`` of the samples, with a bootstrap interval of 95 %.

    Each sample ``(n, k)`` has a row for every round. The bootstrap draws rows again, within each sample. ``statistic``
    takes tensors ``(..., n, k)`` and returns ``(...)``.

    Returns:
        ``median``, the statistic itself, and the ends of its interval, ``low`` and ``high``.
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
    """Describe the machine: processor, threads, its load now, and the versions of installed ``packages``."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "versions": {"python": platform.python_version()} | versions(["torch", "subspan", *packages]),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()
