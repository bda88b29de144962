"""Metrics of a run: ``metrics.jsonl`` always, TensorBoard if asked."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from subspan.training.files import write_text


class Metrics:
    """Appends rows to ``metrics.jsonl``; each has a ``step``.

    Args:
        folder: the run's directory.
        step: where the run starts. Rows beyond it, written before an interruption, are dropped: they will come again.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self.path = folder / "metrics.jsonl"
        rows = [row for row in read_metrics(folder) if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115  # open as long as the run
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(self, row: dict[str, float]) -> None:
        self._file.write(json.dumps(row) + "\n")
        if self._board:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, row["step"])

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if self._board:
            self._board.close()


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
    """The rows of a run. A last line cut short by a kill is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
