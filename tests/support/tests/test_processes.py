"""What starts ranks brings back what they said, and leaves none behind."""

import os
import re
from pathlib import Path

import pytest
from support import processes
from support.processes import launch
from support.tests.process_worker import add_up, fail, hang, status

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("torchrun", [False, True])
def test_ranks_meet(torchrun: bool, tmp_path: Path) -> None:
    done = launch(add_up, 3, str(tmp_path / "sum"), torchrun=torchrun)
    assert [(tmp_path / f"sum.{rank}").read_text() for rank in range(3)] == ["6.0"] * 3
    # torchrun does not keep apart what ranks say at the same time.
    assert sorted(re.findall("rank . of 3", done.stdout)) == [f"rank {rank} of 3" for rank in range(3)]


def test_a_rank_that_fails_fails_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its traceback is shown, and a rank that waits on is ended."""
    monkeypatch.setattr(processes, "GRACE", 1)
    with pytest.raises(AssertionError, match=r"(?s)in fail.*ZeroDivisionError: of the second rank.*\[-9, 1\]"):
        launch(fail, 2, str(tmp_path / "pid"))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_rank_that_hangs_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "TIMEOUT", 5)
    with pytest.raises(AssertionError, match=r"(?s)Timeout.*in hang"):
        launch(hang, 2)


def test_exit_status() -> None:
    assert launch(status, 2, "7", check=False).returncode == 7
    assert launch(status, 2, "0").returncode == 0
