"""The model of a run, built from a preset, a config, a directory or a hub name.

It is a causal language model, or one with a head for labels.
"""

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from subspan.training.models.presets import PRESETS, Preset
from subspan.utils.errors import InputError, first_line
from subspan.utils.suggestions import near_names

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")

UNUSABLE = (
    OSError,
    ValueError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    ImportError,
    AssertionError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
    StrictDataclassError,
)
"""The errors that transformers raises for a config or for weights that are missing, damaged or contradictory.

``AssertionError`` is torch's, for example where the token of the padding lies outside of the vocabulary. ``TypeError``
and ``AttributeError`` are left out: they mean that transformers is called wrongly.
"""

transformers_logging.disable_progress_bar()  # a run shows one bar, its own


def preset_of(name: str) -> Preset | None:
    """Return the preset of this name, or ``None`` for a path or a hub name.

    Raises:
        InputError: the name is no preset, and could be neither a path nor a hub name.
    """
    if name in PRESETS:
        return PRESETS[name]
    if not Path(name).exists() and not _HUB_NAME.fullmatch(name):
        raise InputError(
            f"model {name!r} is unknown; {near_names(name, PRESETS)} (or give a path to a config or a model)"
        )
    return None


def own_tokenizer(name: str) -> str:
    """Return the place of the tokenizer that a model which is no preset brings.

    Raises:
        InputError: the model is a local one and brings no tokenizer.
    """
    path = Path(name)
    if not path.exists():
        return name
    if (path / "checkpoints").is_dir():
        inside = "its model" if (path / "model").is_dir() else "one of its checkpoints/step-NNNNNN"
        raise InputError(f"model {name!r}: is the directory of a run; give {inside}")
    folder = path if path.is_dir() else path.parent
    if not any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise InputError(f"tokenizer=None: the model {name!r} brings none; give --tokenizer bytes, embedded, or a path")
    return str(folder)


def brings_weights(name: str) -> bool:
    """Whether the model of this name comes with weights, as a directory that holds some or a hub name does."""
    path = Path(name)
    if preset_of(name) is not None or path.is_file():
        return False
    return not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.bin"))


def build_model(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    seed: int,
    labels: Sequence[str] | None = None,
    setting: str = "sequence_length",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Build a causal language model, or one with a head for ``labels``.

    Presets and configs start from random weights, directories and hub names from their own. A head that they do not
    bring is random. Only the seed decides the random weights: nothing that was drawn before matters.

    Args:
        name: a preset, the path of a config or of a directory, or a hub name.
        tokenizer: sets the size of the vocabulary where the weights are random.
        sequence_length: the number of tokens that the model must have positions for.
        seed: of the random weights.
        labels: the classes to tell apart; a single one stands for a number to predict.
        setting: the user's name for ``sequence_length``, for messages.
        dtype: that of the weights of a language model that brings some. Random weights, also those of a head for
            labels, are drawn in fp32, so that they are the same in every precision.

    Raises:
        InputError: the model cannot be loaded, does not fit the tokenizer or the length, or is not causal.
    """
    preset, path = preset_of(name), Path(name)
    torch.manual_seed(seed)
    kind = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    head = {} if labels is None else _head(tokenizer, labels)
    if preset is not None:
        config = _llama(preset, tokenizer, sequence_length)
        config.update(head)
        return _from_config(kind, config)
    if labels is None:
        _refuse_encoder_decoder(name)
    weights, vocabulary = brings_weights(name), len(tokenizer)
    resized = {"ignore_mismatched_sizes": True} if head else {}
    try:  # nothing but calls of transformers
        if weights:
            model = kind.from_pretrained(name, dtype=torch.float32 if head else dtype, **head, **resized)
        else:
            config = AutoConfig.from_pretrained(path, **head)
            config.vocab_size = vocabulary
            model = _from_config(kind, config)
    except UNUSABLE as error:
        raise cannot_load(name, error) from error
    _check_fits(name, model, tokenizer, sequence_length, setting)
    if labels is None:
        _check_causal(name, model)
    return model


def _refuse_encoder_decoder(name: str) -> None:
    """Raise unless a model is a decoder only: of BART only the decoder would be trained, and T5 has none alone."""
    try:
        config = AutoConfig.from_pretrained(name)
    except UNUSABLE:
        return  # whoever loads it says why
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"model {name!r}: {config.model_type} is an encoder-decoder, and this command trains decoders; give another "
            "model, or train it with the Trainer of transformers and subspan.integrations.transformers.Subspace"
        )


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of the weights in a run of this ``precision``."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def cannot_load(name: str, error: Exception) -> InputError:
    """Return the error for a model that is not there, or that cannot be used."""
    return InputError(f"model {name!r} cannot be loaded: {first_line(error)}; presets are {', '.join(PRESETS)}")


def _head(tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        # A decoder reads the label from the last token that is not padding.
        "pad_token_id": padding_of(tokenizer),
    }


def padding_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills up a batch. Which one it is does not matter, since it stands behind the text."""
    known = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if known is None else int(known)


def _check_fits(name: str, model: Any, tokenizer: PreTrainedTokenizerBase, length: int, setting: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"model {name!r} knows {rows} tokens, the tokenizer {len(tokenizer)}; use the model's own: --tokenizer "
            f"{name}"
        )
    positions = positions_of(model)
    if positions is not None and positions < length:
        raise InputError(f"{setting}={length}: the model {name!r} has {positions} positions; give fewer tokens")


def positions_of(model: Any) -> int | None:
    """Return the number of tokens that ``model`` has positions for, or ``None`` if its config does not say."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    for name, module in model.named_modules():
        # RoBERTa and its relatives begin behind the position that stands for padding: of 514 they use 512.
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            return min(positions, module.num_embeddings - module.padding_idx - 1)
    return positions


def _check_causal(name: str, model: Any) -> None:
    ids = torch.zeros(2, 4, dtype=torch.long)
    ids[1, -1] = 1
    model.eval()
    with torch.no_grad():
        first, second = model(input_ids=ids, use_cache=False).logits[:, 0]
    loose = first.dtype != torch.float32
    if not torch.allclose(first, second, rtol=3e-2 if loose else 1e-3, atol=1e-2 if loose else 1e-4):
        raise InputError(
            f"model {name!r} sees the tokens it should predict: it is not causal; give a decoder, such as a LLaMA"
        )


def check_packs(name: str, model: Any) -> None:
    """Raise an ``InputError`` unless ``model`` keeps examples apart that are packed into one sequence."""
    ids = torch.arange(8)[None] % max(2, model.get_input_embeddings().weight.shape[0])
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    model.eval()
    try:
        with torch.no_grad():
            together = model(input_ids=ids, position_ids=places, use_cache=False).logits[:, 4:]
            alone = model(input_ids=ids[:, 4:], use_cache=False).logits
        apart = torch.allclose(together, alone, rtol=1e-3, atol=1e-4)
    except TypeError:  # a model without positions
        apart = False
    if not apart:
        raise InputError(
            f"packing=True: in the model {name!r} ({type(model).__name__}) packed examples would see each other; "
            "leave it out"
        )


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


def _from_config(kind: Any, config: Any) -> nn.Module:
    model: nn.Module = kind.from_config(config, dtype=torch.float32)
    return model


def checkpoint_activations(model: nn.Module, name: str) -> None:
    """Let ``model`` recompute its activations in the backward pass."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise InputError(
            f"gradient_checkpointing=True: the model {name!r} ({type(model).__name__}) does not support it; "
            "leave it out, or take another model"
        )
    # The second name is that of transformers before 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()  # type: ignore[operator]  # transformers' method
