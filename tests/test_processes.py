"""What starts ranks brings back what they said, and leaves none behind."""

import os
import time
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from processes import joined, launch

pytestmark = pytest.mark.distributed


def add_up(path: str) -> None:
    with joined():
        total = torch.tensor(float(dist.get_rank() + 1))
        dist.all_reduce(total)
        Path(f"{path}.{dist.get_rank()}").write_text(str(total.item()))
        print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}")


def fail(path: str) -> None:
    """The second rank, after the first has begun to wait for nothing."""
    if os.environ["RANK"] == "0":
        Path(path).write_text(str(os.getpid()))
        time.sleep(1000)
    while not Path(path).exists():
        time.sleep(0.01)
    raise ZeroDivisionError("of the second rank")


def hang() -> None:
    time.sleep(1000)


def status(code: str) -> int:
    return int(code) * int(os.environ["RANK"])


@pytest.mark.parametrize("torchrun", [False, True])
def test_ranks_meet(torchrun: bool, tmp_path: Path) -> None:
    done = launch(add_up, 3, str(tmp_path / "sum"), torchrun=torchrun)
    assert [(tmp_path / f"sum.{rank}").read_text() for rank in range(3)] == ["6.0"] * 3
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} of 3" for rank in range(3)]


def test_a_rank_that_fails_fails_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its traceback; one that waits on is ended."""
    monkeypatch.setattr(processes, "GRACE", 1)
    with pytest.raises(AssertionError, match=r"(?s)in fail.*ZeroDivisionError: of the second rank.*\[-9, 1\]"):
        launch(fail, 2, str(tmp_path / "pid"))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_rank_that_hangs_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "TIMEOUT", 2)
    with pytest.raises(AssertionError, match=r"(?s)Timeout.*in hang"):
        launch(hang, 2)


def test_exit_status() -> None:
    assert launch(status, 2, "7", check=False).returncode == 7
    assert launch(status, 2, "0").returncode == 0
