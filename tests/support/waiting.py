"""Processes that a test starts, waits for and stops. Nothing here has a time limit: that of the test is enough."""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from support.processes import environment


@contextlib.contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process with its standard error piped, which does not outlive the block."""
    options = {"env": environment(), "stderr": subprocess.PIPE, "text": True} | options
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(happened: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Waits for what ``process`` is to do. If it ends without, the test fails with what it said."""
    while not happened():
        if process.poll() is not None and not happened():
            raise AssertionError(f"it has ended with {process.returncode}: {process.communicate()[1]}")
        time.sleep(0.01)


class Gate:
    """Where a run stops and waits, once it has taken ``step`` steps. Its process must have ``environment``."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        folder.mkdir()
        variables = environment(GATE=str(folder), GATE_STEP=str(step))
        path = os.pathsep.join([str(Path(__file__).parent / "at_start"), variables["PYTHONPATH"]])
        self.environment = variables | {"PYTHONPATH": path}

    def wait_until_reached(self, process: subprocess.Popen[str]) -> None:
        """Waits until a run that ``process`` does, or has started, is there."""
        wait_until((self.folder / "there").exists, process)

    def open(self) -> None:
        """Lets the run go on."""
        (self.folder / "open").touch()
