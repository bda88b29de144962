"""Files and directories that appear whole or not at all, whatever interrupts the writing, a full disk included."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from subspan.utils.errors import InputError, first_line

UNFINISHED = "unfinished"
"""Name of the directory in which the files of another one are written, beside it."""
_SAID = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)|Os \{ code: (\d+)")
_NO_DISK = (ConnectionError, ChildProcessError, ProcessLookupError)
"""Errors of the system that a disk never causes."""
_TORCH = re.compile(r"PytorchStreamWriter failed|unexpected pos \d+ vs \d+|iostream error|File .* cannot be opened")


class NotWrittenError(InputError):
    """A file or a directory that the disk does not take, nearly always for want of space; see ``no_space``.

    Attributes:
        cause: what the disk said.
        needed: bytes that the file or the directory takes.
    """

    cause: OSError
    needed: int


def disk_error(error: BaseException, folder: Path) -> OSError | None:
    """Return what the disk said where ``error`` comes from a write into ``folder``, or ``None`` for any other error.

    The Rust of safetensors and tokenizers hides the number of the error in a text. ``torch.save`` tells no number: it
    speaks of positions in its file. An ``OSError`` without a number is not from the system but from a library, and one
    that names a file elsewhere has nothing to do with the writing.
    """
    if isinstance(error, NotWrittenError):
        return error.cause
    if isinstance(error, OSError) and not isinstance(error, shutil.Error):
        is_system = error.errno is not None and not isinstance(error, _NO_DISK)
        return error if is_system and _is_about(error, folder) else None
    kind = type(error)
    if kind in (Exception, shutil.Error) or kind.__module__.startswith("safetensors"):
        if found := _SAID.search(str(error)):
            number = int(next(filter(None, found.groups())))
            return OSError(number, os.strerror(number))
    elif kind is RuntimeError and _TORCH.search(str(error)):
        return OSError(first_line(error))
    return None


def _is_about(error: OSError, folder: Path) -> bool:
    """Whether the file that ``error`` names, if it names one, is in ``folder``, or a directory above it."""
    if not isinstance(error.filename, str | os.PathLike):
        return True
    named, place = Path(error.filename).absolute(), folder.absolute()
    return named.is_relative_to(place) or place.is_relative_to(named)


def is_full(error: BaseException) -> bool:
    """Whether ``error`` says that no space is left, or none that this user may have."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def no_space(what: str, folder: Path, error: BaseException, needed: int) -> NotWrittenError:
    """Make the error for what cannot be written, which is nearly always for want of space.

    Args:
        what: what cannot be written, with its path.
        folder: the directory in which it lies, or would.
        error: what the disk said.
        needed: bytes it takes.
    """
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    try:
        free = shutil.disk_usage(existing).free
        have = f"{readable(free)} are free under {existing}"
    except OSError as trouble:
        free, have = needed, f"{existing} says nothing of its space ({trouble.strerror})"
    number = getattr(error, "errno", None)
    full = is_full(error) or (number is None and free < needed)
    said = "no space is left" if full else (getattr(error, "strerror", None) or first_line(error))
    remedy = "make room" if full else "make room or mend it" if number is None else "mend it"
    made = NotWrittenError(
        f"{what} cannot be written: {said}; it needs about {readable(needed)}, {have}; "
        f"{remedy}, then save again, or continue the run with --resume auto"
    )
    made.cause, made.needed = disk_error(error, folder) or OSError(first_line(error)), needed
    return made


@contextlib.contextmanager
def disk_errors_explained(what: str, folder: Path, needed: int) -> Iterator[None]:
    """Turn an error of the disk into that of ``no_space``. Every other error comes out as it is."""
    try:
        yield
    except Exception as error:
        if (cause := disk_error(error, folder)) is None:
            raise
        raise no_space(what, folder, cause, needed) from error


def readable(number: int) -> str:
    """Write a number of bytes for a person: ``3.1 MB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number} bytes"


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by a file of ``text``, at once.

    Raises:
        InputError: it cannot be written, for example for want of space. What was there before stands.
    """
    scratch = path.with_name(f".{path.name}.{UNFINISHED}")
    with disk_errors_explained(str(path), path.parent, len(text.encode())):
        try:
            scratch.write_text(text, encoding="utf-8")
            sync(scratch)
            scratch.replace(path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def written(what: str, place: Path, needed: int) -> Iterator[Path]:
    """Give an empty directory beside ``place``, which becomes ``place`` when the block ends.

    Args:
        what: what is written, for a message, which goes on with ``place``.
        place: the directory to write, or to replace.
        needed: bytes it will take, for the same message.

    Raises:
        InputError: it cannot be written, for example for want of space. What was at ``place`` before stands.
    """
    scratch = place.with_name(UNFINISHED)
    with disk_errors_explained(f"{what} {place}", place.parent, needed):
        try:
            make_empty(scratch)
            yield scratch
            replace_directory(scratch, place)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


def make_empty(folder: Path) -> None:
    """Make ``folder`` an empty directory; what a kill has left in it is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def replace_directory(new: Path, path: Path) -> None:
    """Put ``new`` in the place of ``path``, if there is one. Between two renames there is none, never half of one.

    If that fails, both are where they were.
    """
    for file in new.rglob("*"):
        sync(file)
    sync(new)
    old = _set_aside(path) if path.exists() else None
    try:
        new.rename(path)
        sync(path.parent)
    except BaseException:
        if not new.exists():
            path.rename(new)
        if old:
            old.rename(path)
        raise
    if old:
        shutil.rmtree(old, ignore_errors=True)  # ``path`` stands already


def remove_directory(path: Path) -> None:
    """Remove ``path``: renamed first, so that half of it is never taken for the whole."""
    shutil.rmtree(_set_aside(path))


def _set_aside(path: Path) -> Path:
    doomed = path.with_name(f"removed-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)  # left by a removal that a kill cut short
    path.rename(doomed)
    return doomed


def sync(path: Path) -> None:
    """Make sure that ``path``, a file or a directory, has reached the disk.

    Windows syncs what is open for writing only, and opens no directory: a rename there is as safe as the system makes
    it. Some file systems sync no directory either.
    """
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except PermissionError:
        if is_folder:
            return
        descriptor = os.open(path, os.O_RDONLY)  # a file that nobody may write any more
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
