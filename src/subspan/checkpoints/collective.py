"""What processes say to each other outside of training. In one process everything here does nothing."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from subspan.utils.atomic_files import NotWrittenError
from subspan.utils.errors import InputError, SettingError, UserError, first_line

Result = TypeVar("Result")


def world() -> tuple[int, int]:
    """Return this rank, and how many there are."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather(value: Result) -> list[Result]:
    """Return the ``value`` of every rank, on every rank. It travels pickled, among the processes of one run."""
    count = world()[1]
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    dist.all_gather_object(values, value)
    return values


def agree(error: Exception | None) -> None:
    """Raise on every rank if any has an ``error``: none goes on, or waits for one that does not come.

    Raises:
        UserError: the first rank that has an error has one of these; it is the same on all ranks.
        RuntimeError: that rank has an error of another kind. An error of another kind that this rank has comes out as
            it is.
    """
    if world()[1] == 1:
        if error is not None:
            vars(error)["agreed"] = True
            raise error
        return
    try:
        everyone = gather(error and _as_told(error))
    except Exception:
        if error is not None:  # what the group says after a device has failed, for example, is a consequence
            raise error from error.__cause__
        raise
    failed = [(rank, told) for rank, told in enumerate(everyone) if told]
    if not failed:
        return
    rank, told = failed[0]
    shown: Exception = told if isinstance(told, UserError) else RuntimeError(f"rank {rank}: {told}")
    if error is not None and not isinstance(error, UserError):
        shown = error
    vars(shown)["agreed"] = True
    raise shown from (error if error is not shown else error.__cause__)


def is_agreed(error: BaseException) -> bool:
    """Whether ``agree`` has raised ``error``, so that every rank knows of it."""
    return "agreed" in vars(error)


def together(action: Callable[[], Result]) -> Result:
    """Run ``action`` on every rank; each gets its own result when all have one. It may not communicate itself.

    Raises:
        UserError: ``action`` has raised one on any rank; see ``agree``, also for other errors.
    """
    result: Any = None
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    agree(error)
    return result


def on_first(action: Callable[[], Any]) -> None:
    """Run ``action`` on rank 0; the others go on when it is done, and raise if it has raised."""
    together(action if world()[0] == 0 else lambda: None)


def _as_told(error: Exception) -> UserError | str:
    """Return what the other ranks are told of ``error``, which must survive pickling."""
    if isinstance(error, NotWrittenError):
        return error
    if isinstance(error, UserError):
        return SettingError(str(error)) if isinstance(error, SettingError) else InputError(str(error))
    return first_line(error)
