"""The record of a study: a file with one line of JSON for each finished run, appended as the run finishes."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from subspan.utils.errors import InputError
from subspan.utils.messages import say

Record = dict[str, Any]
"""``key`` and ``status`` (``finished`` or ``diverged``), ``row``, ``seed``, ``lr``, and what was measured."""


def read_records(path: Path) -> dict[str, Record]:
    """Return the records by key, or none if there is no file.

    A last line that a kill has cut short does not count.

    Raises:
        InputError: a line is no record; the message names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    records = {}
    for number, line in enumerate(lines, 1):
        found = parse_line(line)
        if not line.endswith("\n") and not isinstance(found, dict):
            continue
        if not _is_record(found):
            raise InputError(f"{path}:{number}: is no record of a run; mend or remove that line, the others are kept")
        records[found["key"]] = found
    return records


def is_of_committed_code(record: Mapping[str, Any]) -> bool:
    """Whether the code that computed the run was in a commit, as far as the record says."""
    return not str(record.get("commit", "")).endswith("-dirty")


def parse_line(line: str | bytes) -> Any:
    """Return what a line of JSON says, or ``None`` for a line that is no JSON."""
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return None


def _is_record(found: Any) -> TypeGuard[Record]:
    if not isinstance(found, dict) or not isinstance(found.get("key"), str):
        return False
    loss = found.get("val_loss")
    has_loss = isinstance(loss, int | float) and not math.isnan(loss)
    return found.get("status") == "diverged" or (found.get("status") == "finished" and has_loss)


def read_all(folder: Path, first: Path) -> dict[str, Record]:
    """Return the records of every study in ``folder``: a run of another study counts here too.

    Where two files have a record of the same run, that of ``first`` is taken.
    """
    records: dict[str, Record] = {}
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: path == first):
        if path == first or _is_study(path):
            records |= read_records(path)
    return records


def _is_study(path: Path) -> bool:
    """Whether the file holds records, by its first whole line. Other results are kept beside them."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return next(("key" in found for line in file if isinstance(found := parse_line(line), dict)), False)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; let it be read, or move it away") from error


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Append, so that a kill leaves whole lines and at most one cut one, which the next append removes.

    A last record that only lacks the end of its line, as an editor may leave it, gets that end.

    Raises:
        InputError: the file cannot be written.
    """
    lines = b"".join((json.dumps(record) + "\n").encode() for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            file.seek(0)
            content = file.read()
            if content and not content.endswith(b"\n"):
                begin = content.rfind(b"\n") + 1
                if isinstance(parse_line(content[begin:]), dict):
                    file.write(b"\n")
                else:
                    say(f"{path}: the last line was cut short and is removed")
                    file.truncate(begin)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give another file with --results") from error
