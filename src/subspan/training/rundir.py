"""Where a run lives, and which checkpoint it continues. Nothing here writes."""

import re
from pathlib import Path
from typing import Any

from subspan.training.checkpoint import list_checkpoints, load_part
from subspan.training.config import PretrainConfig
from subspan.training.errors import InputError

_FREE = ("out", "resume", "device", "threads", "micro_batch_size", "gradient_checkpointing", "checkpoint", "evaluation",
         "log_every", "tensorboard")  # fmt: skip
"""Settings that may differ between a run and its continuation: they do not change what is computed."""


def locate(config: PretrainConfig, settings: dict[str, Any]) -> tuple[Path, Path | None]:
    """The run's directory, and the checkpoint to continue or ``None``.

    Args:
        settings: the resolved settings of this run, as a checkpoint stores them.

    Raises:
        InputError: the directory holds a run and ``resume`` is not given, or the checkpoint is of another run.
    """
    if config.resume not in (None, "auto"):
        checkpoint = Path(config.resume)
        if not (checkpoint / "training.pt").exists():
            raise InputError(f"resume={config.resume!r}: no checkpoint there; expected 'auto' or a step-NNNNNN directory")
        check_same_run(checkpoint, settings)
        return Path(config.out) if config.out else checkpoint.parent.parent, checkpoint
    if config.out:
        out = Path(config.out)
        if out.exists() and not out.is_dir():
            raise InputError(f"out={config.out!r}: is a file; expected a directory")
        if config.resume is None:
            if _holds_run(out):
                raise InputError(
                    f"out={config.out!r}: holds a run already; continue it with --resume auto, or give another --out"
                )
            return out, None
        newest = _newest(out)
        if newest:
            check_same_run(newest, settings)
        return out, newest
    return _default_directory(config, settings)


def _default_directory(config: PretrainConfig, settings: dict[str, Any]) -> tuple[Path, Path | None]:
    name = re.sub(r"[^\w.-]+", "_", config.model).strip("_")
    base = Path("runs") / f"{name}-{config.optimizer}-seed{config.seed}"
    number, taken = 1, []
    while (out := base if number == 1 else base.with_name(f"{base.name}-{number}")).exists():
        taken.append(out)
        number += 1
    if config.resume == "auto":
        for old in reversed(taken):
            newest = _newest(old)
            if newest and not _differences(newest, settings):
                return old, newest
    return out, None


def check_same_run(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Raise ``InputError`` unless ``checkpoint`` was made with these settings."""
    differences = _differences(checkpoint, settings)
    if differences:
        raise InputError(
            f"checkpoint {checkpoint} is of another run: {'; '.join(differences)}; "
            "repeat the settings of that run (its config.yaml), or start anew with another --out"
        )


def _differences(checkpoint: Path, settings: dict[str, Any]) -> list[str]:
    saved = load_part(checkpoint, "training")["settings"]
    keys = [key for key in {**saved, **settings} if key not in _FREE]
    return [f"{key} was {saved.get(key)}, is {settings.get(key)}" for key in keys if saved.get(key) != settings.get(key)]


def _newest(out: Path) -> Path | None:
    return next(iter(reversed(list_checkpoints(out / "checkpoints"))), None)


def _holds_run(out: Path) -> bool:
    return any((out / name).exists() for name in ("checkpoints", "metrics.jsonl", "config.yaml"))
