"""Documents and their split, from the embedded corpus or from text and JSONL files; no document is in two parts."""

import glob
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from subspan.training.data.embedded import CORPUS
from subspan.utils.errors import InputError

Split = Literal["train", "validation", "test"]
"""The part of a document: training, the part that choices are made by, or the part that nothing is chosen by."""
SPLITS: tuple[Split, ...] = get_args(Split)
VALIDATION_SHARE = 0.05
_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_TEXT, _JSON = (".txt", ".md"), (".jsonl", ".json")


@dataclass(frozen=True)
class Documents:
    """A set of files, and more if validation or test has its own."""

    files: tuple[Path, ...]
    validation_files: tuple[Path, ...] = ()
    test_files: tuple[Path, ...] = ()

    def identity(self) -> list[tuple[str, int, int]]:
        """Return path, bytes and time of change of each file, which differ whenever a file has changed."""
        found = []
        for kind, files in (("train", self.files), ("validation", self.validation_files), ("test", self.test_files)):
            for path in files:
                try:
                    stat = path.stat()
                except OSError as error:
                    raise _unreadable(path, error) from error
                found.append((f"{kind}:{path.resolve()}", stat.st_size, stat.st_mtime_ns))
        return found

    def split(self) -> Iterator[tuple[Split, str]]:
        """Yield every document with its part.

        A document that names its ``split`` keeps it, and so do the files of validation and of test. Among all others,
        the 5 % with the smallest hashes of their text are validation. So equal documents share a part, and the order of
        files does not matter. A document that is in several parts is kept in the last one of train, validation, test.
        """
        test, held, free = set(_hashes(self.test_files)), set(_hashes(self.validation_files)), set[bytes]()
        for text, part in _read(self.files):
            if part == "test" and not self.test_files:
                test.add(text_hash(text))
            elif part == "validation":
                held.add(text_hash(text))
            elif part is None:
                free.add(text_hash(text))
        free -= test
        if not self.validation_files and len(free) > 1:
            held |= set(sorted(free)[: max(1, round(len(free) * VALIDATION_SHARE))])
        for text, part in _read(self.files):
            own = text_hash(text)
            if own in test:
                if part == "test" and not self.test_files:
                    yield "test", text
            elif own not in held:
                if part != "test":
                    yield "train", text
            elif not self.validation_files and part != "train":
                yield "validation", text
        for text, _ in _read(self.validation_files):
            if text_hash(text) not in test:
                yield "validation", text
        for text, _ in _read(self.test_files):
            yield "test", text


def find_documents(data: str, validation_data: str | None = None, test_data: str | None = None) -> Documents:
    """Find the files that ``data`` names: ``embedded``, a file, a folder (searched through), or a glob.

    Raises:
        InputError: no such file, or none of a kind that can be read.
    """
    return Documents(
        find_files(data, "data"),
        find_files(validation_data, "validation_data") if validation_data else (),
        find_files(test_data, "test_data") if test_data else (),
    )


def _hashes(files: tuple[Path, ...]) -> Iterator[bytes]:
    return (text_hash(text) for text, _ in _read(files))


def find_files(pattern: str, argument: str) -> tuple[Path, ...]:
    """Find the files of documents that the setting ``argument`` names; see ``find_documents``."""
    if pattern == "embedded":
        return (CORPUS,)
    if not pattern.strip():  # the path of nothing is the working directory
        raise InputError(f"{argument}={pattern!r}: expected 'embedded', 'c4', 'slimpajama', or a file, folder or glob")
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p))
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    kinds = ", ".join((*_TEXT, *_JSON))
    if not found:
        raise InputError(
            f"{argument} {pattern!r}: no such file, and nothing to read there; "
            f"expected 'embedded', 'c4', 'slimpajama', or {kinds} files (also .gz, .xz)"
        )
    for file in found:
        if not _kind(file):
            raise InputError(f"{argument}: {file} is of no known kind; expected {kinds} files (also .gz, .xz)")
    return tuple(found)


def _kind(path: Path) -> str:
    name = path.name.removesuffix(path.suffix) if path.suffix in _OPEN else path.name
    return next((kind for kind in (*_TEXT, *_JSON) if name.endswith(kind)), "")


@contextmanager
def opened(path: Path, newline: str | None = None) -> Iterator[io.TextIOBase]:
    """Open ``path`` as text, unpacked. What goes wrong while it is read becomes an ``InputError`` that names it."""
    try:
        with _OPEN.get(path.suffix, open)(path, "rt", encoding="utf-8", newline=newline) as file:
            yield file
    except (UnicodeDecodeError, EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"data file {path} cannot be read: {error}; expected UTF-8 text") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _read(files: tuple[Path, ...]) -> Iterator[tuple[str, Split | None]]:
    """Yield documents and the split they name: a text file is one document, and so is a line of JSON."""
    for path in files:
        with opened(path) as file:
            yield from _documents_of(file, path)


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"data file {path} cannot be read: {error.strerror or error}; put it back, or give other --data")


def _documents_of(file: io.TextIOBase, path: Path) -> Iterator[tuple[str, Split | None]]:
    if _kind(path) in _TEXT:
        text = file.read()
        if text.strip():
            yield text, None
        return
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, half = row["text"], row.get("split")
        # Numbers and nesting have limits.
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f'data file {path}, line {number}: {error!r}; expected one JSON object a line with a "text"'
            ) from error
        if not isinstance(text, str):
            raise InputError(f'data file {path}, line {number}: "text" is {type(text).__name__}, expected a string')
        if half not in (None, *SPLITS):
            raise InputError(
                f'data file {path}, line {number}: "split" is {half!r}, expected one of {", ".join(SPLITS)}, or none'
            )
        if not encodable(text):
            raise InputError(
                f'data file {path}, line {number}: "text" holds half a surrogate pair, which UTF-8 cannot hold; '
                "mend the file"
            )
        if text.strip():
            yield text, half


def encodable(text: str) -> bool:
    """Whether UTF-8 can hold ``text``; it cannot hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def text_hash(text: str) -> bytes:
    """Return a hash that puts a text in the same part, in whatever order texts are read."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
