"""Files of examples: what is read, and what is said of those that cannot be."""

import gzip
import random
from pathlib import Path

import datasets
import pytest

from subspan.training.data.labelled_files import Columns, Row, class_names, read_file, read_glue, set_aside
from subspan.training.data.task_specs import TASKS, find_task
from subspan.utils.errors import InputError

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
    path.write_text(
        '{"text": "whole"}\n{"text": "prompt", "label": "answer"}\n{"text": "a", "label": null}\n{"text": "b", '
        '"label": ""}\n'
    )
    assert [row.label for row in read_file(path, "data", LM, PLAIN)] == [None, "answer", None, None]
    (tmp_path / "a.csv").write_text("text,label\nwhole,\nprompt,answer\n")
    assert [row.label for row in read_file(tmp_path / "a.csv", "data", LM, PLAIN)] == [None, "answer"]


def test_columns_without_a_name_may_be_many(tmp_path: Path) -> None:
    """Files are read as spreadsheets write them."""
    (tmp_path / "a.csv").write_text("text,label,,\nx,1,,\n")
    assert read_file(tmp_path / "a.csv", "data", CLASSES, PLAIN)[0].text == "x"


def test_a_cell_as_long_as_a_book(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text,label\n{'x' * 200_000},1\n")
    assert len(read_file(tmp_path / "a.csv", "data", CLASSES, PLAIN)[0].text) == 200_000


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
        ("a.csv", "text,label\n", "classification", ["data=", "holds no example", "give another file"]),
        ("a.csv", "text,label,text\nx,1,y\n", "classification", ["line 1", "'text' more than once", "a name of its own"]),
        ("a.jsonl", '{"text": "x", "label": 3}\n', "lm", ["line 1", "'label' is 3", "expected text"]),
        ("a.csv", b"text,label\n\xff\xfe,1\n", "classification", ["cannot be read", "UTF-8"]),
        ("a.parquet", "x", "classification", ["a.parquet", "cannot be read", "put back a whole copy"]),
        ("a.pkl", "x", "classification", ["a.pkl", "of no known kind", ".jsonl", ".parquet"]),
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
    train, held = set_aside(rows, CLASSES)
    assert {row.text for row in train}.isdisjoint(row.text for row in held)
    assert len({row.text for row in held}) == 5
    assert len(train) + len(held) == 100
    shuffled = rows[:]
    random.Random(0).shuffle(shuffled)
    assert {row.where for row in set_aside(shuffled, CLASSES)[1]} == {row.where for row in held}
    with pytest.raises(InputError, match="holds 1 different text"):
        set_aside([Row("same", None, "1", "line 1")] * 4, CLASSES)


@pytest.mark.parametrize("rare", [1, 2, 5])
def test_no_label_is_set_aside_whole(rare: int) -> None:
    """A label keeps a text in training, also where all of its texts would be set aside; the share stays a tenth."""
    rows = [Row(f"text {i}", None, "common", f"line {i}") for i in range(50)]
    first = [row.text for row in set_aside(rows, CLASSES)[1]][:rare]
    rows = [Row(row.text, None, "rare" if row.text in first else "common", row.where) for row in rows]
    train, held = set_aside(rows, CLASSES)
    assert {row.label for row in train} == {"common", "rare"}
    assert len(held) == 5
    assert sum(row.label == "rare" for row in train) == 1
    # Numbers and answers are not classes: each may be the only one.
    assert [row.text for row in set_aside(rows, NUMBERS)[1]][:rare] == first


def test_a_text_of_two_labels_and_too_few_texts() -> None:
    """Equal texts stay together; where each label has one text there is nothing to set aside."""
    rows = [Row(text, None, label, "") for text, label in (("a", "1"), ("a", "2"), ("b", "1"), ("c", "1"), ("b", "1"))]
    train, held = set_aside(rows, CLASSES)
    assert {row.label for row in train} == {"1", "2"}
    assert len({row.text for row in held}) == 1
    with pytest.raises(InputError, match="every label has one text"):
        set_aside([Row("a", None, "1", ""), Row("b", None, "2", "")], CLASSES)


def test_glue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves are read with the names of the classes, each task with its own half for validation."""
    asked = []
    names = ["entailment", "neutral", "contradiction"]
    features = datasets.Features({"premise": datasets.Value("string"), "hypothesis": datasets.Value("string"),
                                  "label": datasets.ClassLabel(names=names)})  # fmt: skip

    def load(path: str, name: str, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        columns = {"premise": [f"{split} {i}" for i in range(3)], "hypothesis": ["so", "no", "or"], "label": [2, 0, 1]}
        return datasets.Dataset.from_dict(columns, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    columns = Columns("premise", "hypothesis", "label")
    train, held = read_glue(TASKS["mnli"], columns)
    assert asked == [("nyu-mll/glue", "mnli", "train"), ("nyu-mll/glue", "mnli", "validation_matched")]
    assert [(row.text, row.pair, row.label) for row in train] == [
        ("train 0", "so", "contradiction"), ("train 1", "no", "entailment"), ("train 2", "or", "neutral")
    ]  # fmt: skip
    assert held[1] == Row("validation_matched 1", "no", "entailment", "nyu-mll/glue mnli validation_matched, row 1")
    with pytest.raises(InputError, match=r"label_column='lable': GLUE's mnli has no such column; did you mean label"):
        read_glue(TASKS["mnli"], Columns("premise", "hypothesis", "lable"))
    with pytest.raises(InputError, match=r"row 0: has no column 'premis'; did you mean premise"):
        read_glue(TASKS["mnli"], Columns("premis", "hypothesis", "label"))


def test_the_order_of_labels() -> None:
    def names(labels: list[str], task: str = "classification") -> tuple[str, ...]:
        return class_names([Row("x", None, label, "") for label in labels], find_task(task))

    assert names(["10", "9", "-1"]) == ("-1", "9", "10")
    assert names(["10", "9", "a"]) == ("10", "9", "a")
    assert names(["1", "01", "0"]) == ("0", "01", "1")  # not as the set of them happens to be ordered
    assert names(["--1", "2"]) == ("--1", "2")
    assert names(["equivalent", "not_equivalent"]) == ("equivalent", "not_equivalent")
    assert names(["equivalent", "not_equivalent"], "mrpc") == ("not_equivalent", "equivalent")  # F1 is of the second
    with pytest.raises(InputError, match="every training example has 'a'"):
        names(["a", "a"])
