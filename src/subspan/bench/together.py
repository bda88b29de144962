"""``bench all``: every measurement of time in one process. The ratios that matter have names of their own."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from subspan.bench import grow, refresh, step, timing, train
from subspan.bench.grow import GrowSetting
from subspan.bench.peers import PEERS
from subspan.bench.refresh import RefreshSetting
from subspan.bench.setting import Setting
from subspan.bench.step import StepSetting
from subspan.utils.errors import SettingError

S = TypeVar("S")
PAIRS = 15
QUICK: dict[type, dict[str, Any]] = {
    Setting: {"tokens": 512},
    RefreshSetting: {"shapes": ("512x512", "512x1376"), "pairs": 5, "training_steps": 0},
    StepSetting: {"layers": 1, "pairs": 7},
    GrowSetting: {"widths": (128, 256, 512), "pairs": 3},
}
"""What ``--quick`` sets where the user has left the default. Less work gives other figures, under the same keys."""
QUICK_PAIRS = 5


@dataclass(frozen=True)
class AllSetting:
    """Settings of all measurements of time, each of which has a command of its own with more settings."""

    seed: int = 0
    """Random seed for weights, gradients and tokens."""
    threads: int | None = None
    """Number of CPU threads; null leaves the choice to torch."""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise SettingError(f"threads={self.threads}: expected a whole number >= 1")


def quickened(setting: S) -> S:
    """Return ``setting`` with less work, where it has the defaults."""
    default = {field.name: field.default for field in fields(setting)}  # type: ignore[arg-type]  # settings are dataclasses
    less = {key: value for key, value in QUICK.get(type(setting), {}).items() if getattr(setting, key) == default[key]}
    return replace(setting, **less)  # type: ignore[type-var]  # as above


def measure(setting: AllSetting, quick: bool, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure train, refresh, step and grow.

    Args:
        setting: what they share.
        quick: do less work, and leave out growth.
        say: is told what is measured next.

    Returns:
        Everything that was found, under the name of its measurement, and the ratios that matter as
        ``NAME.ratio...``: median, low, high, and the shapes that were measured.
    """
    began, faster = time.perf_counter(), quickened if quick else lambda setting: setting
    common: dict[str, Any] = {"seed": setting.seed, "threads": setting.threads}
    say("train: whole training steps")
    trained = train.measure(faster(Setting(**common)), QUICK_PAIRS if quick else PAIRS)
    say("refresh: choosing bases")
    # Compared with a step of few tokens, refreshes would look expensive.
    chosen = refresh.measure(faster(RefreshSetting(**common)), None if quick else trained["seconds"]["adamw_fused"])
    say("step: optimizers' steps")
    stepped = step.measure(faster(StepSetting(**common)))
    found: dict[str, Any] = {
        "refresh.ratio_vs_svd": chosen["ratio_vs_svd"],
        **{f"step.{key}": stepped[key] for key in (f"ratio_vs_{name}" for name in PEERS) if key in stepped},
        "train.ratio_vs_adamw_fused": trained["ratio_vs_adamw_fused"] | {"shapes": trained["shapes"]},
        "quick": quick,
        "train": trained,
        "refresh": chosen,
        "step": stepped,
    }
    if not quick:
        say("grow: widths and ranks")
        found["grow"] = grow.measure(GrowSetting(**common))
    machine = timing.machine(peer.distribution for peer in PEERS.values())
    return found | {"machine": machine, "seconds": time.perf_counter() - began}
