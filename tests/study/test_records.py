"""The record file: nothing is lost, nothing broken is taken."""

import json
from pathlib import Path

import pytest

from subspan.study.records import append_records, read_all, read_records

FIRST = {"key": "a", "status": "finished", "val_loss": 1.5}
SECOND = {"key": "b", "status": "diverged", "val_loss": None}


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.jsonl"
    assert read_records(path) == {}
    append_records(path, [FIRST])
    append_records(path, [SECOND])
    assert read_records(path) == {"a": FIRST, "b": SECOND}


def test_a_line_cut_by_a_kill_is_no_record_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    append_records(path, [FIRST])
    with open(path, "a") as file:
        file.write(json.dumps(SECOND)[:20])
    assert read_records(path) == {"a": FIRST}
    append_records(path, [SECOND])
    assert read_records(path) == {"a": FIRST, "b": SECOND}


def test_a_whole_line_without_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(FIRST))  # as an editor may leave it
    assert read_records(path) == {"a": FIRST}
    append_records(path, [SECOND])
    assert read_records(path) == {"a": FIRST, "b": SECOND}


@pytest.mark.parametrize(
    "line",
    ["{", "3", '{"key": "c"}', '{"key": "c", "status": "finished", "val_loss": null}', "",
     '{"key": "c", "status": "finsihed", "val_loss": 1.5}'],
)  # fmt: skip
def test_a_broken_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    append_records(path, [FIRST])
    before = path.read_text()
    path.write_text(before + line + "\n" + json.dumps(SECOND) + "\n")
    with pytest.raises(ValueError, match=rf"{path}:2: is no record of a run"):
        read_records(path)
    assert path.read_text().startswith(before + line)


def test_runs_of_other_studies_count_and_other_files_do_not(tmp_path: Path) -> None:
    append_records(tmp_path / "one.jsonl", [FIRST | {"val_loss": 1.0}])
    append_records(tmp_path / "two.jsonl", [FIRST, SECOND])
    (tmp_path / "bench.jsonl").write_text('{"name": 3}\n')
    (tmp_path / "empty.jsonl").write_text("")
    assert read_all(tmp_path, tmp_path / "one.jsonl")["a"]["val_loss"] == 1.0  # a study's own comes first
    assert read_all(tmp_path, tmp_path / "three.jsonl").keys() == {"a", "b"}


def test_a_broken_first_line_of_another_study_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "two.jsonl").write_text("oops\n")
    append_records(tmp_path / "two.jsonl", [FIRST])
    with pytest.raises(ValueError, match=r"two.jsonl:1: is no record of a run"):
        read_all(tmp_path, tmp_path / "one.jsonl")


def test_a_record_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"x.jsonl: cannot be written \(.*\); give another file with --results"):
        append_records(tmp_path / "file" / "x.jsonl", [FIRST])
