"""The entries of a JSON file, in whichever form it has them: one a line, an array, within an object, or by columns.

An array is read entry by entry, and lines are read line by line, so neither is held in memory as a whole.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from subspan.utils.errors import InputError

CONTAINERS = ("data", "rows", "examples", "instances", "records", "items", "samples", "dataset")
"""Names under which a file keeps its entries within one object."""
_OF_A_RECORD = {"text", "content", "prompt", "instruction", "question", "input", "messages", "conversations"}
"""Names that only a record has, and not an object that holds records."""
PARTS: dict[str, Literal["train", "validation", "test"]] = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "eval": "validation", "test": "test", "testing": "test",
}  # fmt: skip
"""What data sets call their parts, and the part that is meant."""
Entry = tuple[str, Any, Literal["train", "validation", "test"] | None]
"""Where an entry is, the entry, and the part that it is filed under, if it is."""
_CHUNK = 2**18
_EXPECTED = "expected one JSON object a line, or an array of objects"
_UNUSABLE = (ValueError, RecursionError)  # numbers and nesting have limits


def json_entries(file: IO[str], path: Path) -> Iterator[Entry]:
    """Yield the entries of a file. An entry is a dict, or a text in an array of texts.

    Raises:
        InputError: the file is not JSON, or an entry is no object; the message names file and line.
    """
    first, number = file.readline(_CHUNK), 1
    while first and not first.strip():
        first, number = file.readline(_CHUNK), number + first.endswith("\n")
    if first.lstrip().startswith("["):
        yield from _array(file, path, first, number)
        return
    if not first:
        return
    if not first.endswith("\n"):
        first += file.readline()
    try:
        known = json.loads(first)
    except _UNUSABLE as error:
        # An object over several lines. In a file that calls itself one of lines, the line is broken.
        if path.name.lower().removesuffix(path.suffix.lower()).endswith(".jsonl") or path.suffix.lower() == ".jsonl":
            raise _broken(path, number, error) from error
        yield from _objects(first + file.read(), path, number)
        return
    _check_twice(first, path, number)
    yield from _within(known, f"data file {path}, line {number}", path)
    for number, line in enumerate(file, number + 1):  # noqa: B020  # goes on from the first line
        if line.strip():
            try:
                value = json.loads(line)
            except _UNUSABLE as error:
                raise _broken(path, number, error) from error
            yield from _within(value, f"data file {path}, line {number}", path)


def _array(file: IO[str], path: Path, begun: str, number: int) -> Iterator[Entry]:
    """Yield the entries of an array that begins in the line ``begun``, whose number is given, in pieces of the file."""
    decoder, buffer, place, first = json.JSONDecoder(), begun, begun.index("[") + 1, True
    while True:
        start = _skip(buffer, place, " \t\r\n,")
        if buffer[start : start + 1] == "]":
            break
        number += buffer.count("\n", place, start)
        place = start
        try:
            value, place = decoder.raw_decode(buffer, start)
        except _UNUSABLE as error:
            if piece := file.read(max(_CHUNK, len(buffer) - start)):
                buffer, place = buffer[start:] + piece, 0
                continue
            raise _broken(path, number + buffer.count("\n", start, getattr(error, "pos", start)), error) from error
        if first:
            _check_twice(buffer[start:place], path, number)
        first = False
        yield from _within(value, f"data file {path}, line {number}", path, texts=True)
        number += buffer.count("\n", start, place)
        if place > _CHUNK:
            buffer, place = buffer[place:], 0
    if rest := buffer[start + 1 :].strip() or file.read().strip():
        raise InputError(
            f"data file {path}: {rest[:40]!r} stands behind the end of its array; {_EXPECTED}; remove what is behind it"
        )


def _objects(text: str, path: Path, number: int) -> Iterator[Entry]:
    """Yield objects that are written over several lines each, the first of which has the given ``number``."""
    decoder, place, first = json.JSONDecoder(), 0, True
    while (start := _skip(text, place, " \t\r\n")) < len(text):
        number += text.count("\n", place, start)
        try:
            value, place = decoder.raw_decode(text, start)
        except _UNUSABLE as error:
            raise _broken(path, number + text.count("\n", start, getattr(error, "pos", start)), error) from error
        if first:
            _check_twice(text[start:place], path, number)
        first = False
        yield from _within(value, f"data file {path}, line {number}", path)
        number += text.count("\n", start, place)


def _skip(text: str, place: int, blanks: str) -> int:
    while place < len(text) and text[place] in blanks:
        place += 1
    return place


def _within(value: Any, where: str, path: Path, texts: bool = False) -> Iterator[Entry]:
    """Yield ``value``, or the entries that it holds."""
    if texts and isinstance(value, str):
        yield where, value, None
        return
    if texts and _are_turns(value):
        yield where, {"messages": value}, None
        return
    if not isinstance(value, dict):
        raise InputError(f"{where}: is {type(value).__name__}, {_EXPECTED}")
    if value and value.keys() <= PARTS.keys() and all(map(_are_entries, value.values())):
        for name, inner in value.items():
            yield from ((f"{where}, {name} entry {i}", entry, PARTS[name]) for i, entry in enumerate(inner, 1))
        return
    held = [name for name in CONTAINERS if _are_entries(value.get(name))]
    if held and not _OF_A_RECORD & value.keys():
        for i, entry in enumerate(value[held[0]], 1):
            own = entry.get("row") if held[0] == "rows" and isinstance(entry.get("row"), dict) else entry
            yield f"{where}, {held[0]} entry {i}", own, None
        return
    columns = list(value.values())
    if len(value) > 1 and all(isinstance(column, dict) and column for column in columns):  # as pandas writes tables
        rows = list(columns[0])
        if all(list(column) == rows for column in columns) and all(row.isdigit() for row in rows):
            yield from ((f"{where}, row {row}", {name: value[name][row] for name in value}, None) for row in rows)
            return
    yield where, value, None


def _are_entries(inner: Any) -> bool:
    """Whether ``inner`` is a list of records, and not the turns of a talk."""
    return isinstance(inner, list) and bool(inner) and isinstance(inner[0], dict) and not _are_turns(inner)


def _are_turns(inner: Any) -> bool:
    first = inner[0] if isinstance(inner, list) and inner else None
    return isinstance(first, dict) and bool({"role", "from"} & first.keys())


def _check_twice(line: str, path: Path, number: int) -> None:
    """Raise if the first entry names a column more than once. JSON would keep the last one silently."""

    def names(pairs: list[tuple[str, Any]]) -> None:
        seen = set()
        for name, _ in pairs:
            if name in seen:
                raise InputError(
                    f"data file {path}, line {number}: names the column {name!r} more than once; "
                    "give each a name of its own"
                )
            seen.add(name)

    json.loads(line, object_pairs_hook=names)


def _broken(path: Path, number: int, error: Exception) -> InputError:
    return InputError(f"data file {path}, line {number}: {error}; {_EXPECTED}")
