"""Checkpoints: a directory is complete or absent, and holds a Hugging Face model beside what the run needs to go on.

checkpoints/step-000100/  config.json, model.safetensors, tokenizer files      loads with from_pretrained
                          optimizer.pt, training.pt                            tensors and primitives only
                          checksums.json                                       a hash of each file, see integrity.py
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedTokenizerBase

from subspan.checkpoints.checksums import seal
from subspan.utils.atomic_files import no_space, remove_directory, replace_directory, written
from subspan.utils.errors import InputError, first_line

_NAME = re.compile(r"step-(\d{6,})")
MODEL = "model"
"""Within a run's directory: its model as ``from_pretrained`` loads it, where its checkpoints hold parts, or
adapters.
"""
_OTHER = "remove it, or continue an older one with --resume PATH"


def save(
    folder: Path,
    step: int,
    keep: int,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    parts: dict[str, dict[str, Any]],
    best: int | None = None,
) -> None:
    """Write the checkpoint of ``step``, then drop all but the ``keep`` newest and that of the step ``best``.

    ``parts`` become files, one by name.

    Raises:
        InputError: it cannot be written, for want of space say. The checkpoints before it stand.
    """
    scratch, place = folder / "unfinished", folder / name_of(step)
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        model.save_pretrained(scratch, max_shard_size="10TB")  # type: ignore[operator]  # transformers' method; one file
        tokenizer.save_pretrained(scratch)
        for name, part in parts.items():
            torch.save(part, scratch / f"{name}.pt")
        seal(scratch)
        replace_directory(scratch, place)
    except Exception as error:  # of a full disk, torch, safetensors and tokenizers raise errors of three kinds
        shutil.rmtree(scratch, ignore_errors=True)
        before = [_size(path) for path in list_checkpoints(folder)[-1:]]
        tensors = sum(t.numel() * t.element_size() for t in _tensors([model.state_dict(), parts]))
        raise no_space(f"checkpoint {place}", folder, error, max([tensors, *before])) from error
    drop_old(folder, step, keep, best)


def drop_old(folder: Path, step: int, keep: int, best: int | None) -> None:
    """Remove all checkpoints up to that of ``step`` but the ``keep`` newest and that of the step ``best``.

    Later ones are of a run that was continued further back, perhaps because they are damaged: they do not count.
    """
    for old in [path for path in list_checkpoints(folder) if step_of(path) <= step][:-keep]:
        if step_of(old) != best:
            remove_directory(old)


def adopt(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint of another run into ``folder``, unless it is there.

    Raises:
        InputError: it cannot be written, for want of space say.
    """
    place = folder / checkpoint.name
    if not place.exists():
        with written("checkpoint", place, _size(checkpoint)) as scratch:
            shutil.copytree(checkpoint, scratch, dirs_exist_ok=True)


def holds_parts(checkpoint: Path) -> bool:
    """Whether ranks have saved their parts there (``sharded.py``)."""
    return not (checkpoint / "optimizer.pt").exists()


def plain_model(out: Path, step: int, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A directory that ``from_pretrained`` loads, of the checkpoint of ``step`` of the run in ``out``.

    One that holds parts, saved by the ranks that ask or by others before, is put together in ``OUT/model``.
    """
    checkpoint, place = out / "checkpoints" / name_of(step), out / MODEL
    if holds_parts(checkpoint):
        from subspan.checkpoints.unshard import write_whole  # what reads parts takes seconds to import

        write_whole(checkpoint, place, model, tokenizer)
        return place
    if place.exists():  # of the run as it was when it ended before
        remove_directory(place)
    return checkpoint


def _size(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.iterdir())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def name_of(step: int) -> str:
    """The name of the checkpoint of ``step``."""
    return f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step that the name of a checkpoint says."""
    return int(checkpoint.name.removeprefix("step-"))


def load_part(checkpoint: Path, name: str) -> dict[str, Any]:
    """One of the ``parts`` given to ``save``."""
    try:
        part = torch.load(checkpoint / f"{name}.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file, torch's reader raises errors of a dozen kinds
        raise InputError(
            f"checkpoint {checkpoint}: {name}.pt cannot be read ({type(error).__name__}); {_OTHER}"
        ) from error
    if not isinstance(part, dict):
        raise InputError(f"checkpoint {checkpoint}: {name}.pt holds a {type(part).__name__}, expected a dict; {_OTHER}")
    return part


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Copy the checkpoint's weights into ``model``."""
    try:
        load_model(model, checkpoint / "model.safetensors")
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(
            f"checkpoint {checkpoint}: model.safetensors cannot be used: {first_line(error)}; {_OTHER}"
        ) from error
