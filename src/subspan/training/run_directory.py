"""The directory of a run, and the checkpoint that it continues."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None  # type: ignore[assignment]  # a module's name; `hold` then holds nothing

from subspan.checkpoints.checksums import RECORD, damage, is_sealed
from subspan.checkpoints.directory import list_checkpoints, load_part
from subspan.training.config.settings import FinetuneConfig, PretrainConfig, names_without_effect, without_defaults
from subspan.utils.errors import InputError, first_line
from subspan.utils.messages import say

_FREE = names_without_effect(with_measurements=True)
"""Settings that may differ between a run and its continuation."""


RunSettings = PretrainConfig | FinetuneConfig


def locate(config: RunSettings, settings: dict[str, Any]) -> tuple[Path, Path | None]:
    """The directory for a run and the checkpoint to continue, or ``None`` to start. Writes nothing.

    A run is continued from its newest checkpoint whose files are as they were written. A line on stderr says which
    checkpoints were passed over, and why. A damaged checkpoint that is itself named is refused.

    Args:
        settings: the resolved settings of this run, as a checkpoint stores them.

    Raises:
        InputError: the directory holds another run, or one that ``resume`` does not name; or it cannot be read or
            written; or no checkpoint of the run is sound.
    """
    for name, value in (("out", config.out), ("resume", config.resume)):
        if value and "\0" in value:
            raise InputError(f"{name}={value!r}: expected a path without null characters; give another --{name}")
    try:
        return _locate(config, settings)
    except OSError as error:
        if error.errno is None:  # not from the system
            raise
        raise InputError(
            f"out={config.out!r}, resume={config.resume!r}: cannot be read: {first_line(error)}; "
            "mend its permissions, or give another path"
        ) from error


def _locate(config: RunSettings, settings: dict[str, Any]) -> tuple[Path, Path | None]:
    if config.resume not in (None, "auto"):
        return _explicit(config, Path(config.resume), settings)
    if config.out is None:
        return _numbered(config, settings)
    out = Path(config.out)
    _check_writable(out)
    if not _holds_run(out):
        return out, None
    if config.resume is None:
        raise InputError(
            f"out={config.out!r}: holds a run already; continue it with --resume auto, or give another --out"
        )
    return out, _newest_sound(out, settings)


def claim(out: Path, settings: dict[str, Any], numbered: bool) -> Path:
    """Make the directory of a new run, with its ``config.yaml``, so that no other run takes it.

    Args:
        numbered: whether to take the next number if another run has taken the name meanwhile.

    Raises:
        InputError: the directory cannot be written, or another run has taken the name.
    """
    text = yaml.safe_dump(settings | {"out": None, "resume": None}, sort_keys=False)
    for candidate in _candidates(out) if numbered else [out]:
        try:
            candidate.mkdir(parents=True, exist_ok=True)
            with open(
                candidate / "config.yaml", "x", encoding="utf-8"
            ) as file:  # only one of several processes succeeds
                file.write(text)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(
                f"out={str(candidate)!r}: {error.strerror}; give a directory that can be written"
            ) from error
        return candidate
    raise InputError(f"out={str(out)!r}: holds a run already; continue it with --resume auto, or give another --out")


@contextlib.contextmanager
def hold(out: Path) -> Iterator[None]:
    """Keep other processes from training in the run ``out``, where they would remove each other's files.

    The lock ends with the context, or with the process.

    Raises:
        InputError: another process trains there.
    """
    if fcntl is None:
        yield
        return
    try:
        file = open(out / ".lock", "a", encoding="utf-8")  # noqa: SIM115  # closed below
    except OSError as error:
        raise InputError(f"out={str(out)!r}: {error.strerror}; give a directory that can be written") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"out={str(out)!r}: another process trains there; wait for it or stop it, or give another --out"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield


def _explicit(config: RunSettings, given: Path, settings: dict[str, Any]) -> tuple[Path, Path]:
    path = given.resolve()
    newest = _newest_sound(path, settings) if list_checkpoints(path / "checkpoints") else None
    checkpoint = newest or path
    if not any((checkpoint / name).exists() for name in ("training.pt", RECORD)):
        raise InputError(
            f"resume={config.resume!r}: no checkpoint there; expected 'auto', a run, or its checkpoints/step-NNNNNN"
        )
    if not newest:
        _check_sound(checkpoint, settings)
    own = checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else None
    if own and (config.out is None or Path(config.out).resolve() == own):
        return own, checkpoint
    if config.out is None:
        raise InputError(
            f"resume={config.resume!r}: lies in no run's checkpoints directory; say where to go on with --out"
        )
    out = Path(config.out)
    _check_writable(out)
    if _holds_run(out):
        raise InputError(f"out={config.out!r}: holds another run; give an --out of its own to the run that goes on")
    return out, checkpoint


def _numbered(config: RunSettings, settings: dict[str, Any]) -> tuple[Path, Path | None]:
    base = Path("runs") / re.sub(r"[^\w.-]+", "_", config.run_name())
    _check_writable(base)
    taken = []
    for out in _candidates(base):
        if not out.exists():
            break
        taken.append(out)
    if config.resume == "auto":
        for old in reversed(taken):
            known = old if (old / "config.yaml").exists() else next(iter(list_checkpoints(old / "checkpoints")), old)
            if _holds_run(old) and not _differences(known, settings):
                return old, _newest_sound(old, settings)
    return out, None


def _candidates(out: Path) -> Iterator[Path]:
    yield out
    base = re.sub(r"(-seed\d+)-\d+$", r"\1", out.name)
    for number in range(2, 10_000):
        yield out.with_name(f"{base}-{number}")


def _check_same_run(saved: Path, settings: dict[str, Any]) -> None:
    """Raise ``InputError`` unless the checkpoint or run directory ``saved`` was made with these settings."""
    differences = _differences(saved, settings)
    if differences:
        run = saved.parent.parent if saved.parent.name == "checkpoints" else saved
        raise InputError(
            f"{saved} is of another run: {'; '.join(differences)}; "
            f"repeat the settings of that run (--config {run}/config.yaml), or start a new run with another --out"
        )


def _differences(folder: Path, settings: dict[str, Any]) -> list[str]:
    """What of ``settings`` differs from those saved in ``folder``, a checkpoint or the directory of a run."""
    saved = load_part(folder, "training").get("settings") if (folder / "training.pt").exists() else _config_of(folder)
    if not isinstance(saved, dict):
        raise InputError(f"{folder} says nothing of its settings; start a new run with another --out")
    before, now = without_defaults(saved), without_defaults(settings)
    keys = [key for key in {**saved, **settings} if key not in _FREE and before.get(key) != now.get(key)]
    return [f"{key} was {saved.get(key)}, is {settings.get(key)}" for key in keys]


def _config_of(run: Path) -> Any:
    try:
        return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"{run / 'config.yaml'} cannot be read: {first_line(error)}; mend it, or start a new run with another --out"
        ) from error


def _newest_sound(out: Path, settings: dict[str, Any]) -> Path | None:
    """The newest checkpoint of the run ``out`` that can be used, or ``None`` if the run has saved none.

    Raises:
        InputError: the run has other settings, or none of its checkpoints is sound.
    """
    passed: list[str] = []
    for checkpoint in reversed(list_checkpoints(out / "checkpoints")):
        reason = _reason(checkpoint)
        if reason is None:
            _check_same_run(checkpoint, settings)
            if passed:
                say(f"damaged and passed over, left as they are: {'; '.join(passed)}. {checkpoint.name} is sound")
            return checkpoint
        passed.append(f"{checkpoint} ({reason})")
    if not passed or (out / "config.yaml").exists():
        _check_same_run(out, settings)
    if passed:
        raise InputError(
            f"run {out}: no checkpoint of it is sound: {'; '.join(passed)}; nothing was changed; "
            "put back a copy of one, or start a new run with another --out"
        )
    return None


def _check_sound(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Raise ``InputError`` unless ``checkpoint`` has these settings and its files are as they were written."""
    reason = _reason(checkpoint)
    run = checkpoint.parent.parent
    if reason is None or (run / "config.yaml").exists():
        _check_same_run(checkpoint if reason is None else run, settings)
    if reason:
        raise InputError(
            f"checkpoint {checkpoint}: {reason}; it is left as it is; continue the newest sound one of the run with "
            "--resume auto, or give the path of another"
        )


