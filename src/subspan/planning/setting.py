"""What is planned: a model, a method, a batch, the ranks, and the memory there is."""

import re
from dataclasses import dataclass
from typing import Literal

from subspan.recipes import find
from subspan.utils.errors import SettingError

_UNITS = {"GiB": 2**30, "MiB": 2**20, "TiB": 2**40, "GB": 10**9, "MB": 10**6, "TB": 10**12}


@dataclass(frozen=True)
class PlanSetting:
    """A training step, and the memory it is to fit in."""

    model: str
    """A preset (`subspan list models`), a config.json, a directory with one, or OWNER/NAME on the Hugging Face hub."""
    optimizer: str = "sara_adamw"
    """A name from `subspan list optimizers`."""
    rank: int | None = None
    """Of the subspaces; null is the preset's, or 128."""
    backward_side: bool | None = None
    """Let the backward pass make the low-rank gradient; null is the optimizer's own."""
    batch: int = 1
    """Sequences in a forward pass of one rank."""
    seq: int | None = None
    """Tokens in a sequence; null is the preset's, or as many as the model has positions, 1024 at most."""
    accumulate: int = 1
    """Forward passes in a step."""
    dtype: Literal["bf16", "bf16-mixed", "fp32"] = "bf16"
    """bf16 keeps bf16 weights; bf16-mixed computes in bf16 and keeps fp32 weights."""
    state: Literal["32bit", "8bit"] | None = None
    """How moments are kept; null is the optimizer's own. Torch's own AdamW keeps them as the weights are."""
    world: int = 1
    """Ranks."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """ddp, each rank holds the model; fsdp, each holds a part of it."""
    checkpointing: bool = False
    """Recompute the activations of each block in the backward pass."""
    step_in_backward: bool = False
    """Step on each parameter in the backward pass and free its gradient (`enable_step_in_backward`)."""
    gpu: str | None = None
    """Memory of a device, such as 24GiB or 80GB; null gives no verdict."""

    def __post_init__(self) -> None:
        recipe = find(self.optimizer)
        for name in ("rank", "batch", "seq", "accumulate", "world"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name}={value}: expected a whole number >= 1")
        if self.gpu is not None:
            bytes_of(self.gpu)
        if self.state == "8bit" and not recipe.rule.moments:
            raise SettingError(
                f"state='8bit': {self.optimizer} keeps no moments that could be in 8 bits; leave it out, or use a "
                "method that "
                "does, such as sara_adamw"
            )
        if self.backward_side and recipe.selector is None:
            raise SettingError(
                f"backward_side=True: {self.optimizer} is full rank, and there is no low-rank gradient to make; "
                "leave it out, "
                "or use a method with a subspace, such as sara_adamw"
            )
        if self.step_in_backward and (self.optimizer == "adamw" or (self.parallel == "ddp" and self.world > 1)):
            why = (
                "is torch's own" if self.optimizer == "adamw" else "would step on gradients that ddp has yet to average"
            )
            raise SettingError(
                f"step_in_backward=True: {self.optimizer} {why}; leave it out, or use an optimizer with a subspace "
                "in one "
                "process or with parallel='fsdp'"
            )

    @property
    def is_backward_side(self) -> bool:
        """What ``backward_side`` comes to."""
        return find(self.optimizer).backward_side if self.backward_side is None else self.backward_side

    @property
    def budget(self) -> int | None:
        """``gpu`` in bytes."""
        return None if self.gpu is None else bytes_of(self.gpu)

    @property
    def sharded(self) -> bool:
        """Whether a rank holds a part of each parameter."""
        return self.parallel == "fsdp" and self.world > 1

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients pile up during the backward pass. Else they are there before it, or go as they come."""
        return self.accumulate == 1 and not self.sharded and not self.step_in_backward


def bytes_of(size: str) -> int:
    """``"24GiB"`` in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", size.strip())
    units = {unit.casefold(): number for unit, number in _UNITS.items()}
    if not found or found[2].casefold() not in units or float(found[1]) == 0:
        raise SettingError(
            f"gpu={size!r}: expected a size above zero with one of {', '.join(_UNITS)}, such as 24GiB or 80GB"
        )
    return int(float(found[1]) * units[found[2].casefold()])
