"""Files of examples: what is read, and what is said of those that cannot be."""

import gzip
import random
from pathlib import Path

import pytest

from subspan.training.errors import InputError
from subspan.training.finetuning.rows import Columns, Row, class_names, read_file, set_aside
from subspan.training.finetuning.tasks import TASKS, find_task

PLAIN = Columns("text", None, "label")
CLASSES, NUMBERS, LM = TASKS["classification"], TASKS["regression"], TASKS["lm"]


def test_the_three_forms_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one, \\"two\\"", "label": 1}\n\n{"text": "three", "label": "0"}\n')
    (tmp_path / "a.csv").write_text('text,label\n"one, ""two""",1\nthree,0\n')
    (tmp_path / "a.tsv").write_text('label\ttext\n1\tone, "two"\n0\tthree\n')
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    read = [
        [(row.text, row.label) for row in read_file(tmp_path / name, "data", CLASSES, PLAIN)]
        for name in ("a.jsonl", "a.csv", "a.tsv", "b.csv.gz")
    ]
    assert read == [[('one, "two"', "1"), ("three", "0")]] * 4


def test_columns_pairs_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("s1,s2,score\na,b,2.5\nc,d,-1\n")
    rows = read_file(path, "data", NUMBERS, Columns("s1", "s2", "score"))
    assert [(row.text, row.pair, row.label) for row in rows] == [("a", "b", 2.5), ("c", "d", -1.0)]


def test_an_answer_may_be_absent(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "whole"}\n{"text": "prompt", "label": "answer"}\n')
    assert [row.label for row in read_file(path, "data", LM, PLAIN)] == [None, "answer"]


@pytest.mark.parametrize(
    ("name", "content", "task", "words"),
    [
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x", "la\n', "classification", ["a.jsonl, line 2", "one JSON object"]),
        ("a.jsonl", '{"text": "x", "label": 1}\n[1]\n', "classification", ["line 2", "is list"]),
        ("a.jsonl", '{"txt": "x", "label": 1}\n', "classification", ["line 1", "no column 'text'", "txt", "--text_column"]),
        ("a.jsonl", '{"text": "x"}\n', "classification", ["line 1", "no column 'label'", "--label_column"]),
        ("a.jsonl", '{"text": 3, "label": 1}\n', "classification", ["line 1", "'text' is 3", "expected text"]),
        ("a.jsonl", '{"text": "x", "label": null}\n', "classification", ["line 1", "'label' is None", "expected a label"]),
        ("a.jsonl", '{"text": "x", "label": [1]}\n', "classification", ["line 1", "expected a label"]),
        ("a.jsonl", '{"text": "x", "label": "high"}\n', "regression", ["line 1", "'high'", "expected a number"]),
        ("a.jsonl", '{"text": "x", "label": NaN}\n', "regression", ["line 1", "nan", "expected a number"]),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', "classification", ["line 1", "expected text"]),
        ("a.csv", 'text,label\n"two\nlines",1\nx,1,2\n', "classification", ["a.csv, line 4", "3 cells", "2 columns"]),
        ("a.csv", 'text,label\n"open,1\n', "classification", ["line 2", "mend the line"]),
        ("a.csv", "text,label\n", "classification", ["data=", "holds no example"]),
        ("a.csv", b"text,label\n\xff\xfe,1\n", "classification", ["cannot be read", "UTF-8"]),
        ("a.parquet", "x", "classification", ["a.parquet", "expected a .jsonl"]),
        ("a.csv.gz", b"no gzip", "classification", ["a.csv.gz", "cannot be read"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(name: str, content: str | bytes, task: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        read_file(path, "data", find_task(task), PLAIN)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"validation_data=.*gone.jsonl.*no such file"):
        read_file(tmp_path / "gone.jsonl", "validation_data", CLASSES, PLAIN)


def test_an_unknown_task_names_those_near() -> None:
    with pytest.raises(InputError, match=r"task='sts-b'.*stsb"):
        find_task("sts-b")


def test_the_tenth_that_is_set_aside() -> None:
    """Equal texts share a half, and the order of the file does not matter."""
    rows = [Row(f"text {i % 50}", None, str(i % 2), f"line {i}") for i in range(100)]
    train, held = set_aside(rows)
    assert {row.text for row in train}.isdisjoint(row.text for row in held)
    assert len({row.text for row in held}) == 5
    assert len(train) + len(held) == 100
    shuffled = rows[:]
    random.Random(0).shuffle(shuffled)
    assert {row.where for row in set_aside(shuffled)[1]} == {row.where for row in held}
    with pytest.raises(InputError, match="holds 1 different text"):
        set_aside([Row("same", None, "1", "line 1")] * 4)


def test_the_order_of_labels() -> None:
    def names(labels: list[str], task: str = "classification") -> tuple[str, ...]:
        return class_names([Row("x", None, label, "") for label in labels], find_task(task))

    assert names(["10", "9", "-1"]) == ("-1", "9", "10")
    assert names(["10", "9", "a"]) == ("10", "9", "a")
    assert names(["equivalent", "not_equivalent"]) == ("equivalent", "not_equivalent")
    assert names(["equivalent", "not_equivalent"], "mrpc") == ("not_equivalent", "equivalent")  # F1 is of the second
    with pytest.raises(InputError, match="every training example has 'a'"):
        names(["a", "a"])
