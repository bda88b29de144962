"""Moments in 8 bits: blockwise dynamic quantisation (Dettmers et al. 2022, arXiv 2110.02861), by bitsandbytes'
functions.

A moment of ``k >= min_8bit_size`` entries (4,096 unless set, as there) becomes ``k`` codes, in its own shape, and the
largest magnitude of each 256 of them within a row: ``exp_avg.codes`` (uint8, ``(..., m, r)``) and ``exp_avg.absmax``
(fp32, ``(..., m, ceil(r / 256))``), plain tensors. Smaller moments, and vectors, stay fp32.

Deviations from bitsandbytes' optimizers: a block ends with its row, where theirs runs on into the next, so that rows
can be spread over ranks, and saved, in any division (rows of 256, 512, ... entries are the same). The update is
computed from the exact new moment before it is quantised, as there.
"""

import functools
import importlib.util
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from subspan.storage.allocation import State
from subspan.utils.errors import SettingError

BLOCK = 256
SMALLEST = 4096


def check_available() -> None:
    """Raise unless bitsandbytes can be imported."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SettingError(
            "state_dtype='int8': bitsandbytes is not installed; pip install 'subspan[8bit]', or keep 'float32'"
        )


def pack(state: State, moments: Mapping[str, bool], smallest: int, length: int | None = None) -> State:
    """``state`` with its ``moments`` (name: signed) in 8 bits.

    Args:
        smallest: entries of the smallest moment that is packed.
        length: of the first dimension of the moments, if only some of it is here.
    """
    packed: State = {}
    for name, value in state.items():
        if name in moments and value.ndim > 1 and math.prod(((length or value.shape[0]), *value.shape[1:])) >= smallest:
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
    width = A.shape[-1]
    block = _block(width)
    padded = torch.nn.functional.pad(A.float(), (0, -width % block)).contiguous()
    codes, rest = _bitsandbytes().quantize_blockwise(padded, code=_map(signed, A.device), blocksize=block)
    return codes.view(padded.shape)[..., :width].contiguous(), rest.absmax.view(
        *A.shape[:-1], padded.shape[-1] // block
    )


def _decode(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    width = codes.shape[-1]
    block = _block(width)
    decoded: Tensor = _bitsandbytes().dequantize_blockwise(
        torch.nn.functional.pad(codes, (0, -width % block)).contiguous(),
        absmax=absmax.flatten(),
        code=_map(signed, codes.device),
        blocksize=block,
    )
    return decoded[..., :width].contiguous()


def _block(width: int) -> int:
    """Entries of a block in rows of ``width``: 256, or the whole row; bitsandbytes has powers of two from 64 on."""
    return min(BLOCK, max(64, 1 << (width - 1).bit_length()))


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
