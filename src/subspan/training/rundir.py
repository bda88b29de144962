"""Where a run lives, and which checkpoint it continues."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from subspan.training.checkpoint import list_checkpoints, load_part
from subspan.training.config import PretrainConfig
from subspan.training.errors import InputError

_FREE = ("out", "resume", "device", "threads", "micro_batch_size", "gradient_checkpointing", "checkpoint", "evaluation",
         "log_every", "tensorboard", "parallel")  # fmt: skip
"""Settings that may differ between a run and its continuation: they do not change what is computed, but for rounding."""


def locate(config: PretrainConfig, settings: dict[str, Any]) -> tuple[Path, Path | None]:
    """The directory for a run and the checkpoint to continue, or ``None`` to start. Writes nothing.

    Args:
        settings: the resolved settings of this run, as a checkpoint stores them.

    Raises:
        InputError: the directory holds another run, or one that ``resume`` does not name; or it cannot be written.
    """
    if config.resume not in (None, "auto"):
        return _explicit(config, Path(config.resume), settings)
    if config.out is None:
        return _numbered(config, settings)
    out = Path(config.out)
    _check_writable(out)
    if not _holds_run(out):
        return out, None
    if config.resume is None:
        raise InputError(f"out={config.out!r}: holds a run already; continue it with --resume auto, or give another --out")
    newest = _newest(out)
    _check_same_run(newest or out, settings)
    return out, newest


def claim(out: Path, settings: dict[str, Any], numbered: bool) -> Path:
    """Make a new run's directory, with its ``config.yaml``, so that no other run takes it.

    Args:
        numbered: if the name is taken by now, take the next number; else it is an error.
    """
    text = yaml.safe_dump(settings | {"out": None, "resume": None}, sort_keys=False)
    for candidate in _candidates(out) if numbered else [out]:
        try:
            candidate.mkdir(parents=True, exist_ok=True)
            with open(candidate / "config.yaml", "x") as file:  # of several that try, one succeeds
                file.write(text)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"out={str(candidate)!r}: {error.strerror}; give a directory that can be written") from error
        return candidate
    raise InputError(f"out={str(out)!r}: holds a run already; continue it with --resume auto, or give another --out")


def _explicit(config: PretrainConfig, given: Path, settings: dict[str, Any]) -> tuple[Path, Path]:
    path = given.resolve()
    checkpoint = (_newest(path) or path) if (path / "checkpoints").is_dir() else path
    if not (checkpoint / "training.pt").exists():
        raise InputError(
            f"resume={config.resume!r}: no checkpoint there; expected 'auto', a run, or its checkpoints/step-NNNNNN"
        )
    _check_same_run(checkpoint, settings)
    own = checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else None
    if own and (config.out is None or Path(config.out).resolve() == own):
        return own, checkpoint
    if config.out is None:
        raise InputError(f"resume={config.resume!r}: lies in no run's checkpoints directory; say where to go on with --out")
    out = Path(config.out)
    _check_writable(out)
    if _holds_run(out):
        raise InputError(f"out={config.out!r}: holds another run; give an --out of its own to the run that goes on")
    return out, checkpoint


def _numbered(config: PretrainConfig, settings: dict[str, Any]) -> tuple[Path, Path | None]:
    name = re.sub(r"[^\w.-]+", "_", Path(config.model).name)
    base = Path("runs") / f"{name}-{config.optimizer}-seed{config.seed}"
    _check_writable(base)
    taken = []
    for out in _candidates(base):
        if not out.exists():
            break
        taken.append(out)
    if config.resume == "auto":
        for old in reversed(taken):
            newest = _newest(old)
            if _holds_run(old) and not _differences(newest or old, settings):
                return old, newest
    return out, None


def _candidates(out: Path) -> Iterator[Path]:
    yield out
    base = re.sub(r"(-seed\d+)-\d+$", r"\1", out.name)
    for number in range(2, 10_000):
        yield out.with_name(f"{base}-{number}")


def _check_same_run(place: Path, settings: dict[str, Any]) -> None:
    """Raise ``InputError`` unless the checkpoint or run directory ``place`` was made with these settings."""
    differences = _differences(place, settings)
    if differences:
        run = place.parent.parent if place.parent.name == "checkpoints" else place
        raise InputError(
            f"{place} is of another run: {'; '.join(differences)}; "
            f"repeat the settings of that run (--config {run}/config.yaml), or start anew with another --out"
        )


def _differences(place: Path, settings: dict[str, Any]) -> list[str]:
    if (place / "training.pt").exists():
        saved = load_part(place, "training")["settings"]
    else:
        try:
            saved = dict(yaml.safe_load((place / "config.yaml").read_text()))
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise InputError(f"{place / 'config.yaml'} cannot be read; start anew with another --out") from error
    keys = [key for key in {**saved, **settings} if key not in _FREE]
    return [f"{key} was {saved.get(key)}, is {settings.get(key)}" for key in keys if saved.get(key) != settings.get(key)]


def _newest(out: Path) -> Path | None:
    return next(iter(reversed(list_checkpoints(out / "checkpoints"))), None)


def _holds_run(out: Path) -> bool:
    return any((out / name).exists() for name in ("checkpoints", "metrics.jsonl", "config.yaml"))


def _check_writable(out: Path) -> None:
    existing = next(path for path in (out, *out.resolve().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"out={str(out)!r}: {existing} is no directory that can be written; give another --out")
