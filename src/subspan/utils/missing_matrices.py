"""Words for messages about matrices that are not there, or not to be trained."""

import difflib
import re
from collections.abc import Sequence

from torch import Tensor

FLATTENED = "Parameters flattened by FSDP1 or DeepSpeed have lost their shape: shard with fully_shard (FSDP2) instead"


def nothing_to_project(
    named: list[tuple[str, Tensor]], frozen: Sequence[Tensor], kept: Sequence[re.Pattern[str]]
) -> str:
    """Say why all-linear finds nothing among the trainable parameters, and what to do."""
    matrices = [name for name, p in named if p.ndim > 1]
    among = f"to project among {len(named)} trainable parameters; {names_like('', named)}. "
    if not matrices:
        if any(p.ndim > 1 for p in frozen):
            return (
                "model: every matrix is frozen, so there is no matrix to project; unfreeze those to train with "
                f"requires_grad_(True){quantised(frozen)}"
            )
        return f"targets='all-linear': there is no matrix {among}{FLATTENED}"
    words = f"targets='all-linear': no weight of an nn.Linear is left {among}"
    if all("lora_" in name for name in matrices) and any(pattern.pattern == "lora_" for pattern in kept):
        return (
            f"{words}The matrices of LoRA ('lora_') are excluded on purpose: they are narrow already, so that a subspace "
            "saves next to nothing. Train the model itself, without peft_config or get_peft_model, or give the adapters a "
            "full-rank optimizer such as 'adamw'. To project them all the same, name them: targets=['lora_']"
        )
    return f"{words}Name others with targets"


def quantised(frozen: Sequence[Tensor]) -> str:
    """Say so if frozen weights are codes, which no optimizer can train."""
    codes = sorted({str(p.dtype).removeprefix("torch.") for p in frozen if not p.is_floating_point()})
    return f". Weights in {' and '.join(codes)} are quantised: load the model without quantisation" if codes else ""


def names_like(pattern: str, named: list[tuple[str, Tensor]]) -> str:
    """Name some parameters for a message: those whose names are nearest to ``pattern``, matrices if there are any."""
    return looks_like(pattern, [name for name, p in named if p.ndim > 1] or [name for name, _ in named])


def looks_like(pattern: str, names: Sequence[str]) -> str:
    """Name some of ``names`` for a message: the nearest to ``pattern``."""
    near = difflib.get_close_matches(pattern, names, n=4, cutoff=0.2) or names[:4]
    return "the names look like " + ", ".join(repr(name) for name in near)
