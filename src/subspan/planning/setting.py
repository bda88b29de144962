"""The setting of a plan: a model, a method, a batch, the ranks, and the memory that is available."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from subspan.utils.errors import SettingError
from subspan.utils.ranks import Rank

if TYPE_CHECKING:
    from subspan.recipes import Recipe

_UNITS = {"GiB": 2**30, "MiB": 2**20, "TiB": 2**40, "GB": 10**9, "MB": 10**6, "TB": 10**12}


@dataclass(frozen=True)
class PlanSetting:
    """A training step, and the memory in which it should fit."""

    model: str
    """Model: a preset (`subspan list models`), a config.json, a directory with one, or OWNER/NAME on the Hugging Face
    hub."""
    optimizer: str = "sara_adamw"
    """Name of an optimizer from `subspan list optimizers`."""
    rank: Rank | None = None
    """Rank of the subspaces, or its share of each compressed side, such as 0.25; null takes the preset's, or 128."""
    rank_pattern: dict[str, Rank] | None = None
    """Other ranks by name, such as {q_proj: 32, mlp: 0.5}. The first regular expression that is found in the name of a
    matrix gives its rank."""
    backward_side: bool | None = None
    """Let the backward pass make the low-rank gradient; null takes the optimizer's default."""
    share: Literal["auto", "none"] = "auto"
    """Backward-side: whether layers with the same input share a basis (auto), or not (none)."""
    batch: int = 1
    """Number of sequences in a forward pass of one rank."""
    seq: int | None = None
    """Number of tokens in a sequence; null takes the preset's, or the number of the model's positions, at most 1024."""
    accumulate: int = 1
    """Number of forward passes in a step."""
    dtype: Literal["bf16", "bf16-mixed", "fp32"] = "bf16"
    """Precision: bf16 keeps bf16 weights; bf16-mixed computes in bf16 and keeps fp32 weights."""
    state: Literal["32bit", "8bit"] | None = None
    """Precision of the moments; null takes the optimizer's default. Torch's AdamW keeps them in that of the weights."""
    world: int = 1
    """Number of ranks (processes)."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How ranks share the model: with ddp each rank holds all of it, with fsdp each holds a part."""
    checkpointing: bool = False
    """Recompute the activations of each block in the backward pass."""
    step_in_backward: bool = False
    """Step on each parameter in the backward pass and free its gradient (`enable_step_in_backward`)."""
    gpu: str | None = None
    """Memory of a device, such as 24GiB or 80GB; with null the plan does not say whether the step fits."""

    def __post_init__(self) -> None:
        from subspan.groups import check_rank  # these import torch, and the help of the command does not wait for it

        recipe = _recipe(self.optimizer)
        check_rank(1 if self.rank is None else self.rank, self.rank_pattern)
        for name in ("batch", "seq", "accumulate", "world"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name}={value}: expected a whole number >= 1")
        if self.gpu is not None:
            bytes_of(self.gpu)
        if self.state == "8bit" and not recipe.rule.moments:
            raise SettingError(
                f"state='8bit': {self.optimizer} keeps no moments that could be in 8 bits; leave it out, or use a "
                "method that does, such as sara_adamw"
            )
        if self.backward_side and recipe.selector is None:
            raise SettingError(
                f"backward_side=True: {self.optimizer} is full rank, and there is no low-rank gradient to make; "
                "leave it out, or use a method with a subspace, such as sara_adamw"
            )
        if self.step_in_backward and (self.optimizer == "adamw" or (self.parallel == "ddp" and self.world > 1)):
            why = (
                "is torch's own" if self.optimizer == "adamw" else "would step on gradients that ddp has yet to average"
            )
            raise SettingError(
                f"step_in_backward=True: {self.optimizer} {why}; leave it out, or use an optimizer with a subspace "
                "in one process or with parallel='fsdp'"
            )

    @property
    def is_backward_side(self) -> bool:
        """Whether the backward pass makes the low-rank gradient, once the default is known."""
        return _recipe(self.optimizer).backward_side if self.backward_side is None else self.backward_side

    @property
    def budget(self) -> int | None:
        """The memory of the device in bytes."""
        return None if self.gpu is None else bytes_of(self.gpu)

    @property
    def sharded(self) -> bool:
        """Whether a rank holds a part of each parameter."""
        return self.parallel == "fsdp" and self.world > 1

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients pile up during the backward pass. If not, they are there before it, or go as they come."""
        return self.accumulate == 1 and not self.sharded and not self.step_in_backward


def _recipe(name: str) -> "Recipe":
    from subspan.recipes import find

    return find(name)


def bytes_of(size: str) -> int:
    """Read a size such as ``"24GiB"`` as a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", size.strip())
    units = {unit.casefold(): number for unit, number in _UNITS.items()}
    if not found or found[2].casefold() not in units or float(found[1]) == 0:
        raise SettingError(
            f"gpu={size!r}: expected a size above zero with one of {', '.join(_UNITS)}, such as 24GiB or 80GB"
        )
    return int(float(found[1]) * units[found[2].casefold()])
