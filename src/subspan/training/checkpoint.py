"""Checkpoints: a directory is complete or absent, and holds a Hugging Face model beside what the run needs to go on.

checkpoints/step-000100/  config.json, model.safetensors, tokenizer files      loads with from_pretrained
                          optimizer.pt, training.pt                            tensors and primitives only
"""

import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedTokenizerBase

from subspan.training.errors import InputError, first_line
from subspan.training.files import remove_directory, replace_directory

_NAME = re.compile(r"step-(\d{6,})")
_OTHER = "remove it, or continue an older one with --resume PATH"


def save(
    folder: Path, step: int, keep: int, model: nn.Module, tokenizer: PreTrainedTokenizerBase, parts: dict[str, dict[str, Any]]
) -> None:
    """Write the checkpoint of ``step``, then drop all but the ``keep`` newest. ``parts`` become files, one by name."""
    scratch = folder / "unfinished"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    model.save_pretrained(scratch, max_shard_size="10TB")  # type: ignore[operator]  # transformers' method; one file
    tokenizer.save_pretrained(scratch)
    for name, part in parts.items():
        torch.save(part, scratch / f"{name}.pt")
    replace_directory(scratch, folder / f"step-{step:06d}")
    for old in list_checkpoints(folder)[:-keep]:
        remove_directory(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_part(checkpoint: Path, name: str) -> dict[str, Any]:
    """One of the ``parts`` given to ``save``."""
    try:
        part: dict[str, Any] = torch.load(checkpoint / f"{name}.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"checkpoint {checkpoint}: {name}.pt cannot be read ({type(error).__name__}); {_OTHER}") from error
    return part


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Copy the checkpoint's weights into ``model``."""
    try:
        load_model(model, checkpoint / "model.safetensors")
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(f"checkpoint {checkpoint}: model.safetensors cannot be used: {first_line(error)}; {_OTHER}") from error
