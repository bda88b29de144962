"""The directory of a checkpoint: what is in it, what it is called, and how it is read.

checkpoints/step-000100/  config.json, model.safetensors, tokenizer files      loads with from_pretrained
                          optimizer.pt, training.pt                            tensors and primitives only
                          checksums.json                                       a hash of each file, see checksums.py

A sharded checkpoint has the files of shard_files.py in place of model.safetensors and optimizer.pt. A directory is
complete or absent, see writer.py.
"""

import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from subspan.utils.atomic_files import written
from subspan.utils.errors import InputError, first_line
from subspan.utils.names import canonical_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INDEX = "index.json"
"""The file that makes a checkpoint of shards."""
MODEL = "model"
"""Name, within a run's directory, of its model as ``from_pretrained`` loads it, for runs whose checkpoints hold shards
or adapters.
"""
_NAME = re.compile(r"step-(\d{6,})")
_DAMAGED = (
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AssertionError,
    EOFError,
    pickle.UnpicklingError,
)
"""The errors that torch's reader raises on a damaged file, depending on which of its bytes have changed."""
_OTHER = "remove it, or continue an older one with --resume PATH"


def save_model(folder: Path, model: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Write the files that ``from_pretrained`` loads into ``folder``."""
    model.save_pretrained(folder, max_shard_size="10TB")  # type: ignore[operator]  # transformers' method; one file
    tokenizer.save_pretrained(folder)


def save_config(folder: Path, model: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Write the files of ``save_model`` into ``folder``, except for the weights."""
    model.config.save_pretrained(folder)  # type: ignore[union-attr, operator]  # transformers' method
    tokenizer.save_pretrained(folder)


def save_part(folder: Path, name: str, part: dict[str, Any]) -> None:
    """Write a dict of tensors and primitives into ``folder``, for ``load_part``."""
    torch.save(part, folder / f"{name}.pt")


def adopt(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint of another run into ``folder``, unless it is there. For one process.

    Raises:
        InputError: it cannot be written, for example for want of space.
    """
    place = folder / checkpoint.name
    if not place.exists():
        with written("checkpoint", place, disk_bytes(checkpoint)) as scratch:
            shutil.copytree(checkpoint, scratch, dirs_exist_ok=True)


def holds_shards(checkpoint: Path) -> bool:
    """Whether the checkpoint is one that ``sharded.py`` has saved."""
    return not (checkpoint / "optimizer.pt").exists()


def disk_bytes(checkpoint: Path) -> int:
    """Return the bytes of the files of a checkpoint."""
    return sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())


def tensor_bytes(value: Any) -> int:
    """Return the bytes of all tensors in nested dicts and lists; a sharded tensor counts as a whole."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def name_of(step: int) -> str:
    """Return the name of the checkpoint of ``step``."""
    return f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """Return the step that the name of a checkpoint says."""
    return int(checkpoint.name.removeprefix("step-"))


def load_part(checkpoint: Path, name: str) -> dict[str, Any]:
    """Read what ``save_part`` has written.

    Raises:
        InputError: it cannot be read.
    """
    path = checkpoint / f"{name}.pt"
    try:
        part = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(
            f"checkpoint {checkpoint}: {name}.pt cannot be read ({error.strerror or error}); let it be read, or "
            "continue an older one with --resume PATH"
        ) from error
    except _DAMAGED as error:
        if "can't allocate memory" in str(error):  # a RuntimeError, and the file may be sound
            raise
        raise InputError(
            f"checkpoint {checkpoint}: {name}.pt cannot be read ({type(error).__name__}); {_OTHER}"
        ) from error
    if not isinstance(part, dict):
        raise InputError(f"checkpoint {checkpoint}: {name}.pt holds a {type(part).__name__}, expected a dict; {_OTHER}")
    return part


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Copy the checkpoint's weights into ``model``; what wraps the model, or a layer of it, does not matter.

    Raises:
        InputError: the file cannot be read, or is of another model.
    """
    tensors = model_tensors(model)
    names = {canonical: name for name, canonical in canonical_names(n for _, all_of in tensors for n in all_of).items()}

    def unusable(reason: str) -> InputError:
        return InputError(f"checkpoint {checkpoint}: model.safetensors cannot be used: {reason}; {_OTHER}")

    try:
        saved = load_file(checkpoint / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise unusable(first_line(error)) from error
    found = {names.get(canonical, name): saved[name] for name, canonical in canonical_names(saved).items()}
    lacking = [all_of[0] for _, all_of in tensors if not any(name in found for name in all_of)]
    if lacking:
        raise unusable(f"it lacks {lacking[0]!r}, which this model has")
    if strange := sorted(found.keys() - names.values()):
        raise unusable(f"it has {strange[0]!r}, which this model does not have")
    for own, all_of in tensors:
        for name in all_of:
            if name in found and found[name].shape != own.shape:
                raise unusable(f"it has {name!r} as {tuple(found[name].shape)}, this model as {tuple(own.shape)}")
    model.load_state_dict(found, strict=False)


def model_tensors(model: nn.Module) -> list[tuple[torch.Tensor, list[str]]]:
    """Return the tensors of a model's ``state_dict`` with their names in it; tied weights have several."""
    names: dict[int, tuple[torch.Tensor, list[str]]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():  # the variables themselves, so that ties show
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"model: {name!r} in its state_dict is a {type(tensor).__name__}; expected tensors only")
        names.setdefault(id(tensor), (tensor, []))[1].append(name)
    return list(names.values())
