"""The optimizer of a run, from its settings."""

import torch
from torch import nn

from subspan.factory import create
from subspan.step.carriers import layer_of
from subspan.step.layout import layout_of
from subspan.training.config.resolve import ResolvedConfig
from subspan.training.config.resolve_finetuning import ResolvedFinetune


def build_optimizer(config: ResolvedConfig | ResolvedFinetune, model: nn.Module) -> torch.optim.Optimizer:
    """By the name in ``config``."""
    return create(
        config.optimizer,
        model,
        lr=config.lr,
        rank=config.rank,
        update_proj_gap=config.update_proj_gap,
        scale=config.scale,
        proj_type=config.optim.proj_type,
        transfer=config.optim.transfer,
        selector=config.optim.selector,
        rule=config.optim.rule,
        residual=config.optim.residual,
        betas=config.optim.betas,
        eps=config.optim.eps,
        weight_decay=config.weight_decay,
        stagger=config.optim.stagger,
        eta=config.optim.eta,
        proximal=config.optim.proximal,
        state_dtype=config.optim.state_dtype,
        min_8bit_size=config.optim.min_8bit_size,
        bf16_stochastic_round=config.optim.bf16_stochastic_round,
        lr_full=config.optim.lr_full,
        seed=config.seed,
        total_steps=config.steps,
        targets=config.optim.targets,
    )


def uncompressed(optimizer: torch.optim.Optimizer) -> int:
    """How many matrices that should be projected have a side no longer than the rank."""
    shapes = [
        layout_of(p.shape, group["rank"], group["proj_type"], group["flatten"])
        for group in optimizer.param_groups
        if group.get("rank") is not None
        for p in group["params"]
        if layer_of(p) is None
    ]
    return sum(layout.side is None and len(layout.shape) > 1 for layout in shapes)
