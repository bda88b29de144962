"""Labelled examples, from a file of JSON lines, CSV or TSV, or from GLUE through ``datasets``."""

import csv
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspan.training.data.documents import encodable, opened, text_hash
from subspan.training.data.task_specs import TaskSpec
from subspan.utils.errors import FAULTS, InputError, first_line
from subspan.utils.suggestions import near_names

VALIDATION_SHARE = 0.1
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_KINDS = (".jsonl", ".json", *_SEPARATORS)
_FILE = "data file"
_LONGEST_CELL = 2**31 - 1
"""Characters of a cell at most. ``csv`` would stop at 131,072, and takes no limit beyond what a C long holds."""


@dataclass(frozen=True)
class Row:
    """An example as a file has it."""

    text: str
    pair: str | None
    label: str | float | None
    """The name of a class, a number, or for ``lm`` the answer, if there is one."""
    where: str
    """File and line, for messages."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns."""

    text: str
    pair: str | None
    label: str


def read_file(path: Path, argument: str, spec: TaskSpec, columns: Columns) -> list[Row]:
    """Read the examples of a file.

    Raises:
        InputError: there is no such file, its kind is not known, or a line is broken or lacks a column. The message
            names the file, the line and the column.
    """
    kind = Path(path.name.removesuffix(path.suffix)).suffix if path.suffix in (".gz", ".xz") else path.suffix
    if kind not in _KINDS:
        raise InputError(f"{argument}={str(path)!r}: expected a {', '.join(_KINDS)} file (also .gz, .xz)")
    if not path.is_file():
        raise InputError(f"{argument}={str(path)!r}: no such file; give the path of a file of examples")
    rows = []
    with opened(path, newline="" if kind in _SEPARATORS else None) as file:
        records = _separated(file, path, _SEPARATORS[kind]) if kind in _SEPARATORS else _json_lines(file, path)
        for number, record in records:
            rows.append(_row(record, f"{_FILE} {path}, line {number}", spec, columns))
    if not rows:
        raise InputError(f"{argument}={str(path)!r}: holds no example; add some lines, or give another file")
    return rows


def read_glue(spec: TaskSpec, columns: Columns) -> tuple[list[Row], list[Row]]:
    """Read training and validation examples from the hub, or from what ``datasets`` has in its cache.

    Raises:
        InputError: they cannot be loaded, or have no such column.
    """
    import datasets  # seconds to import

    halves = []
    for half in ("train", spec.validation):
        try:
            found = datasets.load_dataset("nyu-mll/glue", spec.glue, split=half)
        except FAULTS:
            raise
        except Exception as error:  # the hub's client raises errors of a dozen kinds
            raise InputError(
                f"task: GLUE's {spec.glue} cannot be loaded: {first_line(error)}; without a network give --data and "
                "--validation_data, files with its columns"
            ) from error
        if columns.label not in found.features:
            hint = near_names(columns.label, found.features)
            raise InputError(
                f"label_column={columns.label!r}: GLUE's {spec.glue} has no such column; {hint}; leave it out for "
                "GLUE's own"
            )
        names = getattr(found.features[columns.label], "names", None)
        rows = []
        for number, record in enumerate(found):
            named = record | {columns.label: names[record[columns.label]]} if names else record
            rows.append(_row(named, f"nyu-mll/glue {spec.glue} {half}, row {number}", spec, columns))
        halves.append(rows)
    return halves[0], halves[1]


