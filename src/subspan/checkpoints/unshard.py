"""A sharded checkpoint as a plain Hugging Face model."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from subspan.checkpoints.shard_files import Shards, piece_of
from subspan.utils.atomic_files import written


def write_whole(checkpoint: Path, place: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put what ranks have saved together, as a directory ``place`` that ``from_pretrained`` loads. For one process.

    The host holds the whole model meanwhile, once.

    Args:
        model: whose it is, sharded or not; gives its configuration and the name of its class.

    Raises:
        InputError: a file of the checkpoint is missing or damaged, or ``place`` cannot be written, for want of space
            say.
    """
    shards = Shards(checkpoint)
    shards.check(kind="model")
    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in shards.tables["model"].items()
    }
    shards.read("model", {name: piece_of(tensor) for name, tensor in tensors.items()})
    with written("model", place, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())) as scratch:
        save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
        config: PretrainedConfig = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__.removeprefix("FSDP")]  # fully_shard makes a class of its own
        config.dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
        config.save_pretrained(scratch)
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
