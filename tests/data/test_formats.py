"""Each format of files says the same, in pretraining and in fine-tuning; damaged files are named."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from subspan.training.data.documents import find_documents
from subspan.training.data.files import Hub
from subspan.training.data.labelled_files import Columns, read_examples
from subspan.training.data.records import read_records
from subspan.training.data.task_specs import TASKS
from subspan.utils.errors import InputError

ROWS = [{"content": f"document {i} says, in some words:\n“{'so ' * i}”", "id": f"n{i}"} for i in range(40)]
TEXTS = sorted(row["content"] for row in ROWS)
COLUMNS = Columns("text", None, "label")


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def separated(rows: list[dict[str, Any]], separator: str) -> bytes:
    def cell(value: object) -> str:
        return '"' + str(value).replace('"', '""') + '"'

    return "".join(
        separator.join(map(cell, line)) + "\r\n" for line in [rows[0], *(row.values() for row in rows)]
    ).encode()


def frames(content: bytes) -> bytes:
    """Two frames, as programs write them that compress in parallel."""
    packed = [zstandard.ZstdCompressor().compress(part) for part in (content[:999], content[999:])]
    return b"".join(packed)


def arrow(path: Path, rows: list[dict[str, Any]], kind: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, kind(sink, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], object]] = {
    "a.jsonl": lambda path, rows: path.write_bytes(lines(rows)),
    "a.ndjson": lambda path, rows: path.write_bytes(lines(rows)),
    "array.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "indented.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "nested.json": lambda path, rows: path.write_text(json.dumps({"data": rows})),
    "columns.json": lambda path, rows: path.write_text(
        json.dumps({name: {str(i): row[name] for i, row in enumerate(rows)} for name in rows[0]})
    ),
    "a.csv": lambda path, rows: path.write_bytes(separated(rows, ",")),
    "semicolon.csv": lambda path, rows: path.write_bytes(separated(rows, ";")),
    "bom.csv": lambda path, rows: path.write_bytes(b"\xef\xbb\xbf" + separated(rows, ",")),
    "bom.jsonl": lambda path, rows: path.write_bytes(b"\xef\xbb\xbf" + lines(rows)),
    "crlf.jsonl": lambda path, rows: path.write_bytes(lines(rows).replace(b"\n", b"\r\n")),
    "LARGE.JSONL": lambda path, rows: path.write_bytes(lines(rows)),
    "a.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "a.jsonl.xz": lambda path, rows: path.write_bytes(lzma.compress(lines(rows))),
    "a.jsonl.bz2": lambda path, rows: path.write_bytes(bz2.compress(lines(rows))),
    "a.jsonl.zst": lambda path, rows: path.write_bytes(frames(lines(rows))),
    "a.csv.zst": lambda path, rows: path.write_bytes(frames(separated(rows, ","))),
    "a.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7),
    "stream.arrow": lambda path, rows: arrow(path, rows, pa.ipc.new_stream),
    "file.arrow": lambda path, rows: arrow(path, rows, pa.ipc.new_file),
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_format_says_the_same(name: str, tmp_path: Path) -> None:
    """In pretraining every text is a document; for the task lm every text is an example. The column is found."""
    path = tmp_path / name
    WRITERS[name](path, ROWS)
    documents = find_documents(str(path))
    parts = list(documents.split())
    assert sorted(text for _, text in parts) == TEXTS
    assert sum(part == "validation" for part, _ in parts) == 2
    assert documents.notes == [f"{path}: the text is the column 'content'"]
    assert [form.partition(" (")[2] for form in documents.forms] == ["content)"] or name == "saved"
    found = read_examples(str(path), "data", TASKS["lm"], COLUMNS)
    assert [row.text for row in found.rows] == [row["content"] for row in ROWS]
    assert found.form == "text (content)"


def test_tabs_and_a_tsv(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('id\tcontent\n1\tone "two"\n2\tthree\n')
    (tmp_path / "b.csv").write_text('id\tcontent\n1\t"one ""two"""\n2\tthree\n')
    for name in ("a.tsv", "b.csv"):
        assert sorted(text for _, text in find_documents(str(tmp_path / name)).split()) == ['one "two"', "three"]


