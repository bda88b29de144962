"""The files and data sets that a setting names, and how a file is opened: unpacked, and in its encoding."""

import bz2
import codecs
import glob
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from subspan.training.data.embedded import CORPUS
from subspan.utils.errors import InputError

TEXT, JSON = (".txt", ".md"), (".jsonl", ".json", ".ndjson")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
COLUMNAR = (".parquet", ".arrow")
KINDS = (*TEXT, *JSON, *SEPARATORS, *COLUMNAR)
PACKED = (".gz", ".xz", ".bz2", ".zst")
_FIRST = re.compile(r"\.(txt|md|jsonl|json)(\.gz|\.xz)?$")
"""The files of a folder that are documents. Files of other kinds count in a folder that has none of these."""
_BESIDE = re.compile(r"(?i)^(readme|licen[cs]e|notice|changelog|datasets?_infos?)\b")
"""The files that accompany a data set and hold none of it."""
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")
_BYTES_OF_ZSTD = 2**17


@dataclass(frozen=True)
class Hub:
    """A data set on the Hugging Face hub."""

    name: str
    """``OWNER/NAME``, or ``OWNER/NAME:CONFIGURATION``."""
    argument: str = "data"
    """The setting that names it."""


Source = Path | Hub
"""A file, the folder of a data set that ``datasets`` has saved, or a data set on the hub."""


def kind_of(path: Path) -> str:
    """Return the suffix that says how ``path`` is read, or an empty text if it is of no known kind."""
    name, packed = path.name.lower(), path.suffix.lower() in PACKED
    kind = Path(name.removesuffix(path.suffix.lower()) if packed else name).suffix
    return kind if kind in KINDS and not (packed and kind in COLUMNAR) else ""


def find_files(pattern: str, argument: str) -> tuple[Source, ...]:
    """Find what the setting ``argument`` names: ``embedded``, a file, a folder, a glob, or a data set on the hub.

    A folder is searched through for text and JSON files. Where it has none, the tables in it are taken. A folder that
    ``datasets`` has saved is one source.

    Raises:
        InputError: no such file, or none of a kind that can be read.
    """
    if pattern == "embedded":
        return (CORPUS,)
    if not pattern.strip():  # the path of nothing is the working directory
        raise InputError(f"{argument}={pattern!r}: expected 'embedded', 'c4', 'slimpajama', or a file, folder or glob")
    path = Path(pattern).expanduser()
    kinds = f"{', '.join(KINDS)} files (text and tables also {', '.join(PACKED)})"
    if path.is_dir():
        found = [path] if is_saved(path) else _of_folder(path)
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found and _is_hub_name(pattern):
            return (Hub(pattern, argument),)
    if not found:
        raise InputError(
            f"{argument} {pattern!r}: no such file, and nothing to read there; "
            f"expected 'embedded', 'c4', 'slimpajama', a data set on the hub as OWNER/NAME, or {kinds}"
        )
    for file in found:
        if not file.is_dir() and not kind_of(file):
            raise InputError(f"{argument}: {file} is of no known kind; expected {kinds}")
    return tuple(found)


def left_out(pattern: str, found: Iterable[Source]) -> str | None:
    """Return a line about the files of the folder ``pattern`` that could be read and are not, if there are any."""
    path, taken = Path(pattern).expanduser(), set(found)
    if pattern == "embedded" or not path.is_dir() or is_saved(path):
        return None
    others = [p for p in path.rglob("*") if p.is_file() and kind_of(p) and p not in taken and not _BESIDE.match(p.name)]
    if not others:
        return None
    kinds = ", ".join(sorted({"".join(p.suffixes[-2:]) if p.suffix in PACKED else p.suffix for p in others}))
    return (
        f"{pattern}: {len(taken)} files are read, and {len(others)} others ({kinds}) are not, because a folder is read "
        f"for text and JSON files first; name the others by a glob, such as '{path / '**' / f'*{others[0].suffix}'}'"
    )


