"""The runner with real runs, in processes of their own."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from study.faulty_worker import fail
from support.studies import SMALL, cell_of, make, record, write
from support.waiting import Gate, started

from subspan.cli import main
from subspan.study.missing_runs import cells_of
from subspan.study.records import append_records, read_records
from subspan.study.runner import _MODULES, Runner, _Running
from subspan.study.study_file import Study
from subspan.training.monitor.metrics import read_metrics
from subspan.utils.errors import InputError, SettingError

pytestmark = pytest.mark.xdist_group("runs of studies")  # which are forked from one server


def command(path: Path) -> list[str]:
    return [sys.executable, "-m", "subspan", "study", "run", str(path)]


def run(path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Calls the command in this process, which spares its start. Its runs are processes all the same."""
    said, before = io.StringIO(), Path.cwd()
    os.chdir(path.parents[1])
    try:
        with contextlib.redirect_stderr(said):
            status = main(["study", "run", str(path), *more])
    finally:
        os.chdir(before)
    return subprocess.CompletedProcess([], status, stderr=said.getvalue())


def folder_of(study: Study, row: str, seed: int) -> Path:
    """Return the directory of the run that has the row's own learning rate."""
    (found,) = [found for found in study.rows if found.name == row]
    cell = cell_of(found, found.lr, seed)
    return study.results.parents[1] / f"runs/studies/small/{row}/lr-{found.lr:.4g}-seed-{seed}-{cell.key[:8]}"