def test_a_column_that_is_named(tmp_path: Path) -> None:
    rows = [{"Body": f"first {i}", "title": f"a title of five long words {i}"} for i in range(9)]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    named = find_documents(str(tmp_path / "a.jsonl"), text_column="title")
    assert {text for _, text in named.split()} == {row["title"] for row in rows}
    found = find_documents(str(tmp_path / "a.jsonl"))
    assert {text for _, text in found.split()} == {row["Body"] for row in rows}
    assert found.notes == [
        f"{tmp_path / 'a.jsonl'}: the text is the column 'Body'",
        f"{tmp_path / 'a.jsonl'}: the text in 'title' is not used; --text_column title takes that in place of 'Body'",
    ]
    with pytest.raises(InputError, match=r"text_column='tilte': .*line 1 has no such column; did you mean title\?"):
        list(find_documents(str(tmp_path / "a.jsonl"), text_column="tilte").split())


def test_a_text_beside_a_label(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\ngood,1\nbad,0\n")
    documents = find_documents(str(tmp_path / "a.csv"))
    assert {text for _, text in documents.split()} == {"good", "bad"}
    assert documents.notes == []


def test_instructions_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "a", "input": "b", "output": "c"}]))
    with pytest.raises(
        InputError, match=r"there are instruction, input, output; name one with --text_column; subspan fin"
    ):
        list(find_documents(str(tmp_path / "a.json")).split())


# --- labels and columns in fine-tuning --------------------------------------------------------------------------------


