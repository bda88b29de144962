"""Any optimizer by name for a loop with Accelerate, which may step in the backward pass.

optimizer = create(accelerator, "sara_adamw", model, rank=128, step_in_backward=True, max_norm=1.0)

``subspan.create`` is enough for everything else: Accelerate takes the optimizers as they are.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from subspan import factory
from subspan.integrations.step_in_backward import enable
from subspan.step.in_backward import Clip


def create(
    accelerator: Accelerator,
    name: str,
    model: nn.Module,
    *,
    step_in_backward: bool = False,
    clip: Clip | None = None,
    max_norm: float | None = None,
    **settings: Any,
) -> torch.optim.Optimizer:
    """Return the optimizer of that name for ``model``, which ``accelerator.prepare`` has prepared.

    Args:
        accelerator: tells how many micro-batches a step has (``gradient_accumulation_steps``).
        name, model, settings: as in ``subspan.create``.
        step_in_backward: step on each parameter in the backward pass. ``accelerator.clip_grad_norm_`` returns the norm
            of what was used then, before clipping; between refreshes it is that of ``R``.
        clip: how to clip then; ``None`` stands for ``"lagged_global"``.
        max_norm: largest norm; ``None`` does not clip. Give ``accelerator.clip_grad_norm_`` the same one.

    Raises:
        SettingError: as ``subspan.create`` raises it, or steps in the backward pass are not possible.
    """
    optimizer = factory.create(name, model, **settings)
    if step_in_backward:
        accumulate, scaled = accelerator.gradient_accumulation_steps, accelerator.scaler is not None
        enable(optimizer, model, accumulate=accumulate, clip=clip, max_norm=max_norm, scaled=scaled)
    return optimizer
