"""Moments in 8 bits: blockwise dynamic quantisation (Dettmers et al. 2022, arXiv 2110.02861), by bitsandbytes' functions.

A moment of ``k >= 4096`` entries becomes ``k`` codes, in its own shape, and the largest magnitude of each 256 of them, in
order: ``exp_avg.codes`` (uint8) and ``exp_avg.absmax`` (fp32), plain tensors. Smaller moments stay fp32.

Deviations from bitsandbytes' optimizers: none in what is stored; the update is computed from the exact new moment before it is
quantised, as there.
"""

import functools
import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from subspan.state import State

BLOCK = 256
SMALLEST = 4096


def check_available() -> None:
    """Raise unless bitsandbytes can be imported."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("state_dtype='int8': bitsandbytes is not installed; pip install 'subspan[8bit]', or keep 'float32'")


def pack(state: State, moments: Mapping[str, bool]) -> State:
    """``state`` with its ``moments`` (name: signed) in 8 bits."""
    packed: State = {}
    for name, value in state.items():
        if name in moments and value.numel() >= SMALLEST:
            packed[f"{name}.codes"], packed[f"{name}.absmax"] = _encode(value, moments[name])
        else:
            packed[name] = value
    return packed


def unpack(state: State, moments: Mapping[str, bool], dtype: torch.dtype) -> State:
    """What ``pack`` was given: copies of the moments in ``dtype``, everything else as it is."""
    return state | {
        name: _decode(state[f"{name}.codes"], state[f"{name}.absmax"], moments[name]).to(dtype)
        for name in _packed(state, moments)
    }


def store_(state: State, unpacked: State, moments: Mapping[str, bool]) -> None:
    """Put the moments of ``unpacked`` back."""
    for name in _packed(state, moments):
        codes, absmax = _encode(unpacked[name], moments[name])
        state[f"{name}.codes"].copy_(codes)
        state[f"{name}.absmax"].copy_(absmax)


def _packed(state: State, moments: Mapping[str, bool]) -> list[str]:
    return [name for name in moments if f"{name}.codes" in state]


def _encode(A: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    codes, rest = _bitsandbytes().quantize_blockwise(A.float(), code=_map(signed, A.device), blocksize=BLOCK)
    return codes, rest.absmax


def _decode(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    decoded: Tensor = _bitsandbytes().dequantize_blockwise(
        codes, absmax=absmax, code=_map(signed, codes.device), blocksize=BLOCK
    )
    return decoded


@functools.cache
def _map(signed: bool, device: torch.device) -> Tensor:
    values: Tensor = _bitsandbytes().create_dynamic_map(signed=signed)
    return values.to(device)


@functools.cache
def _bitsandbytes() -> Any:
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of 4-bit kernels that are not needed here
    import bitsandbytes.functional  # seconds long, and an extra

    log.setLevel(level)
    return bitsandbytes.functional
