"""TensorBoard files of a run. ``metrics.jsonl`` holds the same, so a full disk ends them and not the run."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from subspan.utils.errors import first_line
from subspan.utils.messages import say


class TensorBoard:
    """Writes rows of metrics to ``folder``. If that fails, a line on stderr says so, and no more is written.

    Args:
        folder: the directory of the files.
        step: the step at which the run starts. TensorBoard hides what it has of later steps.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._folder = folder
        self._writer: Any = None
        # The writer's thread raises an error that ``write`` raises again. Python would show it as a traceback.
        self._hook, threading.excepthook = threading.excepthook, self._quiet
        with self._or_drop():
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder, purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Write each number of ``row`` under its name."""
        with self._or_drop():
            for name, value in row.items():
                if self._writer and name != "step":
                    self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Write what is left, and give back the hook for errors of threads."""
        with self._or_drop():
            if self._writer:
                self._writer.close()
        threading.excepthook = self._hook

    @contextlib.contextmanager
    def _or_drop(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            say(f"{self._folder} cannot be written: {first_line(error)}; it ends here, and metrics.jsonl goes on")

    def _quiet(self, args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            self._hook(args)
