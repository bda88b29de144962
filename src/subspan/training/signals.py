"""Stopping a run between two steps."""

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from subspan._interrupt import stop


class RunInterruptedError(Exception):
    """A signal asked the run to stop; it has saved a checkpoint."""

    def __init__(self, signum: int, step: int, out: str, ranks: int = 1, command: str = "pretrain") -> None:
        words = [command, "--config", f"{out}/config.yaml", "--out", out, "--resume", "auto"]
        again = f"{_program(ranks)} {shlex.join(words)}"
        super().__init__(f"{signal.Signals(signum).name}: saved at step {step}; to continue: {again}")
        self.signum = signum


def _program(ranks: int) -> str:
    """What starts this command again on as many processes; of those on several machines torchrun alone knows the
    addresses.
    """
    if ranks == 1:
        return "subspan"
    here = os.environ.get("LOCAL_WORLD_SIZE") == str(ranks)
    return f"torchrun --nproc-per-node {ranks} -m subspan" if here else "torchrun ... -m subspan"


@contextmanager
def interrupt_ends_process() -> Iterator[None]:
    """Ctrl-C ends the process with one line, while nothing is under way: an exception amid imports would be a
    riddle.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def collect_signals() -> Iterator[list[int]]:
    """A list into which SIGTERM and SIGINT go, to be acted on between steps. A second one acts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield received
        return

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        signal.signal(signum, previous[signal.Signals(signum)])
        if signum == signal.SIGINT and sys.stderr.isatty():  # a person waits, and a step may take minutes
            os.write(2, b"\nstops after this step and saves; Ctrl-C again stops at once\n")

    previous = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    for signum in previous:
        signal.signal(signum, note)
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
