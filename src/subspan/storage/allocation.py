"""The state of an optimizer: what it is, and how it is allocated, restored and counted."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from subspan.utils.errors import SettingError

State = dict[str, Any]
"""Everything held for one parameter: tensors, and the integers of the schedule. No other objects (contract R1)."""


StateDtype = Literal["float32", "int8"]
"""How moments are kept: as they are computed, or in 8 bits (``storage/eight_bit.py``)."""


def allocate(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return zeros on the device of ``like``, in its dtype but in fp32 at least.

    In bf16 moments would lose small updates, and bases their orthogonality.
    """
    return torch.zeros(tuple(shape), device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))


def check_state(own: State, saved: Mapping[str, Any], name: str) -> None:
    """Raise unless ``saved`` can be copied into ``own``. The error names parameter, entry and difference."""
    if own.keys() != saved.keys():
        raise SettingError(
            f"optimizer state of {name!r}: the checkpoint holds {sorted(saved)}, this optimizer needs {sorted(own)}; "
            "build the optimizer with the method, rank and residual of the checkpoint"
        )
    for key, value in own.items():
        if not isinstance(value, Tensor) and not isinstance(saved[key], type(value)):
            raise SettingError(
                f"optimizer state of {name!r}: {key!r} is {saved[key]!r} in the checkpoint, expected "
                f"{type(value).__name__}; the checkpoint is damaged or of another version"
            )
        if isinstance(value, Tensor) and value.shape != torch.as_tensor(saved[key]).shape:
            raise SettingError(
                f"optimizer state of {name!r}: {key!r} has shape {tuple(torch.as_tensor(saved[key]).shape)} in the "
                f"checkpoint and {tuple(value.shape)} in this optimizer; build the optimizer with the checkpoint's "
                "rank and proj_type"
            )


def copy_state_(own: State, saved: Mapping[str, Any]) -> None:
    """Copy ``saved`` into the tensors of ``own``, which keep their dtypes and devices (contract R2).

    Where the parameter is on ``meta``, all of what is saved may be there. Counts on the CPU stay as they are then.
    """
    on_meta = any(isinstance(value, Tensor) and value.is_meta for value in own.values())
    for key, value in own.items():
        if isinstance(value, Tensor):
            given = torch.as_tensor(saved[key])
            if not (on_meta and given.is_meta and not value.is_meta):
                value.copy_(given)
        else:
            own[key] = saved[key]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors that ``optimizer``, ours or any of torch's, holds as state on this rank."""
    return sum(tensor_bytes(state) for state in optimizer.state.values())


def tensor_bytes(state: Mapping[str, Any]) -> int:
    """Return the bytes of the tensors in one parameter's state; of a DTensor, those of the local rows."""
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    local: list[Tensor] = [value.to_local() if hasattr(value, "to_local") else value for value in tensors]
    return sum(value.numel() * value.element_size() for value in local)