def test_labels_have_their_names_in_every_format(tmp_path: Path) -> None:
    features = datasets.Features(
        {"review": datasets.Value("string"), "sentiment": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = {"review": [f"words {i}" for i in range(6)], "sentiment": [0, 1] * 3}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    table.to_csv(tmp_path / "a.csv", index=False)
    for name, labels in {"a.parquet": ["bad", "good"], "saved": ["bad", "good"], "a.csv": ["0", "1"]}.items():
        found = read_examples(str(tmp_path / name), "data", TASKS["classification"], COLUMNS)
        assert [row.label for row in found.rows] == labels * 3
        assert found.form == "classification (review, sentiment)"
        assert found.notes == ["data: the text is the column 'review', and the label 'sentiment'"]


def test_a_second_text_that_is_not_used(tmp_path: Path) -> None:
    rows = [{"text": f"a {i}", "hypothesis": "what may follow from all that", "label": i % 2} for i in range(5)]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    found = read_examples(str(tmp_path / "a.jsonl"), "data", TASKS["classification"], COLUMNS)
    assert found.notes == [
        "data: the text in 'hypothesis' is not used; --text_column hypothesis takes it in place of 'text', and "
        "--pair_column beside it"
    ]
    both = read_examples(
        str(tmp_path / "a.jsonl"), "data", TASKS["classification"], Columns("text", "hypothesis", "label")
    )
    assert both.notes == []


# --- folders and data sets --------------------------------------------------------------------------------------------


def test_a_data_set_with_parts(tmp_path: Path) -> None:
    """The parts of a saved data set stay what they are."""
    parts = {name: datasets.Dataset.from_list(ROWS[i::3]) for i, name in enumerate(("train", "validation", "test"))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    found: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for part, text in find_documents(str(tmp_path / "saved")).split():
        found[part].append(text)
    assert found == {name: [row["content"] for row in ROWS[i::3]] for i, name in enumerate(found)}
    rows = read_examples(str(tmp_path / "saved"), "data", TASKS["lm"], COLUMNS).rows
    assert [row.part for row in rows] == ["train"] * 14 + ["validation"] * 13


def test_a_copy_of_a_repository_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tables are read, and its README is none. A name goes to ``datasets``, which finds the same rows."""
    folder = tmp_path / "owner" / "name"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("about it")
    for i, part in enumerate(("train", "validation")):
        pq.write_table(pa.Table.from_pylist(ROWS[i::2]), folder / "data" / f"{part}-00000-of-00001.parquet")
    expected = {("train", row["content"]) for row in ROWS[::2]} | {("validation", row["content"]) for row in ROWS[1::2]}
    assert set(find_documents(str(folder)).split()) == expected
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = list(read_records(Hub("owner/name")))
    assert {(row.part, row.values["content"]) for row in rows} == expected
    assert rows[0].where == "owner/name, train, row 0"


def test_a_name_that_the_hub_cannot_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"data 'nobody/nothing': no such file here, and the hub cannot give .*give a file"
    ):
        list(find_documents("nobody/nothing").split())


def test_a_folder_of_text_files(tmp_path: Path) -> None:
    """Text and JSON files come first, and a line says what is left out."""
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "table.csv").write_text("text\nother\n")
    documents = find_documents(str(tmp_path))
    assert {text for _, text in documents.split()} == {"text 0", "text 1", "text 2"}
    assert documents.notes[0].startswith(f"{tmp_path}: 3 files are read, and 1 others (.csv) are not")
    (tmp_path / "table.csv").unlink()
    found = read_examples(str(tmp_path), "data", TASKS["lm"], COLUMNS)
    assert [row.text for row in found.rows] == ["text 0", "text 1", "text 2"]


def test_the_names_of_files_tell_their_parts(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"prompt": name, "completion": "b"}] * 2))
    found = read_examples(str(tmp_path), "data", TASKS["lm"], COLUMNS)
    assert [(row.text.strip(), row.part) for row in found.rows] == [("dev", "validation")] * 2 + [
        ("train", "train")
    ] * 2


# --- encodings, gaps and damage ---------------------------------------------------------------------------------------


def test_encodings(tmp_path: Path) -> None:
    text = "Ça coûte très cher à Zürich. " * 4
    for name, encoding in (("a.txt", "latin-1"), ("b.csv", "cp1252"), ("c.jsonl", "utf-16"), ("d.txt", "utf-16")):
        path = tmp_path / name
        whole = {"csv": f"text\n{text}\n", "jsonl": json.dumps({"text": text}, ensure_ascii=False)}.get(name[2:], text)
        path.write_bytes(f"\n{whole}".encode(encoding) if name == "a.txt" else whole.encode(encoding))
        documents = find_documents(str(path), encoding=encoding)
        assert "".join(own for _, own in documents.split()).strip() == text.strip()
        likely = "utf-16" if encoding == "utf-16" else "latin-1"
        line = "" if encoding == "utf-16" else "line 2: "
        with pytest.raises(InputError, match=rf"{name} cannot be read: {line}.*--encoding {likely}"):
            list(find_documents(str(path)).split())
        read = read_examples(str(path), "data", TASKS["lm"], COLUMNS, encoding)
        assert read.rows[0].text.strip() == text.strip()
    with pytest.raises(InputError, match=r"encoding='no-such': Python knows no such encoding"):
        find_documents(str(tmp_path), encoding="no-such")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\r\n".encode())
    assert [text for _, text in find_documents(str(tmp_path / "a.txt")).split()] == ["one\ntwo\n"]


def test_rows_without_a_text(tmp_path: Path) -> None:
    """A table's are left out and counted. In JSON one is named, as any other line that is not as expected."""
    rows = [{"text": text, "id": i} for i, text in enumerate(["one", None, "", "two", None])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    documents = find_documents(str(tmp_path / "a.parquet"))
    assert {text for _, text in documents.split()} == {"one", "two"}
    assert documents.notes == [f"{tmp_path / 'a.parquet'}: 2 rows have no 'text' and are left out"]
    (tmp_path / "a.csv").write_text("text,id\none,1\n,2\n\ntwo,3\n")
    assert {text for _, text in find_documents(str(tmp_path / "a.csv")).split()} == {"one", "two"}
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    with pytest.raises(InputError, match=r'a\.jsonl, line 2: "text" is NoneType, expected a string'):
        list(find_documents(str(tmp_path / "a.jsonl")).split())


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "saved" and not name.endswith((".csv", ".json"))])
def test_files_that_are_cut_short(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path, ROWS)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3 + 3])
    with pytest.raises(InputError, match=rf"data file {path}(, line \d+:| cannot be read:)"):
        list(find_documents(str(path)).split())


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.txt", "a.jsonl.zst", "a.json"])
def test_empty_files(name: str, tmp_path: Path) -> None:
    """One alone holds nothing to learn; beside others it does no harm, unless it cannot be a file of its kind."""
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"holds no example|cannot be read"):
        read_examples(str(tmp_path / name), "data", TASKS["lm"], COLUMNS)
    if name != "a.parquet":
        assert list(find_documents(str(tmp_path / name)).split()) == []


def test_columns_that_are_named_twice(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,id,text\na,1,b\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "text": "b"}\n')
    (tmp_path / "a.json").write_text('[{"text": "a", "text": "b"}]\n')
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    for name in ("a.csv", "a.jsonl", "a.json", "a.parquet"):
        with pytest.raises(InputError, match=rf"{name}.* names the column 'text' more than once"):
            list(find_documents(str(tmp_path / name)).split())


def test_a_large_array_is_read_in_pieces(tmp_path: Path) -> None:
    """Its entries cross the pieces anywhere, and their lines are counted."""
    rows = [{"text": f"{i} " + '\\ " [{,}] é' * (i % 50)} for i in range(3000)]
    (tmp_path / "a.json").write_text("[" + ",\n\n".join(map(json.dumps, rows)) + "\n]\n")
    found = list(read_records(tmp_path / "a.json"))
    assert [record.values for record in found] == rows
    assert [record.where.rpartition(" ")[2] for record in found] == [str(1 + 2 * i) for i in range(3000)]
