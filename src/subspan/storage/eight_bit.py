"""Moments in 8 bits: blockwise dynamic quantisation, as bitsandbytes stores them, and without it.

    absmax = max |A| of a block        code = the number of the value that is nearest to A / absmax
    A     ~= values[code] * absmax     values: ``dynamic_map``, 256 numbers from -1 or 0 to 1, closest near 0

A moment of ``k >= min_8bit_size`` entries becomes two plain tensors: ``exp_avg.codes`` (uint8, ``(..., m, r)``) has a
code for each entry, and ``exp_avg.absmax`` (fp32, ``(..., m, ceil(r / 256))``) has the largest magnitude of each block
of 256 entries of a row. Smaller moments, and vectors, stay in fp32. The default of ``min_8bit_size`` is 4,096, as in
bitsandbytes. The update is computed from the exact new moment, before this is quantised, as there.

What is kept of an entry is off by at most half of the gap between the two values around it, up to the rounding of fp32.
Halfway between two values the lower one is kept. Zero stays zero. There is one exception: an entry of a second moment
that is not zero never becomes zero. It takes at least the smallest value, ``3.25e-7`` of ``absmax``.

Source: Dettmers et al. 2022, arXiv 2110.02861.

Deviations from bitsandbytes:

- A block ends with its row, and theirs runs on into the next row. So rows can be sharded over ranks, and saved, in any
  division. For rows of 256, 512, ... entries the blocks are the same.
- The nearest value is taken on every device. Their kernel for CPUs looks it up in a coarse table. There a small entry
  takes another value, and an entry of zero is not kept as zero. Their kernel for CUDA takes the nearest value.
- A small second moment is rounded to the smallest value rather than to zero. An entry whose gradients are below
  ``4e-4`` of the largest in its block has a first moment that is kept and a second one that is not, so the step would
  divide by little more than epsilon. Steps of 75 times the learning rate were seen.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from subspan.storage.allocation import State

BLOCK = 256
SMALLEST = 4096
CHUNK = 2**20  # entries that are encoded or decoded at a time, with temporaries of some 16 MiB


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
            codes = torch.empty(value.shape, dtype=torch.uint8, device=value.device)
            absmax = codes.new_empty((*value.shape[:-1], -(-value.shape[-1] // BLOCK)), dtype=torch.float32)
            _encode_(value, moments[name], codes, absmax)
            packed |= {f"{name}.codes": codes, f"{name}.absmax": absmax}
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
        name: _decode(state[f"{name}.codes"], state[f"{name}.absmax"], moments[name], dtype)
        for name in _packed(state, moments)
    }


def store_(state: State, unpacked: State, moments: Mapping[str, bool]) -> None:
    """Store the moments of ``unpacked`` in the 8 bits of ``state``."""
    for name in _packed(state, moments):
        _encode_(unpacked[name], moments[name], state[f"{name}.codes"], state[f"{name}.absmax"])


def _packed(state: State, moments: Mapping[str, bool]) -> list[str]:
    return [name for name in moments if f"{name}.codes" in state]


def _encode_(A: Tensor, signed: bool, codes: Tensor, absmax: Tensor) -> None:
    """Write the codes and the largest magnitudes of ``A`` into the given tensors."""
    _, bounds = _map(signed, A.device)
    for rows, codes_, absmax_ in _chunks(A, codes, absmax):
        blocks = _blocks(rows.float())
        largest = torch.linalg.vector_norm(blocks, torch.inf, dim=-1)
        quotients = blocks / largest.where(largest != 0, 1.0)[..., None]  # a block of zeros is no division by zero
        codes_.copy_(_rows(torch.bucketize(quotients, bounds, out_int32=True), rows.shape[-1]))
        absmax_.copy_(largest)


def _decode(codes: Tensor, absmax: Tensor, signed: bool, dtype: torch.dtype) -> Tensor:
    values, _ = _map(signed, codes.device)
    A = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for rows, codes_, absmax_ in _chunks(A, codes, absmax):
        rows.copy_(_rows(values[_blocks(codes_).int()] * absmax_[..., None], rows.shape[-1]))
    return A


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of all tensors, few enough at a time that what is computed of them takes little memory."""
    count = max(1, CHUNK // tensors[0].shape[-1])
    yield from zip(*(A.view(-1, A.shape[-1]).split(count) for A in tensors), strict=True)


def _blocks(A: Tensor) -> Tensor:
    """Return rows ``(m, r)`` as ``(m, blocks, entries)``; the last block is filled up with zeros."""
    width = A.shape[1]
    size = min(width, BLOCK)
    return torch.nn.functional.pad(A, (0, -width % size)).unflatten(1, (-1, size))


def _rows(blocks: Tensor, width: int) -> Tensor:
    """Return the rows ``(m, width)`` of blocks ``(m, blocks, entries)``."""
    return blocks.flatten(1)[:, :width]


@functools.cache
def _map(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the values of the codes, and the largest number that each value but the last stands for."""
    values, bounds = _MAPS[signed]
    return values.to(device), bounds.to(device)


def dynamic_map(signed: bool) -> Tensor:
    """Return the 256 values of the codes in fp32, in ascending order, bit for bit as bitsandbytes has them.

    They are 0, 1, and evenly spaced values in each of seven decades. The decade from ``10^(k - 7)`` to ``10^(k - 6)``,
    where ``k`` is 0 to 6, has ``2^(k + 1)`` values, or ``2^k`` of either sign.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")]
    for k in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (k if signed else k + 1) + 1, dtype=torch.float32, device="cpu")
        middles = 10 ** (k - 6) * (edges[:-1] + edges[1:]) / 2
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


def _with_bounds(values: Tensor) -> tuple[Tensor, Tensor]:
    middles = (values[:-1].double() + values[1:].double()) / 2  # some lie between two numbers of fp32
    bounds = middles.float()
    bounds = torch.where(bounds > middles, bounds.nextafter(values[:-1]), bounds)
    if values[0] == 0:  # unsigned: only zero is stored as zero
        bounds[0] = 0
    return values, bounds


# They are made here rather than at the first use, which may be under a mode of torch that makes tensors without memory.
_MAPS = {signed: _with_bounds(dynamic_map(signed)) for signed in (True, False)}
