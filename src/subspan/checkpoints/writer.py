"""The one way in which a checkpoint comes to stand in its directory, whatever its files and however many its ranks.

For all ranks to use together, or for one process without a group::

    with new_checkpoint(Path("checkpoints"), step=100, keep=2) as folder:
        save_sharded(folder, model, optimizer)
        if rank == 0:
            torch.save(more, folder / "more.pt")

Files are written under a scratch name, hashed, and renamed when all of them are on the disk.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from subspan.checkpoints.checksums import seal
from subspan.checkpoints.collective import agree, is_agreed, on_first, world
from subspan.checkpoints.directory import INDEX, disk_bytes, list_checkpoints, name_of, step_of
from subspan.utils.atomic_files import (
    UNFINISHED,
    NotWrittenError,
    disk_error,
    disk_errors_explained,
    make_empty,
    no_space,
    remove_directory,
    replace_directory,
)
from subspan.utils.errors import InputError


@contextlib.contextmanager
def new_checkpoint(folder: Path, *, step: int, keep: int, best: int | None = None, needed: int = 0) -> Iterator[Path]:
    """Give an empty directory for the files of a checkpoint, which stands in ``folder`` when the block has ended.

    Older checkpoints are dropped then, except for the newest. What a rank writes must be in the one file system that
    all ranks see when the block ends. What only some ranks do in the block must not wait for other ranks.

    Args:
        folder: where the checkpoints of a run stand.
        step: the step of this one, which gives it its name.
        keep: how many checkpoints to keep, this one included. Those of later steps do not count.
        best: the step of another one to keep.
        needed: bytes it will take, where that is known; only a message says them.

    Raises:
        InputError: the checkpoint cannot be written, for example for want of space. It is the same on all ranks. The
            checkpoints before it stand, nothing unfinished is left, and a later one may be tried. Every other error
            of a rank comes out there as it is, and as a ``RuntimeError`` on ranks that have none of their own.
    """
    place, scratch = folder / name_of(step), folder / UNFINISHED

    def open_scratch() -> None:
        with disk_errors_explained(f"checkpoint {place}", folder, needed):
            make_empty(scratch)

    def publish() -> None:
        with disk_errors_explained(f"checkpoint {place}", folder, needed):
            # The index has the hashes of its shards.
            seal(scratch, skip="*.safetensors" if (scratch / INDEX).exists() else None)
            replace_directory(scratch, place)

    try:
        on_first(open_scratch)
        yield scratch
        agree(None)  # every rank has written
        on_first(publish)
    except Exception as error:
        _give_up(error, scratch, place, needed)
    except BaseException:  # an interrupt, of which other ranks may never know
        if world()[0] == 0:
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    on_first(lambda: _drop_old(folder, step, keep, best))


def _give_up(error: Exception, scratch: Path, place: Path, needed: int) -> NoReturn:
    """Leave nothing of a checkpoint that cannot be written, and raise what all ranks are to raise."""
    if not is_agreed(error):
        cause = disk_error(error, place.parent)
        try:
            agree(no_space(f"checkpoint {place}", place.parent, cause, needed) if cause else error)
        except Exception as agreed:
            error = agreed

    def clear() -> None:
        written = disk_bytes(scratch) if scratch.exists() else 0
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, NotWrittenError):  # now that the scratch is gone, the text tells the space that is left
            before = [disk_bytes(path) for path in list_checkpoints(place.parent)[-1:]]
            largest = max(needed, error.needed, written, *before)
            raise no_space(f"checkpoint {place}", place.parent, error.cause, largest) from error

    on_first(clear)
    raise error


def _drop_old(folder: Path, step: int, keep: int, best: int | None) -> None:
    """Remove all checkpoints up to that of ``step`` except for the ``keep`` newest and that of the step ``best``.

    Later ones are of a run that was continued further back, perhaps because they are damaged: they do not count.
    """
    for old in [path for path in list_checkpoints(folder) if step_of(path) <= step][:-keep]:
        if step_of(old) != best:
            try:
                remove_directory(old)
            except OSError as error:
                raise InputError(
                    f"checkpoint {old} cannot be removed: {error.strerror}; that of step {step} is saved; "
                    "let its folder be written, or remove it by hand"
                ) from error
