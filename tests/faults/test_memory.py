"""Memory does not grow with the number of steps."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from subspan.training.config import CheckpointConfig, EvaluationConfig, PretrainConfig
from subspan.training.pretrain import Pretraining

Make = Callable[..., PretrainConfig]
METHODS = {
    "sara": {"optimizer": "sara_adamw"},
    "sara_backward_side": {"optimizer": "sara_adamw", "backward_side": True},
    "golore": {"optimizer": "golore_adamw"},
    "stream": {"optimizer": "sara_adamw"},
}
ALLOWED = 2.0
"""Megabytes. Measured are 0.0 to 0.4; a leak of one tensor of 16 x 16 in a step is beyond it, as the last test shows."""


def resident() -> float:
    """Megabytes of this process that are in memory."""
    gc.collect()
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        pytest.skip("resident memory is read from /proc/self/smaps_rollup, which is not here")
    # What the process alone holds: pages of shared libraries come and go.
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Swap:"))) / 1024


def growth(run: Pretraining, early: int) -> float:
    """Megabytes between step ``early`` and the last step of ``run``."""
    seen: list[float] = []
    read, count = run.data.next_batch, iter(range(1, 10**9))

    def next_batch(size: int) -> object:
        if next(count) in (early, run.config.steps):
            seen.append(resident())
        return read(size)

    run.data.next_batch = next_batch  # type: ignore[method-assign]
    run.run()
    assert len(seen) == 2
    return seen[1] - seen[0]


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
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", METHODS)
def test_memory_is_flat(name: str, tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident memory after 200 and after 2,000 steps, refreshes, evaluations and checkpoints included."""
    monkeypatch.setattr("subspan.training.files.sync", lambda path: None)  # the disk is not what is tested here
    grown = growth(Pretraining(config(name, tiny, 2000, tmp_path)), early=200)
    assert grown < ALLOWED, f"{grown:.1f} MB more after 2,000 steps than after 200"


@pytest.mark.slow  # the allocator of a process that has run other tests has room to hide a small leak
def test_a_leak_would_be_seen(tiny: Make, tmp_path: Path) -> None:
    """The measure itself. As many tensors are kept as one a step would be in the long run."""
    run, kept = Pretraining(config("sara", tiny, 200, tmp_path)), []
    step = run.optimizer.step

    def leaking() -> None:
        kept.extend(torch.ones(16, 16) for _ in range(10))
        step()

    run.optimizer.step = leaking  # type: ignore[method-assign, assignment]
    assert growth(run, early=20) > ALLOWED
