"""A record of the files of a directory, ``checksums.json``, that tells whether they are as they were written.

A disk that loses or changes bytes says nothing, and a changed weight still loads. So each file is hashed when it is
saved and before it is used.
"""

import hashlib
import json
from pathlib import Path

RECORD = "checksums.json"


def seal(folder: Path, skip: str | None = None) -> None:
    """Write the record of ``folder``, when all of its files are there.

    Args:
        folder: the directory.
        skip: a pattern of names that have a record of their own.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not (skip and path.match(skip))]
    files = {path.relative_to(folder).as_posix(): _entry(path) for path in paths}
    (folder / RECORD).write_text(json.dumps({"hash": "blake2b", "files": files}, indent=1) + "\n", encoding="utf-8")


def is_sealed(folder: Path) -> bool:
    """Whether ``folder`` has a record; a checkpoint of an early version has none."""
    return (folder / RECORD).exists()


def damage(folder: Path) -> str | None:
    """Return what is wrong with the files of ``folder``, or ``None`` if they are as written or have no record.

    Files that the record does not name may be anything: someone may have put a note beside a checkpoint.
    """
    if not is_sealed(folder):
        return None
    try:
        record = json.loads((folder / RECORD).read_bytes())
        files = {name: (entry["bytes"], entry["digest"]) for name, entry in record["files"].items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        return f"{RECORD} cannot be read ({type(error).__name__})"
    if not files:
        return f"{RECORD} names no file"
    # Sizes first: they cost nothing.
    for name, (size, _) in files.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} holds {path.stat().st_size:,} bytes, was written with {size:,}"
        except (OSError, ValueError, TypeError) as error:
            return f"{name} cannot be read ({error})"
    for name, (_, digest) in files.items():
        try:
            if digest_of(folder / name) != digest:
                return f"{name} is not as it was written (its checksum differs)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _entry(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "digest": digest_of(path)}


def digest_of(path: Path, size: int = 16) -> str:
    """Return the hash of a file, of ``size`` bytes, read a piece at a time."""
    digest = hashlib.blake2b(digest_size=size)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
