"""Inputs to run a model on once, when nobody gives any: those of transformers, or what its config says."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


def inputs_to_try(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield inputs that ``model`` may run on, the likeliest first.

    They are its ``dummy_inputs``, which are token ids in all models of transformers that do not say otherwise, what
    its ``main_input_name`` asks for by its config (pixels, a spectrogram or a waveform), and both together.
    """
    own = getattr(model, "dummy_inputs", None)
    dummy = dict(own) if isinstance(own, Mapping) else {}
    config = getattr(model, "config", None)
    made = _made(getattr(model, "main_input_name", ""), config) if config is not None else {}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    made = {name: x.to(dtype) if x.is_floating_point() else x for name, x in made.items()}
    if set(dummy) == {"input_ids"} and made:
        yield made
    if dummy:
        yield dummy
    pixels = made or (_made("pixel_values", config) if _of(config, "image_size") else {})
    if dummy and pixels:
        yield dummy | {name: x.to(dtype) if x.is_floating_point() else x for name, x in pixels.items()}


def _made(name: str, config: Any) -> dict[str, Any]:
    """Make the main input of a model from its config, if it is of a kind that is known here."""
    decoded = {"decoder_input_ids": torch.zeros(1, 2, dtype=torch.long)} if _of(config, "is_encoder_decoder") else {}
    if name == "pixel_values":
        size = _of(config, "image_size") or 224
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return {name: torch.zeros(1, _of(config, "num_channels") or 3, *sides)} | decoded
    if name == "input_features" and (bins := _of(config, "num_mel_bins")):
        return {name: torch.zeros(1, bins, 2 * (_of(config, "max_source_positions") or 1500))} | decoded
    if name == "input_values":
        return {name: torch.zeros(1, 16_000)}
    return {}


def _of(config: Any, name: str) -> Any:
    """Return a setting of a config, or of the config of its vision model."""
    found = getattr(config, name, None)
    return found if found is not None else getattr(getattr(config, "vision_config", None), name, None)