def set_aside(rows: list[Row], spec: TaskSpec) -> tuple[list[Row], list[Row]]:
    """Set a tenth of the texts aside for validation, those with the smallest hashes.

    So equal texts share a half, whatever their order. A text stays in training if it is the last one there with one of
    its labels: no model could learn that label otherwise.

    Raises:
        InputError: there are too few texts.
    """
    hashes = [text_hash(f"{row.text}\0{row.pair or ''}") for row in rows]
    different = sorted(set(hashes))
    if len(different) < 2:
        raise InputError(f"data: holds {len(different)} different text; give more, or other files as --validation_data")
    labels: dict[bytes, set[str | float | None]] = defaultdict(set)
    for row, own in zip(rows, hashes, strict=True):
        if spec.kind == "classification":  # numbers and answers need not have been seen
            labels[own].add(row.label)
    left = Counter(label for found in labels.values() for label in found)
    held: set[bytes] = set()
    wanted = max(1, round(len(different) * VALIDATION_SHARE))
    for own in different:
        if len(held) < wanted and all(left[label] > 1 for label in labels[own]):
            held.add(own)
            left.subtract(labels[own])
    if not held:
        raise InputError(
            "data: every label has one text, and training needs it; give more, or other files as --validation_data"
        )
    halves: tuple[list[Row], list[Row]] = [], []
    for row, own in zip(rows, hashes, strict=True):
        halves[own in held].append(row)
    return halves


def class_names(rows: list[Row], spec: TaskSpec) -> tuple[str, ...]:
    """Return the labels of the training examples, in the task's own order if it has one.

    Otherwise they are sorted, by number if all are numbers, else by name.

    Raises:
        InputError: there is only one.
    """
    found = {str(row.label) for row in rows}
    if len(found) < 2:
        raise InputError(f"label: every training example has {found.pop()!r}; a classifier needs two labels or more")
    if found == set(spec.labels):
        return spec.labels
    if all(re.fullmatch(r"-?\d+", name) for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))


def _json_lines(file: Any, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{_FILE} {path}, line {number}: {error}; expected one JSON object a line") from error
        if not isinstance(record, dict):
            raise InputError(
                f"{_FILE} {path}, line {number}: is {type(record).__name__}, expected one JSON object a line"
            )
        yield number, record


def _separated(file: Any, path: Path, separator: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(
        file, delimiter=separator, strict=True, quoting=csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
    )
    header: list[str] | None = None
    began = 1
    try:
        for cells in reader:
            if header is None:
                header = [cell.removeprefix("\ufeff") for cell in cells]
                twice = [name for name, count in Counter(header).items() if count > 1 and name]
                if twice:
                    raise InputError(
                        f"{_FILE} {path}, line 1: names the column {twice[0]!r} more than once; "
                        "give each a name of its own"
                    )
            elif cells:
                if len(cells) != len(header):
                    raise InputError(
                        f"{_FILE} {path}, line {began}: {len(cells)} cells, and the first line names {len(header)} "
                        "columns; quote cells that hold a separator"
                    )
                yield began, dict(zip(header, cells, strict=True))
            began = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{_FILE} {path}, line {began}: {error}; mend the line") from error


def _row(record: dict[str, Any], where: str, spec: TaskSpec, columns: Columns) -> Row:
    def cell(column: str, flag: str) -> Any:
        if column not in record:
            hint = near_names(column, [str(name) for name in record])
            raise InputError(f"{where}: has no column {column!r}; {hint}; name it with --{flag}")
        return record[column]

    def text(column: str, flag: str) -> str:
        value = cell(column, flag)
        if not isinstance(value, str) or not encodable(value):
            raise InputError(f"{where}: {column!r} is {value!r:.40}, expected text; name another column with --{flag}")
        return value

    label: str | float | None
    if spec.kind == "lm":
        # An empty cell is how CSV says that there is no answer, and null how JSON does.
        label = None if record.get(columns.label) in (None, "") else text(columns.label, "label_column")
    else:
        value = cell(columns.label, "label_column")
        label = (
            _number(value, where, columns.label) if spec.kind == "regression" else _name(value, where, columns.label)
        )
    pair = text(columns.pair, "pair_column") if columns.pair else None
    return Row(text(columns.text, "text_column"), pair, label, where)


def _number(value: Any, where: str, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"{where}: {column!r} is {value!r:.40}, expected a number; for classes use --task classification"
        )
    return number


def _name(value: Any, where: str, column: str) -> str:
    if isinstance(value, (str, int)) and str(value).strip():
        return str(value).strip()
    raise InputError(f"{where}: {column!r} is {value!r:.40}, expected a label: text or a whole number")
