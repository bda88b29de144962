"""What the processes of a run say to each other outside of training. In one process everything here does nothing."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from subspan.utils.errors import InputError, first_line

Result = TypeVar("Result")


def world() -> tuple[int, int]:
    """This rank, and how many there are."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather(value: Result) -> list[Result]:
    """``value`` of every rank, on every rank. It travels pickled, among the processes of one run."""
    count = world()[1]
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    dist.all_gather_object(values, value)
    return values


def together(action: Callable[[], Result]) -> Result:
    """Run ``action`` on every rank; each gets its own result, once all have one. It may not communicate itself.

    Raises:
        InputError: the same on all ranks, if ``action`` raised one on any: none goes on, or waits for who does not
            come.
        RuntimeError: it raised another error elsewhere. One that it raised here comes out as it is.
    """
    result: Any = None
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        if world()[1] == 1:
            raise
        error = caught
    said = error and (isinstance(error, InputError), first_line(error))
    failed = [(rank, *each) for rank, each in enumerate(gather(said)) if each]
    if not failed:
        return result
    if error is not None and not isinstance(error, InputError):
        raise error
    rank, is_input, message = failed[0]
    raise InputError(message) if is_input else RuntimeError(f"rank {rank}: {message}") from error


def first_alone(action: Callable[[], Any]) -> None:
    """Run ``action`` on rank 0; the others go on when it is done, and raise if it has raised."""
    together(action if world()[0] == 0 else lambda: None)
