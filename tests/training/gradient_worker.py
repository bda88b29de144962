"""An infinite entry in the gradient of one rank, in a run that does not clip."""

import math
from pathlib import Path
from typing import Any

import torch
from support.small_runs import config

from subspan import distributed
from subspan.training.pretraining import Pretraining
from subspan.training.processes import join, run_joined


def main(mode: Any, data: str, out: str) -> int:
    processes = join(mode, "cpu")

    def check() -> int:
        settings = config(Path(data), Path(out), model="llama-nano", steps=2, batch_size=4, optimizer="adamw",
                          parallel=mode, clip=None)  # fmt: skip
        run = Pretraining(settings, processes)
        first, *others = run.model.parameters()
        for p in (first, *others):
            p.grad = torch.ones_like(p)
        if mode == "ddp" or processes.rank == 1:  # DDP's gradients are the same on every rank
            distributed.local(first.grad)[0, 0] = math.inf
        norm = run.precision.clip_(run.optimizer, list(run.model.parameters()), None)
        assert float(processes.whole_norm(norm)) == math.inf
        assert all(bool((distributed.local(p.grad) == 1).all()) for p in others)
        assert int((distributed.local(first.grad) != 1).sum()) == (mode == "ddp" or processes.rank == 1)
        return 0

    return run_joined(processes, check)
