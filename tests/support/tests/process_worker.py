"""What the ranks of test_processes.py do. A rank imports it by name, which it cannot do with a file of tests."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from support.processes import joined


def add_up(path: str) -> None:
    with joined():
        total = torch.tensor(float(dist.get_rank() + 1))
        dist.all_reduce(total)
        Path(f"{path}.{dist.get_rank()}").write_text(str(total.item()))
        print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}")


def fail(path: str) -> None:
    """Fails the second rank, after the first has begun to wait for nothing."""
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
