"""Writing so that a reader, or a kill, finds the old file or the new one and nothing between."""

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
    """Put the directory ``new`` in the place of ``path``, which may exist."""
    for file in new.iterdir():
        sync(file)
    sync(new)
    if path.exists():
        remove_directory(path)
    new.rename(path)
    sync(path.parent)


def remove_directory(path: Path) -> None:
    """Remove ``path``: renamed first, so that half of it is never taken for the whole."""
    doomed = path.with_name(f"removed-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def sync(path: Path) -> None:
    """Make sure that ``path`` has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
