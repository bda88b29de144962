"""Labelled examples and instructions, from files and saved data sets, or from GLUE through ``datasets``."""

import glob
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from subspan.training.data.columns import LABELS, SCORES, TEXTS, first_of, looked_at, samples, texts_of, unused_texts
from subspan.training.data.documents import encodable, part_of_name, text_hash
from subspan.training.data.files import TEXT, Source, check_encoding, find_files, kind_of
from subspan.training.data.instructions import Turn, find_form
from subspan.training.data.records import Record, read_records
from subspan.training.data.task_specs import TaskSpec
from subspan.utils.errors import FAULTS, InputError, first_line
from subspan.utils.suggestions import near_names

VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Row:
    """An example as a file has it."""

    text: str
    pair: str | None
    label: str | float | None
    """The name of a class, a number, or for ``lm`` the answer, if there is one."""
    where: str
    """File and line, for messages."""
    turns: tuple[Turn, ...] = ()
    """For ``lm``: the turns of a chat, in place of text and label."""
    context: int = 0
    """Number of turns at the beginning in which nothing is learnt."""
    tools: Any = None
    """The tools that the chat may use."""
    part: Literal["train", "validation", "test"] | None = None
    """The part that the data set files it under."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns."""

    text: str
    pair: str | None
    label: str


@dataclass(frozen=True)
class Found:
    """The examples of a setting, and what they are."""

    rows: list[Row]
    form: str
    """The form of the files and its columns, in words."""
    notes: list[str]
    """Lines for a person."""


def read_file(path: Path | str, argument: str, spec: TaskSpec, columns: Columns) -> list[Row]:
    """Read the examples of a file; see ``read_examples``."""
    return read_examples(str(path), argument, spec, columns).rows


def read_examples(data: str, argument: str, spec: TaskSpec, columns: Columns, encoding: str | None = None) -> Found:
    """Read the examples that ``data`` names: a file, a folder, a glob, or a data set.

    Columns with the names that the task expects are found by other usual names where a file lacks them. Examples that
    are filed as test are left out.

    Raises:
        InputError: there is no such file, its kind is not known, or a record is broken or lacks a column. The message
            names the file, the line and the column.
    """
    check_encoding(encoding)
    sources = _sources(data, argument)
    rows: list[Row] = []
    forms, notes = dict[str, None](), dict[str, None]()
    read = _instructions if spec.kind == "lm" else _labelled
    for source in sources:
        first, records = looked_at(read_records(source, encoding))
        if first:
            found = read(first, records, spec, columns)
            part = part_of_name(source) if len(sources) > 1 else None
            rows += [row if row.part or not part else replace(row, part=part) for row in found.rows]
            forms[found.form] = None
            notes |= dict.fromkeys(found.notes)
    if not rows:
        reason = "; ".join(notes) or "add some lines"
        raise InputError(f"{argument}={data!r}: holds no example; {reason}, or give another file")
    if tests := sum(row.part == "test" for row in rows):
        rows = [row for row in rows if row.part != "test"]
        notes[f"data: {tests} examples are filed as test and are left out"] = None
    return Found(rows, "; ".join(forms), list(notes))


def _sources(data: str, argument: str) -> list[Source]:
    path = Path(data).expanduser()
    if not path.exists() and not glob.has_magic(data) and kind_of(path):
        raise InputError(f"{argument}={data!r}: no such file; give the path of a file of examples")
    found = list(find_files(data, argument))
    tables = [source for source in found if not isinstance(source, Path) or kind_of(source) not in TEXT]
    return tables or found


def _instructions(first: list[Record], records: Iterable[Record], spec: TaskSpec, columns: Columns) -> Found:
    text = None if columns.text == spec.text else columns.text
    answer = None if columns.label == spec.label else columns.label
    form, notes = find_form(first, text, columns.pair, answer)
    rows: list[Row] = []
    without: list[str] = []
    for record in records:
        found = form.instruction(record)
        if found is None:
            without.append(record.where)
        else:
            talk = (found.turns, found.context, found.tools, record.part)
            rows.append(Row(found.prompt, None, found.answer, record.where, *talk))
    if without:
        notes.append(f"data: {len(without)} examples have nothing to learn and are left out, the first: {without[0]}")
    return Found(rows, form.words(), notes)


def _labelled(first: list[Record], records: Iterable[Record], spec: TaskSpec, columns: Columns) -> Found:
    own, notes = _find_columns(first, spec, columns)
    rows = [replace(_row(record.values, record.where, spec, own), part=record.part) for record in records]
    names = ", ".join(name for name in (own.text, own.pair, own.label) if name)
    return Found(rows, f"{spec.kind} ({names})", notes)


def _find_columns(first: list[Record], spec: TaskSpec, columns: Columns) -> tuple[Columns, list[str]]:
    """Return the columns of a file, and lines about those that are not used.

    A column that has not the name that the task expects is looked for under its usual names.
    """
    cells = samples(first)
    known = {str(name): None for record in first for name in record.values}
    text, label = columns.text, columns.label
    own_task = spec.glue is None
    if own_task and text not in known and text == spec.text:
        text = first_of(TEXTS, texts_of(cells)) or text
    if own_task and label not in known and label == spec.label:
        usual = LABELS if spec.kind == "classification" else SCORES
        label = first_of(usual, {name: None for name in known if name != text}) or label
    notes = []
    if (text, label) != (columns.text, columns.label):
        notes.append(f"data: the text is the column {text!r}, and the label {label!r}")
    if others := unused_texts(cells, (text, columns.pair, label)):
        notes.append(
            f"data: the text in {' and '.join(map(repr, others))} is not used; "
            f"--text_column {others[0]} takes it in place of {text!r}, and --pair_column beside it"
        )
    return Columns(text, columns.pair, label), notes


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
        way = (
            "; plain text is what subspan pretrain learns, also with weights that are there"
            if spec.kind == "lm"
            else ""
        )
        raise InputError(
            f"data: holds {len(different)} different text; give more, or other files as --validation_data{way}"
        )
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

    value = cell(columns.label, "label_column")
    label = _number(value, where, columns.label) if spec.kind == "regression" else _name(value, where, columns.label)
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
