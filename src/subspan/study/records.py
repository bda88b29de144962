"""The record of a study: one line of JSON for each finished run, appended as it finishes."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from subspan.utils.errors import InputError
from subspan.utils.messages import say

Record = dict[str, Any]
"""``key`` and ``status`` (``finished`` or ``diverged``), ``row``, ``seed``, ``lr``, and what was measured."""


def read_records(path: Path) -> dict[str, Record]:
    """Records by key; none if there is no file. A last line that a kill has cut short does not count.

    Raises:
        InputError: a line is no record; names file and line.
    """
    try:
        lines = path.read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    records = {}
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n") and not _is_whole(line):
            continue
        try:
            record = json.loads(line)
            records[record["key"]] = record
            status = record["status"]
            good = status == "diverged" or (status == "finished" and record["val_loss"] + 0 == record["val_loss"])
        except (ValueError, TypeError, KeyError):
            good = False
        if not good:
            raise InputError(f"{path}:{number}: is no record of a run; mend or remove that line, the others are kept")
    return records


def read_all(folder: Path, first: Path) -> dict[str, Record]:
    """The records of every study in ``folder``, those of ``first`` before others: a run of another study counts here
    too.
    """
    records: dict[str, Record] = {}
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: path == first):
        if path == first or _is_study(path):
            records |= read_records(path)
    return records


def _is_study(path: Path) -> bool:
    """Whether the file holds records, by its first line that is whole; other results are kept beside them."""
    with open(path, errors="replace") as file:
        return next(("key" in json.loads(line) for line in file if _is_whole(line)), False)


def _is_whole(line: str | bytes) -> bool:
    """Of a line without its end: only with its last brace is it JSON."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Append, so that a kill leaves whole lines and at most one cut one, which the next append removes.

    A last record that is whole but for the end of its line, as an editor may leave it, gets that end.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = open(path, "ab+")  # noqa: SIM115  # the writing below has errors of its own
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give another file with --results") from error
    with opened as file:
        file.seek(0)
        content = file.read()
        if content and not content.endswith(b"\n"):
            begin = content.rfind(b"\n") + 1
            if _is_whole(content[begin:]):
                file.write(b"\n")
            else:
                say(f"{path}: the last line was cut short and is removed")
                file.truncate(begin)
        for record in records:
            file.write((json.dumps(record) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
