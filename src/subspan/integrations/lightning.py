"""Any optimizer by name in a ``LightningModule``, with the accumulation and the clipping of its ``Trainer``.

def configure_optimizers(self):
    return create("sara_adamw", self, rank=128, step_in_backward=True)

``subspan.create`` is enough for everything else: Lightning takes the optimizers as they are.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from subspan import factory
from subspan.integrations.step_in_backward import enable
from subspan.step.in_backward import Clip
from subspan.utils.errors import SettingError


def create(
    name: str, module: LightningModule, *, step_in_backward: bool = False, clip: Clip | None = None, **settings: Any
) -> torch.optim.Optimizer:
    """Return the optimizer of that name for ``module``; call it in ``configure_optimizers``.

    Args:
        name, settings: as in ``subspan.create``.
        module: what the ``Trainer`` fits. The ``Trainer`` tells how many micro-batches a step has
            (``accumulate_grad_batches``), and the largest norm (``gradient_clip_val``).
        step_in_backward: step on each parameter in the backward pass. Norms that Lightning logs are then of what was
            used, before clipping; between refreshes they are those of ``R``.
        clip: how to clip then; ``None`` stands for ``"lagged_global"``.

    Raises:
        SettingError: as ``subspan.create`` raises it, or steps in the backward pass are not possible.
    """
    optimizer = factory.create(name, module, **settings)
    if step_in_backward:
        trainer = module.trainer
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm not in (None, "norm"):
            raise SettingError(
                f"step_in_backward=True: gradient_clip_algorithm={str(trainer.gradient_clip_algorithm.value)!r} clips gradients "
                "that are gone by then; use 'norm'"
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        enable(
            optimizer,
            module,
            accumulate=_most_batches(trainer),
            clip=clip,
            max_norm=trainer.gradient_clip_val,
            scaled=scaler is not None,
        )
    return optimizer


def _most_batches(trainer: Any) -> int:
    """Return the largest number of micro-batches of a step, whatever the epoch."""
    schedules = [one.scheduling for one in trainer.callbacks if isinstance(one, GradientAccumulationScheduler)]
    return max([trainer.accumulate_grad_batches, *(number for one in schedules for number in one.values())])
