"""Writing so that a reader, or a kill, never finds half of a file or a directory under its name."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from subspan.utils.errors import InputError, first_line


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by a file of ``text``, at once.

    Raises:
        InputError: it cannot be written, for want of space say. What was there before stands.
    """
    scratch = path.with_name(f".{path.name}.unfinished")
    try:
        scratch.write_text(text)
        sync(scratch)
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise no_space(str(path), path.parent, error, len(text.encode())) from error


def no_space(what: str, folder: Path, error: BaseException, needed: int) -> InputError:
    """The error for a file that cannot be written, which is nearly always for want of space.

    Args:
        what: what cannot be written, with its path.
        folder: where it lies, or would.
        needed: bytes it takes.
    """
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    try:
        free = shutil.disk_usage(existing).free
        have = f"{readable(free)} are free under {existing}"
    except OSError as trouble:
        free, have = needed, f"{existing} says nothing of its space ({trouble.strerror})"
    # Not every writer says that the disk was full: torch's speaks of positions in its file.
    full = free < needed or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    cause = "no space is left" if full else (getattr(error, "strerror", None) or first_line(error))
    return InputError(
        f"{what} cannot be written: {cause}; it needs about {readable(needed)}, {have}; "
        "make room or mend it, then continue with --resume auto"
    )


def readable(number: int) -> str:
    """Bytes for a person: ``3.1 MB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number} bytes"


@contextlib.contextmanager
def written(what: str, place: Path, needed: int) -> Iterator[Path]:
    """An empty directory beside ``place``, which becomes ``place`` once what is done in it is done.

    Args:
        what: it is, for a message, which goes on with ``place``.
        needed: bytes it will take, for the same.

    Raises:
        InputError: it cannot be written, for want of space say. What was at ``place`` before stands.
    """
    scratch = place.with_name("unfinished")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
        replace_directory(scratch, place)
    except Exception as error:  # of a full disk, torch, safetensors and tokenizers raise errors of three kinds
        shutil.rmtree(scratch, ignore_errors=True)
        raise no_space(f"{what} {place}", place.parent, error, needed) from error


def replace_directory(new: Path, path: Path) -> None:
    """Put ``new`` in the place of ``path``, if there is one. Between two renames there is none, never half of one."""
    for file in new.iterdir():
        sync(file)
    sync(new)
    old = _set_aside(path) if path.exists() else None
    try:
        new.rename(path)
    except OSError:
        if old:
            old.rename(path)
        raise
    sync(path.parent)
    if old:
        shutil.rmtree(old)


def remove_directory(path: Path) -> None:
    """Remove ``path``: renamed first, so that half of it is never taken for the whole."""
    shutil.rmtree(_set_aside(path))


def _set_aside(path: Path) -> Path:
    doomed = path.with_name(f"removed-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)  # of a removal that a kill cut short
    path.rename(doomed)
    return doomed


def sync(path: Path) -> None:
    """Make sure that ``path`` has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
