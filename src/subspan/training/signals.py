"""Signals: they stop a run between two steps, or between two batches of an evaluation."""

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

    def __init__(self, signum: int, step: int, out: str, processes: int = 1, command: str = "pretrain") -> None:
        words = [command, "--config", f"{out}/config.yaml", "--out", out, "--resume", "auto"]
        again = f"{_program(processes)} {shlex.join(words)}"
        super().__init__(f"{signal.Signals(signum).name}: saved at step {step}; to continue: {again}")
        self.signum = signum


class StopAskedError(Exception):
    """A signal asked the run to stop in the middle of an evaluation, which is given up."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def _program(processes: int) -> str:
    """The words that start this command again on as many processes.

    The addresses of several machines are known only to torchrun, so they are left out.
    """
    if processes == 1:
        return "subspan"
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(processes)
    return f"torchrun --nproc-per-node {processes} -m subspan" if one_machine else "torchrun ... -m subspan"


@contextmanager
def interrupt_ends_process() -> Iterator[None]:
    """Let Ctrl-C end the process with one line, as long as nothing is under way.

    An exception in the middle of an import would be a riddle.
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
    """Collect SIGTERM and SIGINT in a list, to be acted on between steps or batches. A second signal acts at once."""
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
