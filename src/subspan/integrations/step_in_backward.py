"""What the integrations share: steps in the backward pass, with the accumulation and the clipping of a framework."""

from typing import Any

import torch
from torch import nn

from subspan.optimizer import SubspaceOptimizer
from subspan.step.in_backward import Clip
from subspan.utils.errors import SettingError


def enable(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    accumulate: int,
    clip: Clip | None,
    max_norm: float | None,
    scaled: bool = False,
) -> Any:
    """Step in the backward pass, as ``SubspaceOptimizer.enable_step_in_backward`` does, as a framework has been told.

    Args:
        accumulate: micro-batches of a step.
        clip: how to clip; ``None`` stands for ``"lagged_global"``.
        max_norm: the framework's largest norm; ``None`` or 0 does not clip.
        scaled: whether the framework scales the loss for fp16.

    Raises:
        SettingError: the optimizer cannot do it, or ``scaled``.
    """
    if not isinstance(optimizer, SubspaceOptimizer):
        raise SettingError(
            f"step_in_backward=True: {type(optimizer).__name__} is torch's own, which steps after the backward pass; use "
            "a method with a subspace, such as 'sara_adamw', or leave it out"
        )
    if scaled:
        raise SettingError(
            "step_in_backward=True: with fp16 a GradScaler looks at all gradients before a step, and these are gone by "
            "then; use bf16, or leave it out"
        )
    if not max_norm:
        return optimizer.enable_step_in_backward(model, accumulate=accumulate)
    return optimizer.enable_step_in_backward(model, accumulate, clip or "lagged_global", max_norm)
