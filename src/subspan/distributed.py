"""The only file that knows torch.distributed. In one process everything here does nothing."""

import torch
import torch.distributed as dist
from torch import Tensor

from subspan.state import State


def world() -> tuple[int, int]:
    """This rank, and how many there are."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def mean_(A: Tensor) -> Tensor:
    """Replace ``A`` by its mean over the ranks."""
    if world()[1] > 1:
        dist.all_reduce(A)
        A.div_(world()[1])
    return A


def share_(state: State, keys: list[str], others: list[Tensor], owner: int) -> None:
    """Give every rank the owner's value of ``state[key]``, tensors and integers, and of the tensors ``others``."""
    tensors = [state[key] for key in keys if isinstance(state[key], Tensor)] + others
    for tensor in tensors:
        dist.broadcast(tensor, owner)
    names = [key for key in keys if not isinstance(state[key], Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    numbers = torch.tensor([state[key] for key in names], dtype=torch.int64, device=device)
    dist.broadcast(numbers, owner)
    state.update(zip(names, numbers.tolist(), strict=True))
