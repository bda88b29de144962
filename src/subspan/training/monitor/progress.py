"""What a person sees while a run goes on, on standard error: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from subspan.utils.messages import say


class ProgressLine:
    """Steps, loss, tokens per second and time left, as a context manager.

    Args:
        total: steps of the run.
        done: steps that were made before.
        shown: whether anything is written at all.
    """

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
        """Take the newest measurements, which the next ``update`` shows."""
        self._note = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
        self._fresh = True

    def update(self, step: int) -> None:
        """Show that ``step`` is done."""
        if self.bar:
            self.bar.update(self.task, completed=step, note=self._note)
        elif self.shown and self._fresh and (step >= self._said + self.every or step == self.total):
            left = (time.monotonic() - self.began) / max(1, step - self.start) * (self.total - step)
            say(f"step {step}/{self.total}  {self._note}" + (f"  {duration(left)} left" if step < self.total else ""))
            self._said, self._fresh = step, False

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.bar:
            self.bar.console.print(text, highlight=False)
        elif self.shown:
            say(text)


def terminal() -> Console | None:
    """Standard error if it is a terminal on which a bar can be drawn, else ``None``. NO_COLOR turns colours off."""
    console = Console(stderr=True)
    return console if sys.stderr.isatty() and not console.is_dumb_terminal else None


def duration(seconds: float) -> str:
    """Seconds as words, in the unit that a person would use."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
