"""The precision of the training: the dtype of the weights, autocast, and the scaling of the loss for fp16."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_COMPUTED_IN = {"bf16-mixed": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """How a run computes.

    With ``fp16`` small gradients would vanish. So the loss is multiplied by a large number before the backward pass,
    and the gradients are divided by it before they are clipped. A step with an infinite gradient is left out, and the
    number becomes smaller.

    Args:
        name: ``PretrainConfig.precision``, filled in.
        device: the device of the run.
    """

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device = name, device
        self.scaler = torch.amp.GradScaler(device, enabled=name == "fp16")

    def stateful(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"scaler": self.scaler} if self.name == "fp16" else {}

    def cast_(self, model: nn.Module) -> None:
        """Let ``model`` hold its weights in this precision."""
        if self.name == "bf16":
            for p in model.parameters():  # not the buffers: rotary frequencies in bf16 would be another model
                p.data = p.data.to(torch.bfloat16)

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(
            self.device, _COMPUTED_IN.get(self.name, torch.bfloat16), enabled=self.name in _COMPUTED_IN
        )

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients."""
        self.scaler.scale(loss).backward()

    def clip_(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], largest: float | None) -> Tensor:
        """Scale the gradients down to the norm ``largest``, if that is set. Returns the norm before."""
        self.scaler.unscale_(optimizer)
        if largest is None:
            # Not a clip with infinity: where one entry is infinite, that would turn every entry into NaN.
            return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return nn.utils.clip_grad_norm_(parameters, largest)

    def stepping(self, optimizer: torch.optim.Optimizer) -> Callable[[], object]:
        """Return what takes the step, or leaves it out."""

        def step() -> None:
            self.scaler.step(optimizer)
            self.scaler.update()

        return step
