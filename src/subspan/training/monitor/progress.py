"""What a person sees while a run goes on: a bar on a terminal, a line now and then elsewhere. On standard error."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressLine:
    """Steps, loss, tokens per second and time left. A context manager. Where it is not ``shown``, it is silent."""

    def __init__(self, total: int, done: int, shown: bool = True) -> None:
        self.shown = shown
        self.total, self.start, self.began = total, done, time.monotonic()
        self.every = max(1, total // 20)
        self._note, self._fresh, self._said = "", False, done
        self.bar: Progress | None = None
        console = terminal()
        if shown and console:
            self.bar = Progress(
                TextColumn("step"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task("", total=total, completed=done, note="")

    def __enter__(self) -> "ProgressLine":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def note(self, loss: float, tokens_per_second: float) -> None:
        """The newest measurements."""
        self._note = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
        self._fresh = True

    def update(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step, note=self._note)
        elif self.shown and self._fresh and (step >= self._said + self.every or step == self.total):
            left = (time.monotonic() - self.began) / max(1, step - self.start) * (self.total - step)
            say(f"step {step}/{self.total}  {self._note}" + (f"  {duration(left)} left" if step < self.total else ""))
            self._said, self._fresh = step, False

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.bar:
            self.bar.console.print(text, highlight=False)
        elif self.shown:
            say(text)


def terminal() -> Console | None:
    """Standard error, where it is a terminal on which a bar can be drawn. It has no colours under NO_COLOR."""
    console = Console(stderr=True)
    return console if sys.stderr.isatty() and not console.is_dumb_terminal else None


def duration(seconds: float) -> str:
    """In the unit that a person would use."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
