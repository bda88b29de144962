"""Time and accuracy of choosing a basis: ``eigh`` of the Gram matrix against ``svd`` of the gradient.

A refresh takes ``eigh``. Gradients ``G (m, n)`` are random, with singular values that fall geometrically from 1 to
``1 / condition``. What is chosen is compared with an SVD in fp64.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subspan import linalg
from subspan.bench import timing
from subspan.costs.traffic import PERIOD
from subspan.parts import Key
from subspan.selectors import Importance
from subspan.step.layout import layout_of
from subspan.training.models.presets import PRESETS, llama_of
from subspan.utils.errors import SettingError

MODEL = "llama-60m"
"""The model whose refreshes are compared with its steps."""


@dataclass(frozen=True)
class RefreshSetting:
    """Gradients from which bases are chosen."""

    shapes: tuple[str, ...] = ("512x512", "512x1376", "768x2048", "1024x2736", "2048x5461")
    """Shapes of the gradients, rows x columns."""
    rank: int | None = None
    """Rank of the subspaces; null takes a quarter of the shorter side."""
    condition: float = 1e4
    """Largest singular value divided by the smallest."""
    pairs: int = 9
    """Number of rounds. A round chooses a basis once in each way."""
    budget: float = 150.0
    """Seconds after which no further round of a shape begins, if there have been three."""
    training_steps: int = 3
    """Number of training steps of LLaMA-60M with which its refreshes are compared; 0 leaves that out."""
    seed: int = 0
    """Random seed for the gradients."""
    threads: int | None = None
    """Number of CPU threads; null leaves the choice to torch."""

    def __post_init__(self) -> None:
        if not self.shapes:
            raise SettingError("shapes=(): expected at least one, such as 512x1376")
        for shape in self.shapes:
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", shape) or min(size(shape)) < 4:
                raise SettingError(f"shapes={shape!r}: expected rows x columns of 4 or more, such as 512x1376")
            if self.rank is not None and not 1 <= self.rank < min(size(shape)):
                raise SettingError(
                    f"rank={self.rank}: expected 1 to {min(size(shape)) - 1}, below the shorter side of {shape}"
                )
        if not 1 <= self.condition < math.inf:
            raise SettingError(f"condition={self.condition}: expected a number >= 1")
        timing.check_rounds("pairs", self.pairs)
        if not self.budget >= 0:
            raise SettingError(f"budget={self.budget}: expected seconds >= 0")
        if self.training_steps and self.training_steps < timing.FEWEST:
            raise SettingError(f"training_steps={self.training_steps}: expected {timing.FEWEST} or more, or 0 for none")
        if self.threads is not None and self.threads < 1:
            raise SettingError(f"threads={self.threads}: expected a whole number >= 1")


def size(shape: str) -> tuple[int, int]:
    """Read ``"mxn"`` as ``(m, n)``."""
    m, n = map(int, shape.split("x"))
    return m, n


def measure(setting: RefreshSetting, step_seconds: float | None = None) -> dict[str, Any]:
    """Measure a row for each shape.

    ``ratio_vs_svd`` is the time of a refresh over that of ``svd``, as the geometric mean over shapes.

    Args:
        setting: what is measured.
        step_seconds: time of a training step of LLaMA-60M, if it has been measured in this process.
    """
    if setting.threads:
        torch.set_num_threads(setting.threads)
    if step_seconds is None and setting.training_steps and set(_layers()) <= set(setting.shapes):
        step_seconds = _training_step(setting)
    rows, pairs = [], []
    for shape in setting.shapes:
        row, seconds = _row(setting, shape)
        rows.append(row)
        pairs.append(list(zip(seconds["refresh"], seconds["svd_fp32"], strict=True)))
    return {
        "ratio_vs_svd": timing.interval(timing.mean_of_ratios, *pairs)
        | {"shapes": {row["shape"]: row["ratio_vs_svd"]["refresh"] for row in rows}},
        "rows": rows,
        "share_of_training": _share(rows, step_seconds),
        "condition": setting.condition,
        "machine": timing.machine(),
    }


def matrix(m: int, n: int, condition: float, seed: int) -> Tensor:
    """Make ``S diag(sigma) Vᵀ (m, n)`` in fp32: ``S`` and ``V`` random, ``sigma`` from 1 down to ``1 / condition``."""
    k = min(m, n)
    S, V = (
        linalg.haar(torch.empty(side, k), linalg.keyed_generator("bench", seed, name, m, n)).double()
        for name, side in (("left", m), ("right", n))
    )
    return (S * torch.logspace(0, -math.log10(condition), k, dtype=torch.float64) @ V.mT).float()


def _row(setting: RefreshSetting, shape: str) -> tuple[dict[str, Any], dict[str, list[float]]]:
    m, n = size(shape)
    rank = setting.rank or min(m, n) // 4
    weight = matrix(m, n, setting.condition, setting.seed)
    layout = layout_of((m, n), rank, "std")
    G = layout.enter(weight)
    selector = Importance()
    state = selector.init(G, rank)
    chosen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, choose: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], object]:
        return lambda: chosen.__setitem__(name, choose())

    contenders: dict[str, Callable[[], object]] = {
        "refresh": lambda: selector.refresh_(G, state, Key(setting.seed, shape, 0)),
        "gram_fp32": keep("gram_fp32", lambda: linalg.right_singular(G, "gram", torch.float32)),
        "svd_fp32": keep("svd_fp32", lambda: _svd(weight, layout.side)),
    }
    seconds = timing.rounds(contenders, setting.pairs, budget=setting.budget)
    # In fp64 as well: so a refresh does it below 512 columns.
    chosen = {"gram_fp64": linalg.right_singular(G, "gram", torch.float64)} | chosen
    exact = _svd(weight.double(), layout.side)
    return {
        "shape": shape,
        "rank": rank,
        "rounds": len(seconds["refresh"]),
        "seconds": {name: timing.median(taken) for name, taken in seconds.items()},
        "ratio_vs_svd": {
            name: timing.interval(timing.median_ratio, zip(taken, seconds["svd_fp32"], strict=True))
            for name, taken in seconds.items()
            if name != "svd_fp32"
        },
        "accuracy": {name: accuracy(G, found, exact, rank) for name, found in chosen.items()},
    }, seconds  # fmt: skip


def _svd(weight: Tensor, side: str | None) -> tuple[Tensor, Tensor]:
    """The SVD of the gradient as it is, which implementations of GaLore call.

    Returns singular values, and the vectors of the ``side`` that is compressed.
    """
    U, sigma, Vh = torch.linalg.svd(weight, full_matrices=False)
    return sigma, U if side == "left" else Vh.mT


def accuracy(G: Tensor, found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], rank: int) -> dict[str, float]:
    """Measure how far singular values and vectors of ``G (m, n)`` that were ``found`` are from ``exact``, in fp64.

    Returns:
        - ``largest_angle``: the largest angle between the spans of the ``rank`` leading vectors, in radians.
        - ``energy_lost``: the share of ``||G Q||²`` that ``Q`` captures less than the exact one.
        - ``probability_distance``: the total variation between SARA's sampling probabilities, which are
          ``sigma_i / sum_j sigma_j``.
        - ``probability_error``: the largest relative error of one of these probabilities.
    """
    (sigma, V), (true_sigma, true_V) = found, exact
    # Only their spans: columns in fp32 are off by 1e-7 in length, which would look like energy.
    Q, true_Q = (linalg.orthonormalise(vectors[:, :rank].double()) for vectors in (V, true_V))
    # By sine and cosine: a cosine cannot tell an angle below 1e-8 from zero, nor a sine one that near to a right angle.
    cosines = Q.mT @ true_Q
    sine, cosine = torch.linalg.matrix_norm(true_Q - Q @ cosines, 2), torch.linalg.matrix_norm(cosines, -2)
    captured, most = ((G.double() @ basis).square().sum() for basis in (Q, true_Q))
    p, true_p = (Importance().log_weights(values).exp() for values in (sigma, true_sigma))
    return {
        "largest_angle": float(torch.atan2(sine, cosine)),
        "energy_lost": float(1 - captured / most),
        "probability_distance": float((p - true_p).abs().sum() / 2),
        "probability_error": float((p / true_p - 1).abs().max()),
    }


def _layers() -> list[str]:
    model = llama_of(PRESETS[MODEL])
    return [f"{min(layer.out, layer.inputs)}x{max(layer.out, layer.inputs)}" for layer in model.block] * model.layers


def _share(rows: Sequence[Mapping[str, Any]], step_seconds: float | None) -> dict[str, Any] | None:
    """The time of a refresh of all linear layers of LLaMA-60M, as a share of ``PERIOD`` of its steps.

    ``None`` where a time is missing.
    """
    seconds = {row["shape"]: row["seconds"]["refresh"] for row in rows}
    if step_seconds is None or not seconds.keys() >= set(_layers()):
        return None
    refresh = sum(seconds[shape] for shape in _layers())
    return {
        "model": MODEL,
        "period": PERIOD,
        "refresh_seconds": refresh,
        "step_seconds": step_seconds,
        "share": refresh / (PERIOD * step_seconds),
    }


def _training_step(setting: RefreshSetting) -> float:
    from subspan.bench import train
    from subspan.bench.setting import Setting

    found = train.measure(Setting(MODEL, threads=setting.threads), setting.training_steps)
    return float(found["seconds"]["adamw_fused"])
