"""Stopping a run between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class RunInterruptedError(Exception):
    """A signal asked the run to stop; it has saved a checkpoint."""

    def __init__(self, signum: int, step: int, out: str, ranks: int = 1, command: str = "pretrain") -> None:
        program = "subspan" if ranks == 1 else "torchrun ... -m subspan"
        again = f"{program} {command} --config {out}/config.yaml --out {out} --resume auto"
        super().__init__(f"{signal.Signals(signum).name}: saved at step {step}; to continue: {again}")
        self.signum = signum


@contextmanager
def interrupt_ends_process() -> Iterator[None]:
    """Ctrl-C ends the process without a word, while nothing is under way: an exception amid imports would be a riddle."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
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

    previous = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    for signum in previous:
        signal.signal(signum, note)
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
