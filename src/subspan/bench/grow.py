"""Times of a step and of a refresh as the width and the rank grow, beside floors that the machine cannot beat.

The step is that of SARA with AdamW at rank ``r``, on one weight ``(d, d)``. The *floor* is the larger of two times: the
FLOPs at the rate of a square matrix product, and the bytes that must move at the rate of a copy. Both rates are
measured in the same rounds.

A step takes

- ``4 d² r`` FLOPs: ``G Q`` and ``U Qᵀ``;
- ``4 (3 d² + 6 d r)`` bytes: ``G`` once, and ``W``, ``Q`` and two moments twice.

Choosing a basis takes

- ``2 d³`` FLOPs for the Gram matrix, or nearly half of that where it is made in blocks;
- ``10/3 d³`` FLOPs for its vectors: 4/3 for the way to the tridiagonal form, 2 for the way back. The vectors of the
  tridiagonal matrix are left out;
- ``12 d² + 4 d r`` bytes: ``G``, the Gram matrix, ``Q``.

The FLOPs of choosing a basis count at the rate of the factorisation's precision.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from subspan import linalg
from subspan.bench import timing
from subspan.bench.peers import LR
from subspan.factory import create
from subspan.utils.errors import SettingError

_NEVER = 10**9


@dataclass(frozen=True)
class GrowSetting:
    """Widths and ranks to measure."""

    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    """Widths of the weights."""
    shares: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """Ranks, each as a share of the width."""
    pairs: int = 5
    """Number of rounds."""
    budget: float = 120.0
    """Seconds after which no further round of a width begins, if there have been three."""
    seed: int = 0
    """Random seed for weights and gradients."""
    threads: int | None = None
    """Number of CPU threads; null leaves the choice to torch."""

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 8:
            raise SettingError(f"widths={self.widths}: expected numbers of 8 or more, such as [256,512]")
        if not self.shares or not all(0 < share < 1 and share * min(self.widths) >= 1 for share in self.shares):
            raise SettingError(
                f"shares={self.shares}: expected ranks over widths, from 1 / {min(self.widths)} to below 1"
            )
        timing.check_rounds("pairs", self.pairs)
        if not self.budget >= 0:
            raise SettingError(f"budget={self.budget}: expected seconds >= 0")
        if self.threads is not None and self.threads < 1:
            raise SettingError(f"threads={self.threads}: expected a whole number >= 1")


def measure(setting: GrowSetting) -> dict[str, Any]:
    """Measure a row for each width and rank. ``exponents`` are the powers of the width with which the times grow."""
    if setting.threads:
        torch.set_num_threads(setting.threads)
    rows = [row for width in setting.widths for row in _rows(setting, width)]
    return {"rows": rows, "exponents": _exponents(rows, setting), "machine": timing.machine()}


def _rows(setting: GrowSetting, width: int) -> list[dict[str, Any]]:
    ranks = {share: int(share * width) for share in setting.shares}
    contenders: dict[str, Callable[[], object]] = _rates(width)
    for rank in ranks.values():
        for kind, gap in (("step", _NEVER), ("refresh", 1)):
            contenders[f"{kind} {rank}"] = _optimizer(setting, width, rank, gap).step
    # Two rounds warm up, because the first step of each is a refresh.
    seconds = timing.rounds(contenders, setting.pairs, warm_up=2, budget=setting.budget)
    taken = {name: timing.median(times) for name, times in seconds.items()}
    rates = {
        "matmul_fp32": 2 * width**3 / taken["matmul_fp32"],
        "matmul_fp64": 2 * width**3 / taken["matmul_fp64"],
        "copy": 2 * 4 * _COPIED / taken["copy"],
    }
    return [
        {
            "width": width,
            "rank": rank,
            "share": share,
            "step_seconds": taken[f"step {rank}"],
            "step_floor_seconds": floors(width, rank, rates)[0],
            "refresh_seconds": taken[f"refresh {rank}"] - taken[f"step {rank}"],
            "refresh_floor_seconds": floors(width, rank, rates)[1],
            "rates": rates,
        }
        for share, rank in ranks.items()
    ]


def share_name(share: float) -> str:
    """Write 0.0625 as ``1/16``."""
    return str(Fraction(share).limit_denominator(1000))


def floors(width: int, rank: int, rates: dict[str, float]) -> tuple[float, float]:
    """The least seconds that a step and a refresh can take at ``rates``, in FLOPs and bytes per second."""
    d, r = width, rank
    step = max(4 * d * d * r / rates["matmul_fp32"], 4 * (3 * d * d + 6 * d * r) / rates["copy"])
    dtype = "matmul_fp64" if linalg.spectral_dtype(torch.device("cpu"), d) == torch.float64 else "matmul_fp32"
    refresh = max((linalg.gram_flops(d, d) + 10 / 3 * d**3) / rates[dtype], (12 * d * d + 4 * d * r) / rates["copy"])
    return step, refresh


_COPIED = 2**23
"""How many numbers are copied: 32 MiB."""


def _rates(width: int) -> dict[str, Callable[[], object]]:
    A, B = torch.randn(width, width), torch.randn(width, width)
    wide = A.double(), B.double()
    source, copy = torch.zeros(_COPIED), torch.zeros(_COPIED)
    return {
        "matmul_fp32": _product(A, B),
        "matmul_fp64": _product(*wide),
        "copy": lambda: copy.copy_(source),
    }


def _product(A: Tensor, B: Tensor) -> Callable[[], object]:
    out = torch.empty_like(A)
    return lambda: torch.mm(A, B, out=out)


def _optimizer(setting: GrowSetting, width: int, rank: int, gap: int) -> torch.optim.Optimizer:
    torch.manual_seed(setting.seed)
    model = nn.ModuleDict({"layer": nn.Linear(width, width, bias=False)})
    for p in model.parameters():
        p.grad = torch.randn_like(p) / 1000
    return create("sara_adamw", model, lr=LR, rank=rank, update_proj_gap=gap, stagger=False, seed=setting.seed)


def _exponents(rows: list[dict[str, Any]], setting: GrowSetting) -> dict[str, dict[str, float | None]] | None:
    """Fit the logarithm of a time to that of the width by least squares; ``None`` if there is only one width."""
    if len(setting.widths) < 2:
        return None
    return {
        kind: {
            share_name(share): slope([(row["width"], row[f"{kind}_seconds"]) for row in rows if row["share"] == share])
            for share in setting.shares
        }
        for kind in ("step", "refresh")
    }


def slope(points: list[tuple[float, float]]) -> float | None:
    """The slope of the line through the logarithms; ``None`` where noise left a time that is not positive."""
    if any(y <= 0 for _, y in points):
        return None
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in zip(*points, strict=True))
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))
