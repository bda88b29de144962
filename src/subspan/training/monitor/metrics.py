"""Metrics of a run: ``metrics.jsonl`` always, TensorBoard if asked; and other files of rows like it."""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from subspan.training.monitor.progress import say
from subspan.training.monitor.tensorboard import Board
from subspan.utils.atomic_files import no_space, write_text
from subspan.utils.errors import InputError


class Metrics:
    """Appends rows to ``metrics.jsonl``; each has a ``step``.

    Args:
        folder: the run's directory.
        name: of the file.
        step: where the run starts. Rows beyond it, written before an interruption, are dropped: they will come again.

    Rows that cannot be read are left out, with a line on stderr that counts them; the file as it was stays beside the
    new one.

    Raises:
        InputError: the file cannot be written, for want of space say; likewise ``write`` and leaving the context.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool, name: str = "metrics.jsonl") -> None:
        self.path = folder / name
        rows, broken = _read(self.path)
        if broken:
            as_it_was = self.path.with_suffix(".damaged.jsonl")
            say(f"{self.path}: {broken} lines cannot be read and are left out; the file as it was is {as_it_was.name}")
            try:
                shutil.copyfile(self.path, as_it_was)
            except OSError as error:
                raise no_space(str(as_it_was), folder, error, self.path.stat().st_size) from error
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
        try:
            self._file = open(self.path, "a", buffering=1)  # noqa: SIM115  # open as long as the run
        except OSError as error:
            raise no_space(str(self.path), folder, error, 1) from error
        self._board = Board(folder / "tensorboard", step) if tensorboard else None

    def write(self, row: dict[str, Any]) -> None:
        line = json.dumps(row) + "\n"
        with self._named(len(line)):
            self._file.write(line)
        if self._board:
            self._board.write(row)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board:
            self._board.close()
        first = (
            contextlib.suppress(InputError) if error else contextlib.nullcontext()
        )  # the first error is the one to show
        with first, self._named(1):
            self._file.close()

    @contextlib.contextmanager
    def _named(self, needed: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise no_space(str(self.path), self.path.parent, error, needed) from error


class Meter:
    """Mean loss and speed of training since it was last read. Time between ``stop`` and ``start`` does not count."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._loss: Tensor | float = 0.0
        self._steps, self._tokens, self._seconds = 0, 0, 0.0

    def start(self) -> None:
        self._began = time.monotonic()

    def stop(self, loss: Tensor, tokens: int) -> None:
        self._loss = self._loss + loss  # on its device: adding up does not wait for it
        self._steps += 1
        self._tokens += tokens
        self._seconds += time.monotonic() - self._began

    def read(self) -> dict[str, float]:
        if torch.cuda.is_available():
            began = time.monotonic()
            torch.cuda.synchronize()
            self._seconds += time.monotonic() - began
        speed = self._tokens / max(self._seconds, 1e-9)
        row = {"loss": float(self._loss) / self._steps, "tokens_per_second": round(speed, 1)}
        self._clear()
        return row


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run. A last line cut short by a kill is left out, and so is what else cannot be read."""
    return _read(folder / "metrics.jsonl")[0]


def _read(path: Path) -> tuple[list[dict[str, float]], int]:
    """The rows of ``path``, and how many lines are broken: not counting a last one that a kill cut short."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; mend its permissions, or move it away") from error
    rows, broken = [], 0
    for line in lines:
        if not line.endswith(b"\n"):
            continue
        try:
            row = json.loads(line)
            row["step"] + 0
        except (ValueError, KeyError, TypeError, RecursionError):
            broken += 1
            continue
        rows.append(row)
    return rows, broken
