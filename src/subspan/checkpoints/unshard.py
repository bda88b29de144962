"""A sharded checkpoint as a plain Hugging Face model."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from subspan.checkpoints.directory import MODEL, holds_shards, name_of, tensor_bytes
from subspan.checkpoints.shard_files import Shards, piece_of
from subspan.utils.atomic_files import remove_directory, written

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def write_whole(checkpoint: Path, place: Path, model: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Put the shards of a model together, as a directory ``place`` that ``from_pretrained`` loads. For one process.

    The host holds the whole model meanwhile, once.

    Args:
        checkpoint: what ``sharded.py`` has saved.
        place: the directory to write, or to replace.
        model: the model that was saved, sharded or not; gives its configuration and the name of its class.
        tokenizer: saved beside the model.

    Raises:
        InputError: a file of the checkpoint is missing or damaged, or ``place`` cannot be written, for example for
            want of space.
    """
    shards = Shards(checkpoint)
    shards.check(kind="model")
    table = shards.tables["model"]
    tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in table.items()}
    shards.read("model", {name: piece_of(tensor) for name, tensor in tensors.items()})
    whole = {canonical: tensors[name] for canonical, name in shards.model_names.items()}
    with written("model", place, tensor_bytes(whole)) as scratch:
        save_file(whole, scratch / "model.safetensors", metadata={"format": "pt"})
        config: PretrainedConfig = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__.removeprefix("FSDP")]  # fully_shard makes a class of its own
        config.dtype = next(tensor.dtype for tensor in whole.values() if tensor.is_floating_point())
        config.save_pretrained(scratch)
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def plain_model(out: Path, step: int, model: nn.Module, tokenizer: "PreTrainedTokenizerBase") -> Path:
    """Return a directory that ``from_pretrained`` loads, with the model of a run at a step. For one process.

    A sharded checkpoint, whichever ranks saved it, is put together in ``OUT/model``. Any other is such a directory.

    Args:
        out: the run's directory.
        step: the step of one of its checkpoints.
        model: the run's model.
        tokenizer: the run's tokenizer.
    """
    checkpoint, place = out / "checkpoints" / name_of(step), out / MODEL
    if holds_shards(checkpoint):
        write_whole(checkpoint, place, model, tokenizer)
        return place
    if place.exists():  # left by the run when it ended before
        remove_directory(place)
    return checkpoint
