"""Starts runs of several processes."""

import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file
from support import processes
from training import parallel_worker


def settings(data: Path | str, out: Path, **extra: object) -> list[str]:
    """Arguments of a run of a second."""
    given = {"data": data, "out": out, "batch_size": 4, "sequence_length": 16, "rank": 4, "update_proj_gap": 5, "steps": 12,
             "threads": 1, "device": "cpu", "log_every": 1, "checkpoint.every": 4, "checkpoint.keep": 9,
             "evaluation.every": 6, "evaluation.tokens": 80} | extra  # fmt: skip
    return ["pretrain", "--model=llama-nano", *(f"--{key}={value}" for key, value in given.items())]


def launch(
    ranks: int, *runs: list[str], what: str = "nothing", step: int = 0, torchrun: bool = False
) -> subprocess.CompletedProcess[str]:
    """Let the worker do the runs, one after the other, on ``ranks`` processes."""
    arguments = [word for run in runs for word in ("then", *run)][1:]
    return processes.launch(parallel_worker.main, ranks, what, str(step), *arguments, torchrun=torchrun, check=False)


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
