"""Writing so that a reader, or a kill, never finds half of a file or a directory under its name."""

import os
import shutil
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by a file of ``text``, at once."""
    scratch = path.with_name(f".{path.name}.unfinished")
    scratch.write_text(text)
    sync(scratch)
    scratch.replace(path)


def replace_directory(new: Path, path: Path) -> None:
    """Put ``new`` in the place of ``path``, if there is one. Between two renames there is none, never half of one."""
    for file in new.iterdir():
        sync(file)
    sync(new)
    old = _set_aside(path) if path.exists() else None
    new.rename(path)
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
