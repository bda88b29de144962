"""Checkpoints: a directory is complete or absent, and holds a Hugging Face model beside what the run needs to go on.

checkpoints/step-000100/  config.json, model.safetensors, tokenizer files      loads with from_pretrained
                          optimizer.pt, training.pt                            tensors and primitives only
"""

import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedTokenizerBase

from subspan.training.errors import InputError

_NAME = re.compile(r"step-(\d{6,})")


def save(
    folder: Path, step: int, keep: int, model: nn.Module, tokenizer: PreTrainedTokenizerBase, parts: dict[str, dict[str, Any]]
) -> Path:
    """Write the checkpoint of ``step``, then drop all but the ``keep`` newest. ``parts`` become files, one by name."""
    target, scratch = folder / f"step-{step:06d}", folder / "unfinished"
    if target.exists():  # saved before an interruption, and reached again: the same bits
        return target
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    model.save_pretrained(scratch)  # type: ignore[operator]  # transformers' method
    tokenizer.save_pretrained(scratch)
    for name, part in parts.items():
        torch.save(part, scratch / f"{name}.pt")
    for file in scratch.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    scratch.rename(target)  # atomic: a kill before leaves the last checkpoint, a kill after leaves this one
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_part(checkpoint: Path, name: str) -> dict[str, Any]:
    """One of the ``parts`` given to ``save``."""
    try:
        part: dict[str, Any] = torch.load(checkpoint / f"{name}.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(
            f"checkpoint {checkpoint}: {name}.pt cannot be read ({type(error).__name__}); choose another"
        ) from error
    return part


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Copy the checkpoint's weights into ``model``."""
    try:
        load_model(model, checkpoint / "model.safetensors")
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"checkpoint {checkpoint}: its weights do not fit the model: {str(error).splitlines()[0]}") from error
