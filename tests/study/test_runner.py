"""Real runs, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from study.common import SMALL, make, write

from subspan.study.plan import cells_of
from subspan.study.records import read_records

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(path: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "subspan", "study", "run", str(path), *more]


def test_runs_are_run_once_and_are_what_pretrain_computes(tmp_path: Path) -> None:
    path = write(tmp_path)
    first = subprocess.run(command(path), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    study = make(tmp_path)
    found = read_records(study.results)
    assert found.keys() == {cell.key for cell in cells_of(study, found)}
    assert len(found) == 4
    some = next(record for record in found.values() if record["row"] == "galore" and record["seed"] == 1)
    assert [step for step, _ in some["curve"]] == [2, 4]
    assert some["commit"]
    before = study.results.read_bytes()
    again = subprocess.run(command(path), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert study.results.read_bytes() == before
    run = tmp_path / "runs/studies/small/galore/lr-0.01-seed-1/run"
    from subspan.training.config import EvaluationConfig, PretrainConfig
    from subspan.training.pretrain import Pretraining

    config = PretrainConfig(
        optimizer="galore_adamw", rank=4, steps=4, batch_size=2, sequence_length=16, seed=1, device="cpu", threads=1,
        evaluation=EvaluationConfig(every=2, tokens=64), out=str(tmp_path / "alone"),
    )  # fmt: skip
    assert Pretraining(config).run().val_loss == pytest.approx(some["val_loss"], rel=1e-6)
    assert (run / "config.yaml").exists()


def test_a_study_that_is_stopped_goes_on_and_loses_nothing(tmp_path: Path) -> None:
    base = SMALL["base"] | {"steps": 400, "checkpoint": {"every": 5}}
    path = write(tmp_path, base=base, seeds=[0], rows={"galore": SMALL["rows"]["galore"]})
    log = tmp_path / "runs/studies/small/galore/lr-0.01-seed-0/run/checkpoints"
    process = subprocess.Popen(command(path), cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not list(log.glob("step-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "the same command goes on" in err
    assert "Traceback" not in err
    study = make(tmp_path, base=base, seeds=[0], rows={"galore": SMALL["rows"]["galore"]})
    assert read_records(study.results) == {}
    again = subprocess.run(command(path), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "continues at step" in (log.parents[1] / "log.txt").read_text()
    (found,) = read_records(study.results).values()
    assert found["steps"] == 400


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    rows = {"lost": {"optimizer": "adamw", "data": str(tmp_path / "absent.jsonl")}, "mute": {"optimizer": "sgd"},
            "full": {"optimizer": "adamw"}}  # fmt: skip
    path = write(tmp_path, rows=rows, seeds=[0])
    (mute,) = [row for row in make(tmp_path, rows=rows, seeds=[0]).rows if row.name == "mute"]
    # Its log cannot be opened, so it ends before it can say anything: that is no divergence.
    (tmp_path / f"runs/studies/small/mute/lr-{mute.lr:.4g}-seed-0/log.txt").mkdir(parents=True)
    result = subprocess.run(command(path), cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "lost/lr-0.0025-seed-0/log.txt" in result.stderr
    assert "mute/lr-" in result.stderr
    (found,) = read_records(make(tmp_path, rows=rows, seeds=[0]).results).values()
    assert found["row"] == "full"
    assert "absent.jsonl" in (tmp_path / "runs/studies/small/lost/lr-0.0025-seed-0/log.txt").read_text()
