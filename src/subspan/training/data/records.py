"""The records of a source: the entries of JSON, the rows of a table, or those of a data set, each as a dict."""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from subspan.training.data.files import JSON, SEPARATORS, TEXT, Hub, Source, kind_of, opened
from subspan.training.data.json_records import PARTS, json_entries
from subspan.utils.errors import FAULTS, InputError, first_line, named

_LONGEST_CELL = 2**31 - 1
"""Characters of a cell at most. ``csv`` would stop at 131,072, and takes no limit beyond what a C long holds."""
_ROWS = 1024
"""Rows of a table that are in memory at once."""


class Record(NamedTuple):
    """A record, and where it is."""

    where: str
    """File and line or row, for messages."""
    values: dict[str, Any]
    part: Literal["train", "validation", "test"] | None = None
    """The part that the data set files it under."""


def read_records(source: Source, encoding: str | None = None) -> Iterator[Record]:
    """Yield the records of ``source``, which is no text file.

    A text in an array of texts becomes a record with the column ``text``. A label that the data set knows by name has
    its name.

    Raises:
        InputError: it cannot be read; the message names the file, and the line or row.
    """
    if isinstance(source, Hub):
        yield from _of_parts(_load_hub(source), source.name)
    elif source.is_dir():
        yield from _of_parts(_load_saved(source), f"data set {source}")
    elif (kind := kind_of(source)) in SEPARATORS:
        with opened(source, newline="", encoding=encoding) as file:
            for number, row in _separated(file, source, SEPARATORS[kind]):
                yield Record(f"data file {source}, line {number}", row)
    elif kind in JSON:
        with opened(source, encoding=encoding) as file:
            for where, entry, part in json_entries(file, source):
                yield Record(where, {"text": entry} if isinstance(entry, str) else entry, part)
    elif kind in TEXT:
        with opened(source, encoding=encoding) as file:
            text = file.read()
        if text.strip():
            yield Record(f"data file {source}", {"text": text})
    else:
        yield from _columnar(source)


def _separated(file: IO[str], path: Path, separator: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(_LONGEST_CELL)
    where = f"data file {path}, line"
    header: list[str] | None = None
    began = 1
    lines = iter(file)
    first = next(lines, "")
    if separator == "," and "," not in first:  # spreadsheets of many countries write CSV with other separators
        separator = next((other for other in (";", "\t") if other in first), separator)

    def every() -> Iterator[str]:
        yield first
        yield from lines

    quoting: Literal[0, 3] = csv.QUOTE_NONE if kind_of(path) == ".tsv" else csv.QUOTE_MINIMAL
    reader = csv.reader(every() if first else iter(()), delimiter=separator, strict=True, quoting=quoting)
    try:
        for cells in reader:
            if header is None:
                header = cells
                twice = [name for name, count in Counter(header).items() if count > 1 and name]
                if twice:
                    raise InputError(
                        f"{where} 1: names the column {twice[0]!r} more than once; give each a name of its own"
                    )
            elif cells:
                if len(cells) != len(header):
                    raise InputError(
                        f"{where} {began}: {len(cells)} cells, and the first line names {len(header)} "
                        "columns; quote cells that hold a separator"
                    )
                yield began, dict(zip(header, cells, strict=True))
            began = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{where} {began}: {error}; mend the line") from error


def _columnar(path: Path) -> Iterator[Record]:
    """Yield the rows of a parquet or an Arrow file, some at a time."""
    import pyarrow
    import pyarrow.parquet
    from datasets import Features

    try:
        if kind_of(path) == ".parquet":
            file = pyarrow.parquet.ParquetFile(path)
            schema, batches = file.schema_arrow, file.iter_batches(batch_size=_ROWS)
        else:
            try:
                stream: Any = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
                schema, batches = stream.schema, iter(stream)
            except pyarrow.ArrowInvalid:
                whole: Any = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
                schema, batches = whole.schema, (whole.get_batch(i) for i in range(whole.num_record_batches))
        twice = [name for name, count in Counter(schema.names).items() if count > 1]
        if twice:
            raise InputError(f"data file {path}: names the column {twice[0]!r} more than once; give each its own name")
        names = _names_of_labels(Features.from_arrow_schema(schema))
        number = 0
        for batch in batches:
            for start in range(0, batch.num_rows, _ROWS):
                for row in batch.slice(start, _ROWS).to_pylist():
                    yield Record(f"data file {path}, row {number}", _with_names(row, names))
                    number += 1
    except InputError:
        raise
    except FAULTS:
        raise
    except Exception as error:  # Arrow raises errors of a dozen kinds for a file that is damaged
        raise InputError(
            f"data file {path} cannot be read: {first_line(error)}; put back a whole copy of it"
        ) from error


def _load_saved(path: Path) -> Any:
    import datasets  # seconds to import

    try:
        return datasets.load_from_disk(str(path))
    except FAULTS:
        raise
    except Exception as error:  # a damaged folder may raise anything
        raise InputError(
            f"data set {path} cannot be read: {named(error)}; save it again with save_to_disk of datasets"
        ) from error


def _load_hub(hub: Hub) -> Any:
    import datasets  # seconds to import

    name, _, configuration = hub.name.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None)
    except FAULTS:
        raise
    except Exception as error:  # the hub's client raises errors of a dozen kinds
        raise InputError(
            f"{hub.argument} {hub.name!r}: no such file here, and the hub cannot give a data set of this name: "
            f"{first_line(error)}; give a file or folder, or OWNER/NAME:CONFIGURATION of a data set on the hub"
        ) from error


def _of_parts(found: Any, name: str) -> Iterator[Record]:
    """Yield the rows of a data set, or of all its parts, of which those of training come first."""
    if not hasattr(found, "keys"):
        found = {"": found}
    for split in sorted(found, key=lambda split: (PARTS.get(split, "") != "train", split)):
        part = PARTS.get(split.partition("_")[0]) if split else None
        names = _names_of_labels(found[split].features)
        for number, row in enumerate(found[split]):
            yield Record(f"{name}{f', {split}' if split else ''}, row {number}", _with_names(row, names), part)


def _names_of_labels(features: Any) -> dict[str, list[str]]:
    return {column: kind.names for column, kind in features.items() if getattr(kind, "names", None)}


def _with_names(row: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """Return the row with the names of its labels. A label below 0 says that there is none."""
    for column, known in names.items():
        if isinstance(value := row.get(column), int):
            row = row | {column: known[value] if value >= 0 else None}
    return row
