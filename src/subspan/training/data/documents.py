"""Documents and their split, from the embedded corpus, from files, or from saved data sets.

No document is in two parts, except for one that outweighs all others: its end may be the validation part.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low
from typing import Any, Literal, NamedTuple, get_args

from subspan.training.data.columns import find_text, first_of, looked_at, samples, unused_texts
from subspan.training.data.files import (
    JSON,
    TEXT,
    Hub,
    Source,
    check_encoding,
    files_of,
    find_files,
    kind_of,
    left_out,
    opened,
    reading,
    unreadable,
)
from subspan.training.data.json_records import PARTS
from subspan.training.data.pieces import cut_near_end, pieces_of, whole_or_pieces
from subspan.training.data.records import Record, read_records
from subspan.utils.errors import InputError
from subspan.utils.suggestions import near_names

Split = Literal["train", "validation", "test"]
"""The part of a document: training, the part that choices are made by, or the part that nothing is chosen by."""
SPLITS: tuple[Split, ...] = get_args(Split)
VALIDATION_SHARE = 0.05
_LEAST_SHARE = 0.01
"""Share of the text that validation holds at least where a document outweighs the others, which is cut otherwise."""


class Piece(NamedTuple):
    """A document, or a part of a very long one."""

    part: Split
    text: str
    ends: bool
    """Whether the document ends with it."""


class _Found(NamedTuple):
    pieces: Iterable[str]
    part: Split | None
    """The part that the document names."""


@dataclass(frozen=True)
class Documents:
    """A set of sources, and more if validation or test has its own."""

    files: tuple[Source, ...]
    validation_files: tuple[Source, ...] = ()
    test_files: tuple[Source, ...] = ()
    text_column: str | None = None
    """Column of the text, where a source has columns. By default it is found."""
    encoding: str | None = None
    """Encoding of the files. By default it is UTF-8."""
    notes: list[str] = field(default_factory=list, compare=False)
    """Lines for a person about what was found. They are complete when the documents have been read."""

    forms: dict[str, None] = field(default_factory=dict, compare=False)
    """The forms of the sources, with the column of the text, in the order in which they were met."""

    def identity(self) -> list[tuple[str, int, int]]:
        """Return path, bytes and time of change of each file, which differ whenever a file has changed."""
        found = []
        for kind, sources in (("train", self.files), ("validation", self.validation_files), ("test", self.test_files)):
            for source in sources:
                if isinstance(source, Hub):
                    found.append((f"{kind}:hub:{source.name}", 0, 0))
                for path in files_of(source):
                    try:
                        stat = path.stat()
                    except OSError as error:
                        raise unreadable(path, error) from error
                    found.append((f"{kind}:{path.resolve()}", stat.st_size, stat.st_mtime_ns))
        return found

    def names(self) -> str:
        """Return the names of the sources, of which there may be many, in a few words."""
        shown = [_shown(source) for source in self.files[:3]]
        return ", ".join(shown) + (f" and {len(self.files) - 3} more" if len(self.files) > 3 else "")

    def split(self) -> Iterator[tuple[Split, str]]:
        """Yield every document with its part, whole; see ``pieces``."""
        texts: list[str] = []
        for part, text, ends in self.pieces():
            texts.append(text)
            if ends:
                yield part, "".join(texts)
                texts = []

    def pieces(self) -> Iterator[Piece]:
        """Yield every document with its part, a very long one in pieces.

        A document that names its ``split`` keeps it, and so do the files of validation and of test. Among all others,
        the 5 % with the smallest hashes of their text are validation. So equal documents share a part, and the order of
        files does not matter. A document that is in several parts is kept in the last one of train, validation, test.

        A document that outweighs the others is never validation as a whole: it holds more than a quarter of the text,
        and is more than twice as long as the median. Where without it validation would hold less than 1 % of the text,
        its own last 5 % are validation, from the beginning of a paragraph on. So it is with a single document.
        """
        test, held, free, long = set[bytes](), set[bytes](), dict[bytes, int](), dict[int, bytes]()
        test |= {own for own, *_ in self._hashed(self.test_files)}
        held |= {own for own, *_ in self._hashed(self.validation_files)}
        for number, (own, length, count, part) in enumerate(self._hashed(self.files)):
            if count > 1:
                long[number] = own
            if part == "test" and not self.test_files:
                test.add(own)
            elif part == "validation":
                held.add(own)
            elif part is None:
                free[own] = length
        for own in test & free.keys():
            del free[own]
        cut: tuple[bytes, int] | None = None
        if not self.validation_files and free:
            heavy = _outweighing(free)
            chosen = sorted(free.keys() - {heavy})[: max(1, round(len(free) * VALIDATION_SHARE))]
            if heavy is not None and not held:
                if sum(free[own] for own in chosen) < _LEAST_SHARE * sum(free.values()):
                    cut = self._cut(heavy, free[heavy], long)
                    chosen = [] if cut else chosen
            elif len(free) == 1:
                chosen = []
            held |= set(chosen)
        for number, (pieces, part) in enumerate(self._read(self.files)):
            texts = iter(pieces)
            first = next(texts)
            own = long.get(number) or text_hash(first)
            rest = _with_first(first, texts)
            if own in test:
                if part == "test" and not self.test_files:
                    yield from _marked("test", rest)
            elif cut and own == cut[0]:
                yield from _cut_in_two(rest, cut[1])
            elif own not in held:
                if part != "test":
                    yield from _marked("train", rest)
            elif not self.validation_files and part != "train":
                yield from _marked("validation", rest)
            for _ in rest:  # what is not wanted is read over
                pass
        for pieces, _ in self._read(self.validation_files):
            whole = list(pieces)
            if text_hash("".join(whole)) not in test:
                yield from _marked("validation", iter(whole))
        for pieces, _ in self._read(self.test_files):
            yield from _marked("test", iter(pieces))

    def _hashed(self, sources: tuple[Source, ...]) -> Iterator[tuple[bytes, int, int, Split | None]]:
        """Yield hash, length, number of pieces and named part of each document."""
        for pieces, part in self._read(sources):
            digest, length, count = hashlib.blake2b(digest_size=16), 0, 0
            for text in pieces:
                digest.update(text.encode())
                length += len(text)
                count += 1
            yield digest.digest(), length, count, part

    def _cut(self, heavy: bytes, length: int, long: dict[int, bytes]) -> tuple[bytes, int] | None:
        """Return where the document of the hash ``heavy`` is cut in two, if it can be."""
        for number, (pieces, _) in enumerate(self._read(self.files)):
            texts = iter(pieces)
            first = next(texts)
            if (long.get(number) or text_hash(first)) == heavy:
                found = cut_near_end(_with_first(first, texts), length, VALIDATION_SHARE)
                if found is None:
                    return None
                self._note(
                    f"data: a single text outweighs all others; its last {1 - found.place / length:.1%}, from the "
                    f"beginning of a {found.unit} on, are the validation part (--validation_data names other files)"
                )
                return heavy, found.place
            for _ in texts:
                pass
        return None

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    # --- what the sources hold -------------------------------------------------------------------------------------

    def _read(self, sources: tuple[Source, ...]) -> Iterator[_Found]:
        """Yield documents and the split they name: a text file is one document, and so is a record of other files."""
        for source in sources:
            if isinstance(source, Path) and kind_of(source) in TEXT:
                self.forms["text files"] = None
                with opened(source, encoding=self.encoding) as file:
                    for pieces in pieces_of(file):
                        yield _Found(_guarded(pieces, source, self.encoding), None)
            else:
                yield from self._records(source, by_name=len(sources) > 1)

    def _records(self, source: Source, by_name: bool) -> Iterator[_Found]:
        first, records = looked_at(read_records(source, self.encoding))
        if not first:
            return
        column = self._column(source, first)
        kind = "data set" if isinstance(source, Hub) or source.is_dir() else kind_of(source)[1:]
        self.forms[f"{kind} ({column})"] = None
        is_json = isinstance(source, Path) and kind_of(source) in JSON
        own_part = part_of_name(source) if by_name and not is_json else None
        empty = 0
        for where, values, part in records:
            if column not in values:
                raise InputError(
                    f"{where}: has no column {column!r}; {near_names(column, map(str, values))}; "
                    "name it with --text_column"
                )
            text = values[column]
            if text is None and not is_json:
                empty += 1
                continue
            if not isinstance(text, str):
                raise InputError(
                    f'{where}: "{column}" is {type(text).__name__}, expected a string; mend the line, or name another '
                    "column with --text_column"
                )
            named = part or _named_part(values.get("split"), where, is_json) or own_part
            if not encodable(text):
                raise InputError(
                    f'{where}: "{column}" holds half a surrogate pair, which UTF-8 cannot hold; mend the file'
                )
            if text.strip():
                yield _Found(whole_or_pieces(text), named)
        if empty:
            self._note(f"{_shown(source)}: {empty} rows have no {column!r} and are left out")

    def _column(self, source: Source, first: list[Record]) -> str:
        cells = samples(first)
        known = {str(name): None for record in first for name in record.values}
        column = self.text_column
        if column is None:
            column = "text" if "text" in known else find_text(cells)
            if column is None:
                talk = first_of(("messages", "conversations", "instruction", "prompt"), known)
                raise InputError(
                    f"{first[0].where}: which column is the text is not clear; there are {', '.join(known)}; name one "
                    "with --text_column" + ("; subspan finetune --task lm learns prompts and answers" if talk else "")
                )
            if column != "text":
                self._note(f"{_shown(source)}: the text is the column {column!r}")
        elif column not in known:
            raise InputError(
                f"text_column={column!r}: {first[0].where} has no such column; {near_names(column, known)}; "
                "leave it out, and it is looked for"
            )
        if others := unused_texts(cells, [column, "split"]):
            self._note(
                f"{_shown(source)}: the text in {' and '.join(map(repr, others))} is not used; "
                f"--text_column {others[0]} takes that in place of {column!r}"
            )
        return column


def find_documents(
    data: str,
    validation_data: str | None = None,
    test_data: str | None = None,
    text_column: str | None = None,
    encoding: str | None = None,
) -> Documents:
    """Find the sources that ``data`` names: ``embedded``, a file, a folder (searched through), a glob, or the hub.

    Raises:
        InputError: no such file, or none of a kind that can be read; or no such encoding.
    """
    check_encoding(encoding)
    files = find_files(data, "data")
    documents = Documents(
        files,
        find_files(validation_data, "validation_data") if validation_data else (),
        find_files(test_data, "test_data") if test_data else (),
        text_column,
        encoding,
    )
    if others := left_out(data, files):
        documents.notes.append(others)
    return documents


def _guarded(pieces: Iterable[str], path: Path, encoding: str | None) -> Iterator[str]:
    """Yield ``pieces`` that are still to be read. They are read outside of the block that has opened the file."""
    with reading(path, encoding):
        yield from pieces


def _outweighing(free: dict[bytes, int]) -> bytes | None:
    """Return the hash of the document that outweighs all others, if one does; ``free`` has their lengths."""
    largest = max(free, key=lambda own: (free[own], own))
    share = free[largest] / sum(free.values())
    return largest if len(free) == 1 or (share > 0.25 and free[largest] > 2 * median_low(free.values())) else None


def _with_first(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _marked(part: Split, texts: Iterator[str]) -> Iterator[Piece]:
    before: str | None = None
    for text in texts:
        if before is not None:
            yield Piece(part, before, False)
        before = text
    if before is not None:
        yield Piece(part, before, True)


def _cut_in_two(texts: Iterator[str], place: int) -> Iterator[Piece]:
    """Yield the pieces before ``place`` as training, and those behind it as validation."""
    last: list[str] = []

    def before() -> Iterator[str]:
        left = place
        for text in texts:
            if text[:left]:
                yield text[:left]
            if len(text) > left:
                last.append(text[left:])
                return
            left -= len(text)

    def behind() -> Iterator[str]:
        yield from last
        yield from texts

    yield from _marked("train", before())
    yield from _marked("validation", behind())


def _named_part(given: Any, where: str, strict: bool) -> Split | None:
    if strict and given not in (None, *SPLITS):
        raise InputError(f'{where}: "split" is {given!r}, expected one of {", ".join(SPLITS)}, or none')
    return PARTS.get(given) if isinstance(given, str) else None


def part_of_name(path: Source) -> Split | None:
    """Return the part that the name of a file, or of its folder, tells, as in train-00000-of-00002.parquet."""
    if isinstance(path, Hub):
        return None
    words = [*path.parent.name.lower().split("-"), *path.name.lower().replace("_", "-").replace(".", "-").split("-")]
    return next((PARTS[word] for word in reversed(words) if word in PARTS), None)


def _shown(source: Source) -> str:
    return source.name if isinstance(source, Hub) else str(source)


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
