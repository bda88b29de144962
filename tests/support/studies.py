"""A small study file, and records as a run would leave them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from subspan.study.records import Record
from subspan.study.study_file import Cell, Row, Study, load_study

SMALL = {
    "base": {
        "model": "llama-nano",
        "steps": 4,
        "batch_size": 2,
        "sequence_length": 16,
        "device": "cpu",
        "evaluation": {"every": 2, "tokens": 64},
    },
    "seeds": [0, 1],
    "rows": {"full": {"optimizer": "adamw"}, "galore": {"optimizer": "galore_adamw", "rank": 4}},
}


def write(folder: Path, **changes: Any) -> Path:
    """``studies/small.yaml`` in ``folder``: ``SMALL`` with ``changes``."""
    path = folder / "studies" / "small.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(SMALL | changes, sort_keys=False))
    return path


def make(folder: Path, **changes: Any) -> Study:
    return load_study(write(folder, **changes))


def cell_of(row: Row, lr: float, seed: int) -> Cell:
    """The run of a row at a learning rate and a seed."""
    return row.cell(replace(row.config, lr=lr), seed)


def record(cell: Cell, loss: float | None) -> Record:
    """The record of a run with this loss; with ``None`` it diverged."""
    return {
        "key": cell.key,
        "status": "finished" if loss is not None else "diverged",
        "row": cell.row,
        "seed": cell.config.seed,
        "lr": cell.config.lr,
        "val_loss": loss,
        "val_ppl": loss,
        "steps": 4,
        "tokens": 128,
        "state_bytes": 1000,
        "seconds": 1.0,
    }
