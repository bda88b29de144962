"""Moments in 8 bits: blockwise dynamic quantisation, with the functions of bitsandbytes.

A moment of ``k >= min_8bit_size`` entries becomes two plain tensors: ``exp_avg.codes`` (uint8, ``(..., m, r)``) has a
code for each entry, and ``exp_avg.absmax`` (fp32, ``(..., m, ceil(r / 256))``) has the largest magnitude of each block
of 256 entries of a row. Smaller moments, and vectors, stay in fp32. The default of ``min_8bit_size`` is 4,096, as in
bitsandbytes. The update is computed from the exact new moment, before this is quantised, as there.

Source: Dettmers et al. 2022, arXiv 2110.02861.

Deviations from bitsandbytes' optimizers: a block ends with its row, and theirs runs on into the next row. So rows can
be sharded over ranks, and saved, in any division. For rows of 256, 512, ... entries the blocks are the same.
"""

import functools
import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
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
    """Return ``state`` with its moments in 8 bits.

    Args:
        state: the state of one parameter.
        moments: whether each moment is signed, by its name.
        smallest: number of entries of the smallest moment that is packed.
        length: length of the first dimension of the moments, if only some of it is on this rank.
    """
    packed: State = {}
    for name, value in state.items():
        if name in moments and is_packed(value.shape, smallest, length):
            packed[f"{name}.codes"], packed[f"{name}.absmax"] = _encode(value, moments[name])
        else:
            packed[name] = value
    return packed


def is_packed(shape: Sequence[int], smallest: int, length: int | None = None) -> bool:
    """Whether ``pack`` packs a moment of this shape, which needs two dimensions and ``smallest`` entries.

    ``length`` is that of the first dimension, if only some of it is on this rank.
    """
    return len(shape) > 1 and math.prod((length or shape[0], *shape[1:])) >= smallest


def packed_bytes(shape: Sequence[int]) -> int:
    """The bytes of a packed moment of this shape: its codes, and the largest magnitudes of its blocks."""
    rows = math.prod(shape[:-1])
    return rows * shape[-1] + 4 * rows * -(-shape[-1] // BLOCK)


def unpack(state: State, moments: Mapping[str, bool], dtype: torch.dtype) -> State:
    """Return what ``pack`` was given: copies of the moments in ``dtype``, and everything else as it is."""
    return state | {
        name: _decode(state[f"{name}.codes"], state[f"{name}.absmax"], moments[name]).to(dtype)
        for name in _packed(state, moments)
    }


def store_(state: State, unpacked: State, moments: Mapping[str, bool]) -> None:
    """Store the moments of ``unpacked`` in the 8 bits of ``state``."""
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
    """Return the entries of a block in rows of ``width``: 256, or fewer if the whole row is shorter.

    bitsandbytes has blocks of 64, 128, 256, ... entries.
    """
    return min(BLOCK, max(64, 1 << (width - 1).bit_length()))


@functools.cache
def _map(signed: bool, device: torch.device) -> Tensor:
    values: Tensor = _bitsandbytes().create_dynamic_map(signed=signed)
    return values.to(device)


@functools.cache
def _bitsandbytes() -> Any:
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns about 4-bit kernels, which are not used
    import bitsandbytes.functional  # the import takes seconds, and the package is optional

    log.setLevel(level)
    return bitsandbytes.functional
