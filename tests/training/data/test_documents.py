"""Documents: every one in exactly one half, whatever the order of files."""

import gzip
import hashlib
import json
import lzma
import random
import re
from pathlib import Path

import pytest

from subspan.training.data.documents import Documents, find_documents, text_hash
from subspan.training.data.embedded import CORPUS
from subspan.utils.errors import InputError


def halves(documents: Documents) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"train": [], "validation": []}
    for half, text in documents.split():
        found.setdefault(half, []).append(text)
    return found


def test_the_embedded_corpus() -> None:
    """There are 320 documents in all; chapters of all six novels and a play of Shakespeare are in validation."""
    found = halves(find_documents("embedded"))
    assert [len(found[half]) for half in ("train", "validation")] == [288, 16]
    assert not set(found["train"]) & set(found["validation"])
    paragraphs = {
        half: {p for text in texts for p in text.split("\n\n") if len(p) > 200} for half, texts in found.items()
    }
    assert not paragraphs["train"] & paragraphs["validation"]
    assert 450_000 < sum(map(len, found["validation"])) < 550_000
    assert any("Cordelia" in text or "CORDELIA" in text for text in found["validation"])


def test_five_percent_by_content(tmp_path: Path) -> None:
    """The half of a document depends only on its text, not on the order or the file; copies stay together."""
    texts = [f"text number {i}" for i in range(200)] + ["text number 3"] * 5
    once, shuffled = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    once.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    random.Random(0).shuffle(texts)
    shuffled.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    first, second = (halves(find_documents(str(path))) for path in (once, shuffled))
    assert set(first["validation"]) == set(second["validation"])
    assert len(set(first["validation"])) == 10
    assert not set(first["train"]) & set(first["validation"])


@pytest.mark.parametrize(("count", "validation"), [(1, 0), (2, 1), (10, 1), (100, 5)])
def test_small_numbers(count: int, validation: int, tmp_path: Path) -> None:
    for i in range(count):
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    found = halves(find_documents(str(tmp_path)))
    assert (len(found["train"]), len(found["validation"])) == (count - validation, validation)


def test_all_forms_of_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "deep" / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three"}\n')
    with gzip.open(tmp_path / "c.json.gz", "wt") as file:
        file.write('{"text": "four"}\n')
    with lzma.open(tmp_path / "d.md.xz", "wt") as file:
        file.write("five")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    every = {text for _, text in find_documents(str(tmp_path)).split()}
    assert every == {"one", "two", "three", "four", "five"}
    assert {text for _, text in find_documents(str(tmp_path / "**" / "*.jsonl")).split()} == {"two", "three"}


def test_a_split_that_is_named_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "split": "validation"}\n{"text": "y", "split": "train"}\n')
    assert halves(find_documents(str(path))) == {"train": ["y"], "validation": ["x"]}


def test_own_validation_files(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("to train on")
    (tmp_path / "held.txt").write_text("to measure on")
    found = halves(find_documents(str(tmp_path / "train.txt"), str(tmp_path / "held.txt")))
    assert found == {"train": ["to train on"], "validation": ["to measure on"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"body": "y"}\n', r"a\.jsonl, line 2: has no column 'text'; known are body"),
        ("a.jsonl", '{"text": "x"}\nnot json\n', r"a\.jsonl, line 2"),
        ("a.jsonl", '{"text": 3}\n', r'line 1: "text" is int'),
        ("a.jsonl", "[1]\n", r"a\.jsonl, line 1"),
        ("a.jsonl", '{"text": "x", "split": "dev"}\n', r"line 1: \"split\" is 'dev', expected"),
        ("a.jsonl", '{"text": "\\ud800"}\n', r"line 1: \"text\" holds half a surrogate"),
        ("a.png", "x", r"a\.png is of no known kind"),
    ],
)
def test_broken_files_are_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        list(find_documents(str(tmp_path / name)).split())


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match=r"a\.txt cannot be read.*UTF-8"):
        list(find_documents(str(tmp_path)).split())


def test_damaged_archives(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "x"}\n' * 1000)
    for name, content in {"short": whole[:40], "garbled": whole[:30] + b"\x00" * 20 + whole[50:]}.items():
        (tmp_path / f"{name}.jsonl.gz").write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}\.jsonl\.gz cannot be read"):
            list(find_documents(str(tmp_path / f"{name}.jsonl.gz")).split())


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data .*none.* no such file.*'embedded'"):
        find_documents(str(tmp_path / "none"))


def test_no_document_is_in_both_halves(tmp_path: Path) -> None:
    """A training document that is also a validation document is left out of training, whatever the files say."""
    rows = [
        {"text": "a", "split": "train"},
        {"text": "a", "split": "validation"},
        {"text": "b"},
        {"text": "c"},
        {"text": "a"},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = halves(find_documents(str(tmp_path / "x.jsonl")))
    assert not set(found["train"]) & set(found["validation"])
    assert set(found["train"]) | set(found["validation"]) == {"a", "b", "c"}
    (tmp_path / "held.txt").write_text("b")
    found = halves(find_documents(str(tmp_path / "x.jsonl"), str(tmp_path / "held.txt")))
    assert (set(found["train"]), found["validation"]) == ({"c"}, ["b"])
    assert halves(find_documents(str(tmp_path / "held.txt"), str(tmp_path / "held.txt"))) == {
        "train": [],
        "validation": ["b"],
    }


def test_the_test_part_of_the_embedded_corpus() -> None:
    """Its 16 documents are in no other part, chapters of all six novels are among them, and no paragraph is shared."""
    found = halves(find_documents("embedded"))
    assert [len(found[part]) for part in ("train", "validation", "test")] == [288, 16, 16]
    paragraphs = {
        part: {p for text in texts for p in text.split("\n\n") if len(p) > 200} for part, texts in found.items()
    }
    assert not paragraphs["test"] & (paragraphs["train"] | paragraphs["validation"])


def test_the_split_is_the_one_that_is_committed_by_its_hashes() -> None:
    readme = (CORPUS.parent / "README.md").read_text()
    committed = {row[0]: (int(row[1]), row[2]) for row in re.findall(r"\| (\w+) \| (\d+) \| `(\w{32})` \|", readme)}
    found = halves(find_documents("embedded"))
    for part, texts in found.items():
        whole = hashlib.blake2b(b"".join(sorted(map(text_hash, texts))), digest_size=16)
        assert committed.pop(part) == (len(texts), whole.hexdigest())
    assert not committed


def test_test_documents_are_in_no_other_part(tmp_path: Path) -> None:
    """A document that is named, or given, as test is left out of what is trained on and of what is chosen by."""
    rows = [{"text": "a", "split": "test"}, {"text": "a"}, {"text": "b", "split": "validation"}, {"text": "c"}]
    rows += [{"text": "a", "split": "validation"}, {"text": "d", "split": "train"}]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert halves(find_documents(str(path))) == {"train": ["c", "d"], "validation": ["b"], "test": ["a"]}
    (tmp_path / "held.txt").write_text("b")
    (tmp_path / "unseen.txt").write_text("c")
    found = halves(find_documents(str(path), str(tmp_path / "held.txt"), str(tmp_path / "unseen.txt")))
    assert found == {"train": ["d"], "validation": ["b"], "test": ["c"]}
