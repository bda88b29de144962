"""Memory does not grow with the number of steps."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import environment

from subspan.training.config.settings import CheckpointConfig, EvaluationConfig, PretrainConfig

Make = Callable[..., PretrainConfig]
WORKER = Path(__file__).with_name("memory_worker.py")
METHODS = {
    "sara": {"optimizer": "sara_adamw"},
    "sara_backward_side": {"optimizer": "sara_adamw", "backward_side": True},
    "golore": {"optimizer": "golore_adamw"},
    "stream": {"optimizer": "sara_adamw"},
}
ALLOWED = 2.0
"""Megabytes. Runs grow by 0.0 to 0.4. A leak of one tensor of 16 x 16 in a step exceeds it, as the last test shows."""


def growth(config: PretrainConfig, tmp_path: Path, early: int, kept: int = 0) -> float:
    """Megabytes between step ``early`` and the last, in a fresh process, because a process that has run other tests has
    room to hide a leak.

    Each step keeps ``kept`` tensors of 16 x 16.
    """
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("resident memory is read from /proc/self/smaps_rollup, which is not here")
    path = tmp_path / "config.pickle"
    path.write_bytes(pickle.dumps(config))
    command = [sys.executable, str(WORKER), str(path), str(early), str(kept)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


def config(name: str, make: Make, steps: int, tmp_path: Path) -> PretrainConfig:
    """A run that refreshes, logs, evaluates and saves all the way, more often in the beginning than usual."""
    settings: dict[str, object] = {
        "steps": steps,
        "update_proj_gap": 10,
        "log_every": 5,
        "evaluation": EvaluationConfig(every=50, tokens=64),
        "checkpoint": CheckpointConfig(every=50, keep=2),
    }
    if name == "stream":
        folder = tmp_path / "c4" / "en"
        folder.mkdir(parents=True)
        for half in ("train", "validation"):
            lines = "".join(f'{{"text": "document {i} {"of some words " * 20}"}}\n' for i in range(40))
            (folder / f"c4-{half}.00000-of-00001.json").write_text(lines)
        settings["data"] = f"c4:{folder.parent}"
    return make(**settings | METHODS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_memory_is_flat(name: str, tiny: Make, tmp_path: Path) -> None:
    """Resident memory is compared after 200 and 2,000 steps, with refreshes, evaluations and checkpoints."""
    grown = growth(config(name, tiny, 2000, tmp_path), tmp_path, early=200)
    assert grown < ALLOWED, f"{grown:.1f} MB more after 2,000 steps than after 200"


@pytest.mark.slow
def test_a_leak_would_be_seen(tiny: Make, tmp_path: Path) -> None:
    """The measure finds a leak. In the short run each step keeps as many tensors as one a step would be in the long
    run.
    """
    assert growth(config("sara", tiny, 200, tmp_path), tmp_path, early=20, kept=10) > ALLOWED
