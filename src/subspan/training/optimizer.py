"""Create the optimizer of a run from its settings."""

from dataclasses import fields

import torch
from torch import nn

from subspan.factory import create
from subspan.step.carriers import layer_of
from subspan.step.work import whole_layout
from subspan.training.config.resolve import ResolvedConfig
from subspan.training.config.resolve_finetuning import ResolvedFinetune

_OF_LAYERS = ("share", "merge", "select_from")
"""Settings of backward-side layers, which ``project_backward`` takes."""


def build_optimizer(config: ResolvedConfig | ResolvedFinetune, model: nn.Module) -> torch.optim.Optimizer:
    """Create the optimizer that ``config`` names, for the parameters of ``model``."""
    finer = {setting.name: getattr(config.optim, setting.name) for setting in fields(config.optim)}
    return create(
        config.optimizer,
        model,
        lr=config.lr,
        rank=config.rank,
        rank_pattern=config.rank_pattern,
        update_proj_gap=config.update_proj_gap,
        scale=config.scale,
        weight_decay=config.weight_decay,
        seed=config.seed,
        total_steps=config.steps,
        **{name: value for name, value in finer.items() if name not in _OF_LAYERS},
    )


def uncompressed(optimizer: torch.optim.Optimizer) -> int:
    """Count the matrices that should be projected, but have a side that is no longer than the rank."""
    layouts = [
        whole_layout(p, group)
        for group in optimizer.param_groups
        if group.get("rank") is not None
        for p in group["params"]
        if layer_of(p) is None
    ]
    return sum(layout.side is None and len(layout.shape) > 1 for layout in layouts)
