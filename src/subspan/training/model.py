"""Models: transformers' LLaMA from a preset, or any causal language model from a config or a directory."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from subspan.names import near_names
from subspan.training.errors import InputError, first_line
from subspan.training.presets import PRESETS, Preset

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")

transformers_logging.disable_progress_bar()  # a run shows one bar, its own


def preset_of(name: str) -> Preset | None:
    """The preset of this name, or ``None`` for a path or a hub name.

    Raises:
        InputError: neither a preset, nor anything that could be a path or a hub name.
    """
    if name in PRESETS:
        return PRESETS[name]
    if not Path(name).exists() and not _HUB_NAME.fullmatch(name):
        raise InputError(f"model {name!r} is unknown; {near_names(name, PRESETS)} (or give a path to a config or a model)")
    return None


def own_tokenizer(name: str) -> str:
    """Where the tokenizer of a model that is no preset is found, unless another is given.

    Raises:
        InputError: a local model without one.
    """
    path = Path(name)
    if not path.exists():
        return name
    if (path / "checkpoints").is_dir():
        raise InputError(f"model {name!r}: is the directory of a run; give one of its checkpoints/step-NNNNNN")
    folder = path if path.is_dir() else path.parent
    if not any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise InputError(f"tokenizer=None: the model {name!r} brings none; give --tokenizer bytes, embedded, or a path")
    return str(folder)


def build_model(name: str, tokenizer: PreTrainedTokenizerBase, sequence_length: int, seed: int) -> nn.Module:
    """A causal language model. Presets and configs start from random weights, directories and hub names from theirs.

    The seed sets the initial weights; nothing drawn before matters.
    """
    preset, path = preset_of(name), Path(name)
    torch.manual_seed(seed)
    if preset is not None:
        return _from_config(_llama(preset, tokenizer, sequence_length))
    try:
        if path.is_file() or (path.is_dir() and not list(path.glob("*.safetensors")) + list(path.glob("*.bin"))):
            config = AutoConfig.from_pretrained(path)
            config.vocab_size = len(tokenizer)
            model = _from_config(config)
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except Exception as error:  # configs and weights can be wrong in a dozen ways, each with an error class of its own
        raise InputError(f"model {name!r} cannot be loaded: {first_line(error)}; presets are {', '.join(PRESETS)}") from error
    _check_fits(name, model, tokenizer, sequence_length)
    return model


def _check_fits(name: str, model: Any, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"model {name!r} knows {rows} tokens, the tokenizer {len(tokenizer)}; use the model's own: --tokenizer {name}"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions < sequence_length:
        raise InputError(f"sequence_length={sequence_length}: the model {name!r} has {positions} positions; give fewer tokens")
    ids = torch.zeros(2, 4, dtype=torch.long)
    ids[1, -1] = 1
    model.eval()
    with torch.no_grad():
        first, second = model(input_ids=ids, use_cache=False).logits[:, 0]
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-4):
        raise InputError(f"model {name!r} sees the tokens it should predict: it is not causal; give a decoder, such as a LLaMA")


def _llama(preset: Preset, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=preset.hidden,
        intermediate_size=preset.mlp,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        max_position_embeddings=max(1024, sequence_length),
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _from_config(config: Any) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model
