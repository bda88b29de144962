"""The memory of one step under many methods. What a paper reports stands in a column of its own."""

from dataclasses import replace
from typing import Any

from subspan.costs.state_costs import StateCosts
from subspan.costs.traffic import Way
from subspan.planning.many_machines import groups
from subspan.planning.model import with_vocabulary
from subspan.planning.plan import Planner
from subspan.planning.setting import PlanSetting
from subspan.training.models.presets import PRESETS
from subspan.utils.errors import SettingError
from subspan.utils.ranks import Rank

METHODS = (
    ("adamw", False),
    ("adamw_8bit", False),
    ("galore_adamw", False),
    ("galore_adamw_8bit", False),
    ("sara_adamw", False),
    ("sara_adamw", True),
    ("sara_adamw_8bit", True),
    ("golore_adamw", False),
    ("fira_adamw", False),
    ("sara_adafactor", False),
    ("sara_adam_mini", False),
    ("rso_adamw", True),
)
"""The optimizers, each with whether the backward pass makes its low-rank gradient."""

SOURCE = "GaLore, arXiv 2403.03507, table 2: an estimate of weights and optimizer states in bf16, at ranks 128, 256, 256 and 512"
REPORTED = {  # GB
    "adamw": {"llama-60m": 0.36, "llama-130m": 0.76, "llama-350m": 2.06, "llama-1b": 7.80},
    "galore_adamw": {"llama-60m": 0.24, "llama-130m": 0.52, "llama-350m": 1.22, "llama-1b": 4.38},
}


def compare(setting: PlanSetting) -> dict[str, Any]:
    """Plan one row for each of ``METHODS``.

    Raises:
        SettingError: ``setting`` gives what the rows give themselves: the optimizer, its state or its side.
    """
    for key in ("optimizer", "state", "backward_side"):
        if (given := getattr(setting, key)) != getattr(PlanSetting, key):
            raise SettingError(
                f"{key}={given!r}: a comparison has a row for each method; leave it out, or leave out --compare"
            )
    found: dict[Any, int] = {}  # results of passes that methods share
    rows = []
    for name, backward_side in METHODS:
        stepping = setting.step_in_backward and name != "adamw"
        own = replace(setting, optimizer=name, backward_side=backward_side, state=None, step_in_backward=stepping)
        planner = Planner(own, found)
        costs = planner.costs(planner.rank, own.batch)
        rows.append({
            "name": name,
            "backward_side": backward_side,
            "bytes": costs.bytes | {"activations": planner.saved(planner.rank, own.batch), "total": costs.total},
            "fits": None if own.budget is None else costs.total <= own.budget,
            "papers_way_bytes": None if own.rank_pattern else papers_way(own.model, name, planner.rank),
            "reported_bytes": None if own.rank_pattern else _reported(own.model, name, planner.rank),
        })  # fmt: skip
    return {
        "model": setting.model,
        "rank": planner.rank,
        "rank_pattern": setting.rank_pattern,
        "batch": setting.batch,
        "seq": planner.seq,
        "accumulate": setting.accumulate,
        "checkpointing": setting.checkpointing,
        "step_in_backward": setting.step_in_backward,
        "dtype": setting.dtype,
        "per_rank": {"world": setting.world, "parallel": setting.parallel if setting.world > 1 else None},
        "gpu_bytes": setting.budget,
        "rows": rows,
        "reported": SOURCE,
        "assumptions": planner.assumptions()
        + ["torch's AdamW takes no steps in the backward pass"] * setting.step_in_backward,
    }


def papers_way(model: str, optimizer: str, rank: Rank) -> int | None:
    """Count weights, moments and bases as GaLore's table does, two bytes for each number.

    Returns ``None`` where moments have one byte, and for a model that is no preset.
    """
    costs = StateCosts.of_recipe(optimizer)
    if model not in PRESETS or costs.state_dtype != "float32":
        return None
    held = costs.bytes_held(groups(with_vocabulary(PRESETS[model]), rank, Way(optimizer)))
    return (held["weights"] + held["states"] + held["bases"]) // 2  # they are counted in fp32


def _reported(model: str, optimizer: str, rank: Rank) -> int | None:
    size = REPORTED.get(optimizer, {}).get(model)
    return None if size is None or rank != PRESETS[model].rank else round(size * 1e9)
