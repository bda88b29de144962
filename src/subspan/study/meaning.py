"""The meaning of a run: everything that decides what it computes, from which the key of its record is made.

    settings    every setting that changes what is computed, with the value that it takes if nobody gives it
    method      the parts of the optimizer's recipe, with their settings
    contents    hashes of the data, the tokenizer and the model, or the shape that a preset stands for

So a changed default, recipe, preset, corpus or ``config.json`` gives another key, and an old record is not taken for a
new run. A setting is left out while its default does nothing (``None``, ``False`` or empty) and it has that default. So
a setting that a later version adds in this way leaves the keys as they are.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from subspan.checkpoints.checksums import digest_of
from subspan.recipes import find
from subspan.training.config.kinds import resolve_run
from subspan.training.config.settings import FinetuneConfig, PretrainConfig, names_without_effect
from subspan.training.data.embedded import BPE, CORPUS
from subspan.training.data.files import Hub, files_of, find_files
from subspan.training.data.streams import STREAMS
from subspan.training.models.presets import PRESETS
from subspan.utils.errors import InputError

_NOT_COMPUTED = names_without_effect()
_CONTENTS = ("model", "data", "validation_data", "test_data", "tokenizer", "chat_template")
"""Settings that name a content."""
_AS_GIVEN = (*_CONTENTS, "precision")
"""Settings whose resolved value depends on the machine."""
_WEIGHTS = (".json", ".safetensors", ".bin", ".txt", ".model")
"""Kinds of the files of a model directory that are its content."""


def meaning_of(config: PretrainConfig | FinetuneConfig, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Return the meaning of a run in primitives, as JSON has them.

    Args:
        config: the settings of the run.
        hashes: hashes of the contents that the study file commits to, by the name that the settings give them. They
            stand for files that need not be there.

    Raises:
        InputError: a file is neither there nor among ``hashes``.
    """
    resolved = resolve_run(config)
    settings = asdict(resolved) | {name: getattr(config, name, None) for name in _AS_GIVEN}
    if "tokens" in settings["evaluation"]:  # in fine-tuning ``every`` decides which checkpoint is the best
        settings["evaluation"] = {"tokens": settings["evaluation"]["tokens"]}
    if (pattern := settings["rank_pattern"]) is not None:
        settings["rank_pattern"] = list(pattern.items())  # its order counts, and a key is made of sorted names
    if settings["optim"]["lr_full"] is None:
        settings["optim"]["lr_full"] = resolved.lr
    recipe = find(config.optimizer)
    method = {name: _part(getattr(recipe, name)) for name in ("selector", "rule", "residual", "transfer")}
    named = {name: getattr(config, name, None) for name in _CONTENTS} | {"tokenizer": resolved.tokenizer}
    contents = {name: content_of(name, value, hashes) for name, value in named.items() if value is not None}
    kept = {name: value for name, value in settings.items() if name not in _NOT_COMPUTED}
    return {"settings": _with_effect(kept, asdict(type(config)())), "method": method, "contents": contents}


def key_of(meaning: Mapping[str, Any]) -> str:
    """Return the key of a record, which is a short hash of the meaning."""
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:16]


def _with_effect(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``settings`` without those that have a default which does nothing; sections are treated likewise."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict):
            value = _with_effect(value, default)
            default = {}
        if value or value != default:
            found[name] = value
    return found


def _part(part: object) -> Any:
    """Return a part of a method in primitives: its class, its settings, and the parts within."""
    if not is_dataclass(part):
        return part
    return {"is": type(part).__name__} | {f.name: _part(getattr(part, f.name)) for f in fields(part)}


def content_of(name: str, value: str, hashes: Mapping[str, str]) -> Any:
    """Return what a setting that names a content stands for.

    It is a committed hash if there is one, else a hash of the files, the fields of a preset, or a name that only the
    hub or the package can resolve.
    """
    if value in hashes:
        return hashes[value]
    if value == "embedded":
        return _hash_of_file(*_state(BPE if name == "tokenizer" else CORPUS))
    if name == "model" and value in PRESETS:
        return asdict(PRESETS[value])
    path = Path(value).expanduser()
    if path.is_dir() and name in ("model", "tokenizer"):
        files = sorted(file for file in path.iterdir() if file.suffix in _WEIGHTS)
        return hash_of([(file.name, file) for file in files])
    if path.is_file():
        return hash_of([("", path)])
    if name.endswith("data") and value.partition(":")[0] not in STREAMS:
        try:
            sources = find_files(value, name)
            if any(isinstance(source, Hub) for source in sources):
                return value
            return hash_of([(file.name, file) for source in sources for file in files_of(source)])
        except InputError as error:
            raise InputError(
                f"{error}; or commit its hash in the study file (hashes: {{{value}: ...}}), which stands for it in a "
                "table"
            ) from error
    return value


def check_hashes(config: PretrainConfig | FinetuneConfig, hashes: Mapping[str, str]) -> None:
    """Raise unless the contents that a run would read are those that the study file commits to.

    Raises:
        InputError: the hash of a content is another one.
    """
    for name in _CONTENTS:
        value: str | None = getattr(config, name, None)
        if value is not None and value in hashes and (found := content_of(name, value, {})) != hashes[value]:
            raise InputError(
                f"hashes: {name}={value!r} has the hash {found}, and the study file commits to {hashes[value]}; put the "
                "content back, or write the new hash, which makes new runs of all that read it"
            )


def hash_of(files: list[tuple[str, Path]]) -> str:
    """Return the hash of one file, as ``b2sum -l 128`` prints it, or one of the names and hashes of several."""
    hashes = [(name, _hash_of_file(*_state(path))) for name, path in files]
    return (
        hashes[0][1] if len(hashes) == 1 else hashlib.blake2b(json.dumps(hashes).encode(), digest_size=16).hexdigest()
    )


def _state(path: Path) -> tuple[Path, int, int]:
    stat = path.stat()
    return path, stat.st_size, stat.st_mtime_ns


@functools.cache
def _hash_of_file(path: Path, size: int, changed: int) -> str:
    return digest_of(path)
