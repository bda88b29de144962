"""Starts the ranks of a test, bounds their time, and brings back what they said.

Ranks are forked from a server that has imported torch and transformers once; to start an interpreter for each costs
more than most tests do in it. A forked rank is a process like another, with two exceptions. Nothing but ``launch``
watches it; and strings hash alike on all ranks, so that they agree on the order of a set. Where that matters, and where
torchrun does, ``launch(..., torchrun=True)`` starts them as users do.
"""

import contextlib
import faulthandler
import gc
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 1200
"""Seconds for all ranks together. One that hangs so long prints where, and ends."""

GRACE = 120
"""Seconds that ranks have to end in after one has failed. They do so by themselves, if they wait for it."""

PRELOADED = [
    "pytest", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.debug", "subspan",
    "subspan.cli.main", "subspan.training.pretraining", "transformers.models.llama.modeling_llama",
]  # fmt: skip
"""What ranks import. To leave one out makes them slower, and no more than that."""


def launch(
    main: Callable[..., Any], ranks: int, *arguments: str, torchrun: bool = False, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Lets so many ranks call ``main``, a function of a module of the tests, with ``arguments``.

    What it returns is the rank's exit status; ``None`` is 0. The result has that of a rank that failed, or 0, and what
    all ranks have said. Unless ``check`` is off, a rank that fails fails the test, with its traceback.
    """
    done = (_by_torchrun if torchrun else _by_fork)(main, ranks, arguments)
    assert not check or done.returncode == 0, done.stderr[-6000:]
    return done


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Stands around what a rank does in its process group. DDP must be a local of a function that has returned when
    this ends.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    yield
    # DDP must be gone before the group is: as its last holder it would wait for gloo's threads with the interpreter
    # locked, and a thread that frees its last work needs that lock.
    gc.collect()
    dist.destroy_process_group()


def environment(**more: str) -> dict[str, str]:
    """The environment of a process that is to find what this one finds."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **more}


def torchrun_command(ranks: int, *arguments: str) -> list[str]:
    """The command that starts ``arguments`` under torchrun."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]


def _by_torchrun(main: Callable[..., Any], ranks: int, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    command = torchrun_command(ranks, __file__, main.__module__, main.__name__, *arguments)
    return subprocess.run(command, capture_output=True, text=True, env=environment())


def _by_fork(main: Callable[..., Any], ranks: int, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    # The ranks' meeting place is here, as under torchrun it is in torchrun, and outlives any of them.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    size = str(ranks)
    common = environment(MASTER_ADDR="localhost", MASTER_PORT=str(store.port), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size,
                         TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")  # fmt: skip
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            for kind in ("out", "err"):
                Path(f"{folder}/{rank}.{kind}").touch()
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            target = (main, arguments, own, f"{folder}/{rank}", TIMEOUT)
            processes.append(context.Process(target=_be_a_rank, args=target, name=f"rank {rank}", daemon=True))
        try:
            with _exported(common):  # the server, which the first rank starts, has the environment of that moment
                for process in processes:
                    process.start()
            _await(processes)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
            for process in processes:
                process.join()
        out, err = (
            "".join(Path(f"{folder}/{rank}.{kind}").read_text() for rank in range(ranks)) for kind in ("out", "err")
        )
        codes = [process.exitcode or 0 for process in processes]
    if any(codes):
        why = " (255: their server was killed, and they are on their own)" if 255 in codes else ""
        err += f"exit codes of the ranks: {codes}{why}\n"
    return subprocess.CompletedProcess([], next(filter(None, codes), 0), out, err)


def _await(processes: list[Any]) -> None:
    """Waits until all have ended, or too long after one has failed."""
    running, until = list(processes), time.monotonic() + TIMEOUT + GRACE
    while running and wait([process.sentinel for process in running], timeout=max(0.0, until - time.monotonic())):
        for process in [process for process in running if not process.is_alive()]:
            running.remove(process)
            if process.exitcode:
                until = min(until, time.monotonic() + GRACE)


@contextlib.contextmanager
def _exported(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _be_a_rank(
    main: Callable[..., Any], arguments: tuple[str, ...], variables: dict[str, str], log: str, seconds: float
) -> None:
    os.environ.clear()
    os.environ.update(variables)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a study's server, which may be there already, ignores both
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{kind}", os.O_WRONLY | os.O_APPEND), number)
    faulthandler.dump_traceback_later(seconds, exit=True)
    sys.exit(main(*arguments))


if __name__ == "__main__":
    module, function, *words = sys.argv[1:]
    sys.exit(getattr(importlib.import_module(module), function)(*words))
