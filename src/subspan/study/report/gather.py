"""The parts of a report, read from its sources.

A source is a study file, a directory of studies or runs, or the results of ``subspan bench memory``.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from subspan.checkpoints.directory import list_checkpoints
from subspan.study.inspect import NothingToSeeError, inspect
from subspan.study.study_file import load_study
from subspan.study.table import Table, compare, curve_of, runs_of
from subspan.training.monitor.metrics import read_metrics
from subspan.utils.errors import InputError

Curve = list[tuple[float, float]]
KINDS = ("weight_bytes", "carrier_bytes", "gradient_bytes", "state_bytes", "basis_bytes", "saved_activation_bytes")
"""The kinds of bytes that ``subspan bench memory`` tells apart."""


@dataclass(frozen=True)
class StudyPart:
    """The table of a study, and its validation losses."""

    table: Table
    curves: dict[str, list[Curve]]
    """Validation loss over tokens: by row, one curve for each seed."""
    command: str
    versions: list[str]


@dataclass(frozen=True)
class RunPart:
    """A run: its settings, its losses over steps, and its subspaces if it was probed."""

    path: str
    config: dict[str, Any]
    loss: Curve
    validation: Curve
    found: dict[str, Any] | None
    command: str
    made_by: str


@dataclass(frozen=True)
class MemoryPart:
    """The rows of one ``subspan bench memory``."""

    rows: list[dict[str, Any]]
    command: str
    made_by: str


@dataclass
class Parts:
    """Everything that a report shows."""

    studies: list[StudyPart] = field(default_factory=list)
    runs: list[RunPart] = field(default_factory=list)
    memory: list[MemoryPart] = field(default_factory=list)


def gather(sources: Sequence[str]) -> Parts:
    """Read every source.

    Raises:
        InputError: a source is nothing that a report shows, or is broken; the message names it.
    """
    parts = Parts()
    for source in sources:
        path = Path(source)
        if not path.exists():
            raise InputError(
                f"source={source!r}: does not exist; give a study file, a directory of runs, or results of bench memory"
            )
        if path.suffix in (".yaml", ".yml"):
            parts.studies.append(_study(path))
        elif path.suffix == ".json":
            parts.memory.append(_memory(path))
        elif path.is_dir():
            runs = sorted(
                {config.parent for config in path.rglob("config.yaml") if (config.parent / "metrics.jsonl").exists()}
            )
            studies = [] if path in runs else sorted(path.glob("*.yaml"))
            if not runs and not studies:
                raise InputError(f"source={source!r}: holds no study file (.yaml) and no run of subspan pretrain")
            parts.studies += map(_study, studies)
            parts.runs += map(_run, runs)
        else:
            raise InputError(
                f"source={source!r}: expected a study file (.yaml), a directory of them or of runs, or bench "
                "results (.json)"
            )
    return parts


def _study(path: Path) -> StudyPart:
    study = load_study(path)
    runs = runs_of(study)
    # A run that diverged takes part in no mean of the table either.
    curves = {name: [*map(curve_of, own.finished.values())] for name, own in runs.items() if own.finished}
    versions = {_versions(record) for own in runs.values() for record in own.by_seed.values()}
    shown = f"{path.parent.name}/{path.name}"
    return StudyPart(
        compare(study, runs=runs), curves, f"subspan study run {shown}; subspan study table {shown}", sorted(versions)
    )


def _run(path: Path) -> RunPart:
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # nothing but a library's reading
        raise InputError(f"{path / 'config.yaml'}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path / 'config.yaml'}: holds no settings of a run; mend it, or leave the run out")
    rows = read_metrics(path)
    looked = (path / "probes.jsonl").exists() or len(list_checkpoints(path / "checkpoints")) > 1
    found = None
    if looked:
        with contextlib.suppress(NothingToSeeError):
            found = inspect(path)
    return RunPart(
        path.name if path.name != "run" else f"{path.parent.parent.name}, {path.parent.name}",
        config,
        [(row["step"], row["loss"]) for row in rows if "loss" in row],
        [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row],
        found,
        f"subspan {'finetune' if 'task' in config else 'pretrain'} --config {path}/config.yaml",
        _made_by(path / "summary.json"),
    )


def _made_by(summary: Path) -> str:
    """Return the versions that a finished run was computed with."""
    if not summary.exists():
        return "not finished"
    found = _json(summary)
    return _versions(found.get("made_by") if isinstance(found, dict) else None)


def _json(path: Path) -> Any:
    """Return what a file of JSON says, or ``None`` for one that cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _versions(made: Any) -> str:
    """Return ``subspan 0.1.0 (3f2a...), torch 2.13.0, ...``, as far as it is known: older records say less."""
    if not isinstance(made, dict):
        return ""
    forms = {"subspan": "subspan {}", "commit": "({})", "torch": "torch {}", "python": "Python {}", "machine": "{}"}
    words = ", ".join(form.format(made[key]) for key, form in forms.items() if made.get(key))
    return words.replace(", (", " (")


def _memory(path: Path) -> MemoryPart:
    found = _json(path)
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(map(_is_memory, rows)):
        raise InputError(f"{path}: holds no results of subspan bench memory; write them with its --json")
    return MemoryPart(
        [{"name": row["name"], **{kind: int(row[kind]) for kind in KINDS}} for row in rows],
        str(found.get("command", "the command is not recorded")),
        _versions(found.get("made_by", found)),
    )


def _is_memory(row: Any) -> bool:
    return isinstance(row, dict) and "name" in row and all(isinstance(row.get(kind), int | float) for kind in KINDS)