def _reason(checkpoint: Path) -> str | None:
    """Why ``checkpoint`` cannot be used, or ``None`` if it can."""
    if is_sealed(checkpoint):
        return damage(checkpoint) or _damage_of_shards(checkpoint)
    # A version without checksums wrote it. What can be checked is whether its files can be read at all.
    missing = [
        name for name in ("training.pt", "optimizer.pt", "model.safetensors") if not (checkpoint / name).exists()
    ]
    if missing:
        return f"{missing[0]} is missing"
    try:
        for name in ("training", "optimizer"):
            load_part(checkpoint, name)
    except InputError as error:
        return str(error).partition(": ")[2]
    say(f"checkpoint {checkpoint}: {RECORD} is missing, so damage to it would not be seen; the next one saved has it")
    return None


def _damage_of_shards(checkpoint: Path) -> str | None:
    if not (checkpoint / "index.json").exists():
        return None
    from subspan.checkpoints import sharded

    return sharded.damage(checkpoint)


def _holds_run(out: Path) -> bool:
    return any((out / name).exists() for name in ("checkpoints", "metrics.jsonl", "config.yaml"))


def _check_writable(out: Path) -> None:
    existing = next(path for path in (out, *out.resolve().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"out={str(out)!r}: {existing} is no directory that can be written; give another --out")
