"""A run in a process of its own, which prints the megabytes between an early step and the last.

memory_worker.py CONFIG EARLY KEPT      a pickled config, the step, tensors of 16 x 16 that each step keeps
"""

import gc
import pickle
import sys
from pathlib import Path

import torch

from subspan.training.pretraining import Pretraining


def resident() -> float:
    """Megabytes of this process that are in memory."""
    gc.collect()
    # Only what belongs to this process, because pages of shared libraries come and go.
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
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


def main(config: str, early: str, kept: str) -> None:
    import subspan.utils.atomic_files

    subspan.utils.atomic_files.sync = lambda path: None  # the disk is not what is tested here
    run, leak = Pretraining(pickle.loads(Path(config).read_bytes())), []
    step = run.optimizer.step

    def leaking() -> None:
        leak.extend(torch.ones(16, 16) for _ in range(int(kept)))
        step()

    if int(kept):
        run.optimizer.step = leaking  # type: ignore[method-assign, assignment]
    print(growth(run, int(early)))


if __name__ == "__main__":
    main(*sys.argv[1:])
