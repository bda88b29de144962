"""A sharded checkpoint as a plain Hugging Face model."""

import copy
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from subspan.training.files import no_space, replace_directory
from subspan.training.shards import Shards, piece_of


def write_whole(checkpoint: Path, place: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put what ranks have saved together, as a directory ``place`` that ``from_pretrained`` loads. For one process.

    The host holds the whole model meanwhile, once.

    Args:
        model: whose it is, sharded; gives its configuration and the name of its class.

    Raises:
        InputError: a file of the checkpoint is missing or damaged, or ``place`` cannot be written, for want of space say.
    """
    shards = Shards(checkpoint)
    shards.check()
    tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in shards.tables["model"].items()}
    shards.read("model", {name: piece_of(tensor) for name, tensor in tensors.items()})
    scratch = place.with_name("unfinished")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
        config: PretrainedConfig = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__.removeprefix("FSDP")]  # fully_shard makes a class of its own
        config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        replace_directory(scratch, place)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise no_space(f"model {place}", place.parent, error, needed) from error