def is_saved(path: Path) -> bool:
    """Whether ``path`` is a folder that ``save_to_disk`` of ``datasets`` has written."""
    return (path / "dataset_dict.json").is_file() or all(
        (path / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def files_of(source: Source) -> list[Path]:
    """Return the files whose content is that of ``source``; there are none for the hub."""
    if isinstance(source, Hub):
        return []
    return sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]


def check_encoding(encoding: str | None) -> None:
    """Raise an ``InputError`` unless Python knows the ``encoding`` as one of text."""
    if encoding is not None:
        try:
            "".encode(encoding)
            codecs.lookup(encoding)
        except (LookupError, ValueError) as error:
            raise InputError(
                f"encoding={encoding!r}: Python knows no such encoding of text; "
                "give one such as utf-8, latin-1, cp1252 or utf-16"
            ) from error


@contextmanager
def opened(path: Path, newline: str | None = None, encoding: str | None = None) -> Iterator[IO[str]]:
    """Open ``path`` as text, unpacked, under ``reading``.

    Args:
        path: the file.
        newline: as for ``open``.
        encoding: that of the text. By default it is UTF-8, and a byte order mark at the beginning is left out.
    """
    with (
        reading(path, encoding),
        _open_bytes(path) as packed,
        io.TextIOWrapper(packed, encoding=encoding or "utf-8-sig", newline=newline) as file,
    ):
        yield file


@contextmanager
def reading(path: Path, encoding: str | None = None) -> Iterator[None]:
    """Turn what goes wrong while ``path`` is read into an ``InputError`` that names it."""
    try:
        yield
    except UnicodeError as error:
        expected = f"expected {encoding} text" if encoding else "expected UTF-8 text"
        raise InputError(
            f"data file {path} cannot be read: {_undecodable(path, encoding)}{error}; {expected}, "
            f"or name its encoding, such as --encoding {_likely_encoding(path)}"
        ) from error
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"data file {path} cannot be read: {error}; put back a whole copy of it") from error
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> InputError:
    """Return the error for a file that the system, or the program that unpacks it, cannot read."""
    return InputError(f"data file {path} cannot be read: {error.strerror or error}; put it back, or give other --data")


def _is_hub_name(pattern: str) -> bool:
    owner = Path(pattern.partition("/")[0])
    return bool(_HUB_NAME.fullmatch(pattern)) and not kind_of(Path(pattern)) and not owner.exists()


def _of_folder(path: Path) -> list[Path]:
    every = sorted(p for p in path.rglob("*") if p.is_file() and kind_of(p))
    first = [p for p in every if _FIRST.search(p.name)]
    if all(_BESIDE.match(p.name) for p in first):
        tables = [p for p in every if p not in first]
        return tables or first
    return first


def _open_bytes(path: Path) -> IO[bytes]:
    opens: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _open_zstd}
    return opens.get(path.suffix.lower(), open)(path, "rb")


def _open_zstd(path: Path, _: str) -> IO[bytes]:
    return io.BufferedReader(_Zstd(open(path, "rb")), _BYTES_OF_ZSTD)


class _Zstd(io.RawIOBase):
    """The content of a ``.zst`` file of one or more frames. The package's own reader is silent about a file cut short.

    Raises:
        EOFError: the file ends within a frame.
        OSError: it is no such file.
    """

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard  # only such files need it

        self._file, self._zstd = file, zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._packed, self._ready, self._within = b"", memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._packed or self._file.read(_BYTES_OF_ZSTD)
            if not packed:
                if self._within:
                    raise EOFError("the compressed file ends before the end of its text")
                return 0
            try:
                self._ready = memoryview(self._frame.decompress(packed))
            except self._zstd.ZstdError as error:
                raise OSError(str(error)) from error
            self._within, self._packed = not self._frame.eof, self._frame.unused_data
            if self._frame.eof:
                self._frame = self._zstd.ZstdDecompressor().decompressobj()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _undecodable(path: Path, encoding: str | None) -> str:
    """Return ``line N: `` for the first line that is no text, or nothing where that cannot be said."""
    name = codecs.lookup(encoding or "utf-8").name
    if name.startswith(("utf-16", "utf-32")):  # a byte of a line's end is no line's end there
        return ""
    try:
        with _open_bytes(path) as file:
            for number, line in enumerate(file, 1):
                try:
                    line.decode(name)
                except UnicodeDecodeError:
                    return f"line {number}: "
    except (OSError, EOFError, lzma.LZMAError, zlib.error):
        pass
    return ""


def _likely_encoding(path: Path) -> str:
    try:
        with _open_bytes(path) as file:
            return "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin-1"
    except (OSError, EOFError, lzma.LZMAError, zlib.error):
        return "latin-1"
