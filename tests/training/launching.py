"""Starts runs of several processes, as a user does."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("parallel_worker.py")


def settings(data: Path | str, out: Path, **extra: object) -> list[str]:
    """Arguments of a run of a second."""
    given = {"data": data, "out": out, "batch_size": 4, "sequence_length": 16, "rank": 4, "update_proj_gap": 5, "steps": 12,
             "threads": 1, "device": "cpu", "log_every": 1, "checkpoint.every": 4, "checkpoint.keep": 9,
             "evaluation.every": 6, "evaluation.tokens": 80} | extra  # fmt: skip
    return ["pretrain", "--model=llama-nano", *(f"--{key}={value}" for key, value in given.items())]


def torchrun(ranks: int, *arguments: str) -> list[str]:
    """A command that starts ``arguments`` under torchrun."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def launch(ranks: int, *runs: list[str], what: str = "nothing", step: int = 0) -> subprocess.CompletedProcess[str]:
    """Let the worker do the runs, one after the other, on ``ranks`` processes."""
    arguments = [word for run in runs for word in ("then", *run)][1:]
    command = torchrun(ranks, str(WORKER), what, str(step), *arguments)
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=600)


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
