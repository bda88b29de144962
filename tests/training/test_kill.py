"""A run of two processes that is killed again and again at random points ends in the weights of an unbroken one."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.launching import same, settings, weights
from support.processes import torchrun_command
from support.waiting import started, wait_until

from subspan.training.monitor.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]  # not "distributed", whose tests together take minutes
KILLS, STEPS = 10, 350


def children(pid: int) -> list[int]:
    """The processes that ``pid`` has started, with the ranks in order."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:  # it has ended meanwhile
            pass
    return sorted(found)


def last_step(run: Path) -> int:
    rows = read_metrics(run)
    return int(rows[-1]["step"]) if rows else 0


def test_killed_again_and_again(corpus: Path, tmp_path: Path) -> None:
    """A rank or the whole job is killed at the start, in a step, or while it saves. The same command always goes on."""
    draw, broken, whole = random.Random(0), tmp_path / "broken", tmp_path / "whole"
    more = {
        "steps": STEPS,
        "optimizer": "sara_adamw",
        "checkpoint.every": 3,
        "checkpoint.keep": 2,
        "evaluation.every": 50,
    }
    arguments = [*settings(corpus, broken, **more), "--parallel=ddp", "--resume=auto"]
    reached = []
    for number in range(KILLS):
        begin = last_step(broken)
        # Every fourth is killed while it starts, before it has got any further.
        goal = begin + (draw.randint(1, 40) if number % 4 else 0)
        with started(torchrun_command(2, "-m", "subspan", *arguments), stdout=subprocess.DEVNULL) as process:
            wait_until(lambda goal=goal: len(children(process.pid)) == 2 and last_step(broken) >= goal, process)
            time.sleep(draw.uniform(0, 0.1))
            ranks = children(process.pid)
            doomed = draw.choice([ranks[:1], ranks[1:], [process.pid, *ranks]])
            for pid in doomed:
                os.kill(pid, signal.SIGKILL)
            _, err = process.communicate()
        assert process.returncode != 0
        assert not (broken / "summary.json").exists(), "the run was over before it was killed"
        assert "Traceback" not in err.partition("torch/distributed/elastic")[0], err
        reached.append(last_step(broken))
    assert len({*reached}) > KILLS / 2, "it was killed at few different steps"

    for command in (arguments, [*settings(corpus, whole, **more), "--parallel=ddp"]):
        with started(torchrun_command(2, "-m", "subspan", *command), stdout=subprocess.DEVNULL) as process:
            _, err = process.communicate()
        assert process.returncode == 0, err
    assert same(weights(broken, STEPS), weights(whole, STEPS))
    rows = [
        [{key: row.get(key) for key in ("step", "loss", "val_loss")} for row in read_metrics(out)]
        for out in (broken, whole)
    ]
    assert rows[0] == rows[1]