@contextlib.contextmanager
def begun(path: Path, gate: Gate) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, once a run of it has come to the gate."""
    with started(command(path), cwd=path.parents[1], env=gate.environment, start_new_session=True) as process:
        gate.wait_until_reached(process)
        yield process


ONE: dict[str, Any] = {
    "base": SMALL["base"] | {"steps": 12, "checkpoint": {"every": 5}},
    "seeds": [0],
    "rows": {"galore": SMALL["rows"]["galore"]},
}


def test_runs_are_run_once_and_are_what_pretrain_computes(tmp_path: Path) -> None:
    path = write(tmp_path)
    first = run(path)
    assert first.returncode == 0, first.stderr
    study = make(tmp_path)
    found = read_records(study.results)
    assert found.keys() == cells_of(study, found)[0].keys()
    assert len(found) == 4
    some = next(record for record in found.values() if record["row"] == "galore" and record["seed"] == 1)
    assert [step for step, _ in some["curve"]] == [2, 4]
    assert some["commit"]
    before = study.results.read_bytes()
    assert (some["device"], some["precision"]) == ("cpu", "fp32")
    again = run(path)
    assert again.returncode == 0
    assert study.results.read_bytes() == before
    from subspan.training.config.settings import EvaluationConfig, PretrainConfig
    from subspan.training.pretraining import Pretraining

    config = PretrainConfig(
        optimizer="galore_adamw", rank=4, steps=4, batch_size=2, sequence_length=16, seed=1, device="cpu", threads=1,
        evaluation=EvaluationConfig(every=2, tokens=64), out=str(tmp_path / "alone"),
    )  # fmt: skip
    assert Pretraining(config).run().val_loss == pytest.approx(some["val_loss"], rel=1e-6)
    assert (folder_of(study, "galore", 1) / "run/config.yaml").exists()


def test_what_another_study_has_is_written_down_as_soon_as_it_is_asked_for(tmp_path: Path) -> None:
    """Only when the sweep has chosen a learning rate is it known which cell of a row another study has."""
    changes: dict[str, Any] = {
        "seeds": [0],
        "sweep": {"seeds": [9], "stages": [{"lr": [1, 2]}]},
        "rows": {"full": {"optimizer": "adamw"}},
    }
    path, study = write(tmp_path, **changes), make(tmp_path, **changes)
    (row,) = study.rows
    others = [cell_of(row, row.lr * factor, 0) for factor in (1, 2)]
    append_records(study.results.with_name("other.jsonl"), [record(cell, 1.5) for cell in others])
    result = run(path)
    assert result.returncode == 0, result.stderr
    found = read_records(study.results)
    assert len(found) == 3
    assert [entry["val_loss"] for entry in found.values() if entry["seed"] == 0] == [1.5]  # not run


def test_anew_is_to_run_all_of_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A study with a record and directories of its own takes nothing over, and what was there stays."""
    path = write(tmp_path, seeds=[0], rows={"full": SMALL["rows"]["full"]})
    assert run(path).returncode == 0
    study = make(tmp_path, seeds=[0], rows={"full": SMALL["rows"]["full"]})
    before = study.results.read_bytes()
    apart = ["--results", "again/small.jsonl"]
    again = run(path, *apart, "--runs", "again/runs")
    assert "0/1 runs" in again.stderr, again.stderr
    (found,) = read_records(tmp_path / "again/small.jsonl").values()
    assert found["val_loss"] == json.loads(before)["val_loss"]
    assert study.results.read_bytes() == before
    monkeypatch.chdir(tmp_path)
    assert main(["study", "table", str(path), *apart, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["n"] == 1


# What a scheduler and what a terminal sends are tried always, the other two among the slow tests.
@pytest.mark.parametrize(
    ("signum", "to_all"),
    [
        pytest.param(signal.SIGTERM, False, id="SIGTERM to the command"),
        pytest.param(signal.SIGINT, True, id="SIGINT to its runs too"),
        pytest.param(signal.SIGTERM, True, id="SIGTERM to its runs too", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, False, id="SIGINT to the command", marks=pytest.mark.slow),
    ],
)
def test_a_study_that_is_stopped_goes_on_and_loses_nothing(signum: int, to_all: bool, tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to the runs too, some schedulers SIGTERM. What the command sends must not count twice."""
    path, study = write(tmp_path, **ONE), make(tmp_path, **ONE)
    log = folder_of(study, "galore", 0) / "log.txt"
    with begun(path, Gate(tmp_path / "gate", step=6)) as process:
        (os.killpg if to_all else os.kill)(process.pid, signum)
        status = process.wait()
        assert "saved at step 7" in log.read_text()  # by now, for who waits for the command may end all that is left
        _, err = process.communicate()
    assert status == 128 + signum, err
    assert "the same command goes on" in err
    assert "Traceback" not in err
    assert read_records(study.results) == {}
    again = run(path)
    assert again.returncode == 0, again.stderr
    assert "continues at step 7" in log.read_text()
    (found,) = read_records(study.results).values()
    assert found["steps"] == 12


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"number": 1}\n')
    rows = {"lost": {"optimizer": "adamw", "data": str(tmp_path / "broken.jsonl")}, "mute": {"optimizer": "sgd"},
            "full": {"optimizer": "adamw"}}  # fmt: skip
    path = write(tmp_path, rows=rows, seeds=[0])
    study = make(tmp_path, rows=rows, seeds=[0])
    # Its log cannot be opened, so it ends before it can say anything: that is no divergence.
    (folder_of(study, "mute", 0) / "log.txt").mkdir(parents=True)
    result = run(path)
    assert result.returncode == 1
    lost = folder_of(study, "lost", 0) / "log.txt"
    assert str(lost) in result.stderr
    assert "mute/lr-" in result.stderr
    (found,) = read_records(study.results).values()
    assert found["row"] == "full"
    assert "broken.jsonl" in lost.read_text()
    assert "Traceback" not in lost.read_text()


def test_a_content_that_is_not_there_is_named_before_anything_runs(tmp_path: Path) -> None:
    rows = {"lost": {"optimizer": "adamw", "data": str(tmp_path / "absent.jsonl")}, "full": {"optimizer": "adamw"}}
    with pytest.raises(InputError, match=r"absent\.jsonl.*no such file.*commit its hash in the study file"):
        Runner(make(tmp_path, rows=rows, seeds=[0]), tmp_path / "runs", jobs=1).run()
    assert not (tmp_path / "results").exists()


def test_a_run_of_code_in_no_commit_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subspan.study.runner.stamp", lambda: {"commit": "4567def"})
    rows = {"full": SMALL["rows"]["full"]}
    path, study = write(tmp_path, rows=rows, seeds=[0]), make(tmp_path, rows=rows, seeds=[0])
    cell = cell_of(study.rows[0], study.rows[0].lr, 0)
    append_records(study.results, [record(cell, 9.0) | {"commit": "0123abc-dirty"}])
    result = run(path)
    assert result.returncode == 0, result.stderr
    assert read_records(study.results)[cell.key]["val_loss"] < 9.0  # the later line of a key counts


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ValueError("zip() argument 2 is shorter"), 70, "failed by a fault of the program; its traceback is in"),
        (SettingError("rank=0: expected more"), 78, "failed; its last words are in"),
        (KeyboardInterrupt(), 128 + signal.SIGINT, None),
    ],
)
def test_a_fault_of_the_program_is_not_the_users(
    error: BaseException, status: int, told: str | None, tmp_path: Path
) -> None:
    """It is reported as a fault, and its traceback is kept in the log; an error of the user has none."""
    log = tmp_path / "log.txt"
    context = get_context("forkserver")
    context.set_forkserver_preload(_MODULES)
    ended = context.Process(target=fail, args=(error, str(log)))
    ended.start()
    ended.join()
    assert ended.exitcode == status
    assert ("Traceback" in log.read_text()) == (status == 70)
    study = make(tmp_path, seeds=[0])
    runner = Runner(study, tmp_path / "runs", jobs=1)
    cell = cell_of(study.rows[0], study.rows[0].lr, 0)
    runner._collect(_Running(cell, ended, tmp_path))
    assert runner.failed == ({cell.key: f"{told} {log}"} if told else {})


def test_a_run_that_outlives_its_command_keeps_its_directory(tmp_path: Path) -> None:
    """After kill -9 of the command its runs go on, and a second process must not train in the same place meanwhile."""
    path, study, gate = write(tmp_path, **ONE), make(tmp_path, **ONE), Gate(tmp_path / "gate", step=6)
    folder = folder_of(study, "galore", 0)
    with begun(path, gate) as process:
        process.kill()
    again = run(path)
    gate.open()
    assert again.returncode == 1, again.stderr
    assert "another process trains there" in (folder / "log.txt").read_text()
    while not (folder / "run/summary.json").exists():
        time.sleep(0.01)
    rows = [row["step"] for row in read_metrics(folder / "run") if "val_loss" in row]
    assert len(rows) == len(set(rows))
