"""How the cost of a step and of a refresh grows with the width and the rank, beside what the machine could not do
faster.

One weight ``(d, d)``, SARA with AdamW at rank ``r``. The *floor* of each is the larger of two times, at rates measured
in the
same rounds: its FLOPs at that of a square matrix product, and the bytes it must move at that of a copy.

A step: ``4 d² r`` FLOPs (``G Q`` and ``U Qᵀ``), ``4 (3 d² + 6 d r)`` bytes (``G`` once; ``W``, ``Q`` and two moments
twice).
Choosing a basis: ``2 d³ + 10/3 d³`` FLOPs (Gram matrix, nearly half of it where that is made in blocks; to tridiagonal
form
4/3, its vectors back 2; those of the tridiagonal matrix are left out) in the precision of the factorisation, and
``12 d² + 4 d r`` bytes (``G``, the Gram matrix, ``Q``).
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
    """Widths and ranks."""

    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    """Of the weights."""
    shares: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """Ranks over widths."""
    pairs: int = 5
    """Rounds."""
    budget: float = 120.0
    """Seconds after which no further round of a width begins, once there are three."""
    seed: int = 0
    """Of weights and gradients."""
    threads: int | None = None
    """CPU threads; null leaves torch's choice."""

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
    """A row for each width and rank; ``exponents``, with which powers of the width the times of each share grow."""
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
    # Two to warm up: the first step of each is a refresh.
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
    """``1/16`` of 0.0625."""
    return str(Fraction(share).limit_denominator(1000))


def floors(width: int, rank: int, rates: dict[str, float]) -> tuple[float, float]:
    """Seconds of a step, and of a refresh, below which ``rates`` (FLOPs and bytes a second) leave no way."""
    d, r = width, rank
    step = max(4 * d * d * r / rates["matmul_fp32"], 4 * (3 * d * d + 6 * d * r) / rates["copy"])
    dtype = "matmul_fp64" if linalg.spectral_dtype(torch.device("cpu"), d) == torch.float64 else "matmul_fp32"
    refresh = max((linalg.gram_flops(d, d) + 10 / 3 * d**3) / rates[dtype], (12 * d * d + 4 * d * r) / rates["copy"])
    return step, refresh


_COPIED = 2**23
"""Numbers in what is copied: 32 MiB."""


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
    """Least squares of the logarithm of a time in that of the width; ``None`` of one width."""
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
    """Of the line through the logarithms; ``None`` where noise left a time that is not positive."""
    if any(y <= 0 for _, y in points):
        return None
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in zip(*points, strict=True))
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))
