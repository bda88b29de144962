"""A checkpoint of any format becomes one of a run: written under a scratch name, and renamed when all of it is on the
disk.

For all ranks to call together, or for one process without a group::

    scratch = open_scratch(run / "checkpoints")
    save_sharded(scratch, model, optimizer)  # and whatever else belongs to it, on whichever rank
    publish(scratch, step=100, keep=2)
"""

import shutil
from pathlib import Path

from subspan.checkpoints.collective import first_alone
from subspan.checkpoints.directory import drop_old, name_of
from subspan.utils.atomic_files import replace_directory
from subspan.utils.errors import InputError, first_line


def open_scratch(folder: Path) -> Path:
    """An empty directory inside ``folder`` for the files of one checkpoint. What a kill has left in it is removed."""
    scratch = folder / "unfinished"

    def clear() -> None:
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"checkpoint {scratch} cannot be written: {first_line(error)}; make room") from error

    first_alone(clear)
    return scratch


def publish(scratch: Path, *, step: int, keep: int, best: int | None = None) -> Path:
    """Rename ``scratch`` to the checkpoint of ``step``, then drop all but the ``keep`` newest up to it and that of
    ``best``.

    It waits for every rank, so each has written by then what it writes; those files that only another machine has in
    its
    cache must have been synced there.

    Raises:
        InputError: the same on every rank, if it cannot be renamed. The checkpoints before it stand.
    """
    place = scratch.with_name(name_of(step))

    def rename() -> None:
        try:
            replace_directory(scratch, place)
            drop_old(scratch.parent, step, keep, best)
        except OSError as error:
            raise InputError(f"checkpoint {place} cannot be written: {first_line(error)}; make room") from error

    first_alone(lambda: None)  # all ranks are here, and have written
    first_alone(rename)
    return place
