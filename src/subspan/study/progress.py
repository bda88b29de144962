"""The progress of a study: a bar on a terminal, elsewhere a line for each change. It goes to standard error."""

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from subspan.study.study_file import Cell
from subspan.training.monitor.progress import duration, terminal
from subspan.utils.messages import say


def _name(cell: Cell) -> str:
    """Return the row of a run with its settings, as far as a sweep may choose them, and its seed."""
    config = cell.config
    chosen = {
        "rest": config.optim.lr_full,
        "betas": config.optim.betas,
        "decay": config.weight_decay or None,
        "warmup": config.schedule.warmup_steps,
    }
    words = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in chosen.items()
             if value is not None]  # fmt: skip
    return " ".join([cell.row, f"lr {config.lr:.4g}", *words, f"seed {config.seed}"])


class StudyProgress:
    """Shows how many runs are done, which ones run, and the time. It is a context manager.

    Args:
        name: the name of the study.
    """

    def __init__(self, name: str) -> None:
        self._name, self._last, self._began, self._first = name, "", time.monotonic(), -1
        self._bar = None
        if console := terminal():
            columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), console=console)
            self._task = self._bar.add_task("", note="")

    def __enter__(self) -> "StudyProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, whole: int, cells: list[Cell]) -> None:
        """Show that ``done`` of ``whole`` runs are done and that ``cells`` are under way."""
        if self._first < 0:
            self._first = done
        names = "; ".join(map(_name, cells))
        if self._bar:
            self._bar.update(self._task, completed=done, total=whole, note=f"{self._left(done, whole)} {names}")
        elif (line := f"{self._name}: {done}/{whole} runs; now {names or 'none'}") != self._last:
            say(line + self._left(done, whole))
            self._last = line

    def _left(self, done: int, whole: int) -> str:
        new = done - self._first
        if new <= 0 or done >= whole:
            return ""
        return f"; some {duration((time.monotonic() - self._began) / new * (whole - done))} left"
