"""Metrics of a run: ``metrics.jsonl``, other files of rows like it, and TensorBoard's where a run asks for them."""

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

from subspan.training.monitor.tensorboard import TensorBoard
from subspan.utils.atomic_files import no_space, write_text
from subspan.utils.errors import InputError
from subspan.utils.messages import say


class Metrics:
    """Appends rows to ``metrics.jsonl``; each has a ``step``.

    Rows that cannot be read are left out, and a line on stderr counts them. A copy of the old file stays beside it.

    Args:
        folder: the directory of the run.
        step: the step at which the run starts. Later rows, written before an interruption, are dropped: they will come
            again.
        tensorboard: whether to write TensorBoard files too.
        name: the name of the file.

    Raises:
        InputError: the file cannot be written, for example for want of space. ``write`` and leaving the context raise
            it too.
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
            self._file = open(self.path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  # open as long as the run
        except OSError as error:
            raise no_space(str(self.path), folder, error, 1) from error
        self._board = TensorBoard(folder / "tensorboard", step) if tensorboard else None

    def write(self, row: dict[str, Any]) -> None:
        """Append ``row``."""
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
        # Only the first error is shown.
        with contextlib.suppress(InputError) if error else contextlib.nullcontext(), self._named(1):
            self._file.close()

    @contextlib.contextmanager
    def _named(self, needed: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise no_space(str(self.path), self.path.parent, error, needed) from error


class Meter:
    """Mean loss and speed of training since the last ``read``. Time between ``stop`` and ``start`` does not count.

    Args:
        device: the device of the run, on which a step may still be under way when the host has gone on.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._clear()

    def _clear(self) -> None:
        self._loss: Tensor | float = 0.0
        self._steps, self._tokens, self._seconds = 0, 0, 0.0

    def start(self) -> None:
        """Begin a step."""
        self._began = time.monotonic()

    def stop(self, loss: Tensor, tokens: int) -> None:
        """End a step: ``loss`` is its loss, ``tokens`` the number of its tokens."""
        self._loss = self._loss + loss  # added up on the device, without waiting for it
        self._steps += 1
        self._tokens += tokens
        self._seconds += time.monotonic() - self._began

    def read(self) -> dict[str, float]:
        """The row since the last one, and begin the next."""
        if self._device == "cuda":  # asking CUDA for anything would make a context, also in a run on the CPU
            began = time.monotonic()
            torch.cuda.synchronize()
            self._seconds += time.monotonic() - began
        speed = self._tokens / max(self._seconds, 1e-9)
        row = {"loss": float(self._loss) / self._steps, "tokens_per_second": round(speed, 1)}
        self._clear()
        return row


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run, except the lines that cannot be read, such as a last one that a kill has cut short."""
    return _read(folder / "metrics.jsonl")[0]


def _read(path: Path) -> tuple[list[dict[str, float]], int]:
    """The rows of ``path``, and how many lines are broken. A last line that a kill has cut short does not count."""
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
