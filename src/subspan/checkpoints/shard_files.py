"""Files of tensors that every rank writes a part of, to be read by any number of ranks.

index.json                                  what there is: each tensor's dtype and whole shape, each file's length and
hash
model-RRRRR-of-WWWWW.safetensors            the rows that rank R of W held; their offsets are in the header
optimizer-RRRRR-of-WWWWW.safetensors

The index is written last: a directory without one is no checkpoint. PyTorch's own writer of this kind
(``torch.distributed.checkpoint``) pickles its metadata; its safetensors variant, ``HuggingFaceStorageWriter``, carries
every
dtype and every uneven shard over, but it writes no index. In torch 2.13 its reader takes the whole shape from the files
it
finds, so a missing file in the middle leaves those rows as they were, in silence, and a changed byte is loaded.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from subspan.checkpoints.collective import world
from subspan.utils.atomic_files import sync, write_text
from subspan.utils.errors import InputError, first_line

INDEX = "index.json"
_FORMAT = 1
_FILE = re.compile(r"(model|optimizer)-(\d{5})-of-(\d{5})\.safetensors")
_DAMAGED = "remove it, or continue an older one with --resume PATH"
_ANOTHER = "nothing was changed; build what the checkpoint was saved from, or give another one"

Table = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and whole shape of each tensor, by name."""


@dataclass(frozen=True)
class Piece:
    """What this rank holds of a tensor, and where that begins in the whole."""

    offsets: tuple[int, ...]
    local: Tensor


def piece_of(tensor: Tensor) -> Piece:
    """The part of ``tensor`` that is here: the same memory. All of it, unless it is a DTensor."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Piece((0,) * tensor.ndim, tensor)
    (chunk,) = tensor.__create_chunk_list__()  # the protocol of torch's own checkpoints
    local = tensor.to_local()
    assert local.shape == chunk.sizes, f"a local shard is {tuple(local.shape)}, its placement says {tuple(chunk.sizes)}"
    return Piece(tuple(chunk.offsets), local)


def is_ours(tensor: Tensor) -> bool:
    """Whether this rank is the one that writes the part of ``tensor`` that it holds, of which others may hold
    copies.
    """
    if not isinstance(tensor, DTensor):
        return world()[0] == 0
    place = tensor.device_mesh.get_coordinate()
    placed = tensor.placements
    return place is not None and not any(at for at, kind in zip(place, placed, strict=True) if kind.is_replicate())


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A rank's share of a part (``model`` or ``optimizer``) of a checkpoint, copied to the host."""

    table: Table
    offsets: dict[str, tuple[int, ...]]
    tensors: dict[str, Tensor]


def copy_part(tensors: Mapping[str, Tensor]) -> Part:
    """Copy what this rank has to write of ``tensors``; they may change afterwards."""
    table = {name: (dtype_name(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}
    pieces = {name: piece_of(tensor) for name, tensor in tensors.items() if is_ours(tensor)}
    pieces = {name: piece for name, piece in pieces.items() if piece.local.numel()}  # ranks beyond the rows hold none
    host = {
        name: piece.local.to("cpu", copy=True, memory_format=torch.contiguous_format) for name, piece in pieces.items()
    }
    return Part(table, {name: piece.offsets for name, piece in pieces.items()}, host)


def dtype_name(tensor: Tensor) -> str:
    """Its dtype as text, ``bfloat16`` say."""
    return str(tensor.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Written:
    """What a rank tells the others of its files."""

    files: dict[str, dict[str, Any]]
    elements: dict[str, int]
    digest: str


def write_parts(folder: Path, parts: Mapping[str, Part], rank: int, count: int) -> Written:
    """Write this rank's files, and make sure that they have reached the disk."""
    files = {}
    for kind, part in parts.items():
        if not part.tensors:
            continue
        path = folder / f"{kind}-{rank:05d}-of-{count:05d}.safetensors"
        try:
            # One entry: safetensors writes several in any order, and equal states should be equal files.
            save_file(part.tensors, path, metadata={"offsets": json.dumps(part.offsets)})
            sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "blake2b": digest_of(path)}
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"checkpoint {folder}: {path.name} cannot be written: {first_line(error)}; make room"
            ) from error
    tables = json.dumps({kind: part.table for kind, part in parts.items()})
    elements = {kind: sum(tensor.numel() for tensor in part.tensors.values()) for kind, part in parts.items()}
    return Written(files, elements, hashlib.blake2b(tables.encode()).hexdigest())


def write_index(folder: Path, tables: Mapping[str, Table], written: list[Written], settings: Any) -> None:
    """Write the index, which makes a checkpoint of what all ranks have written. For one rank to do."""
    for kind, table in tables.items():
        whole = sum(torch.Size(shape).numel() for _, shape in table.values())
        there = sum(each.elements[kind] for each in written)
        assert there == whole, f"the ranks have written {there} of the {whole} numbers of the {kind}"
    # Otherwise the names are those of rank 0, and what only others have would be lost.
    assert len({each.digest for each in written}) == 1, "the ranks hold tensors of different names, dtypes or shapes"
    files = {name: entry for each in written for name, entry in each.files.items()}
    content = {"format": _FORMAT, "world": len(written), "files": files, "tensors": tables, "settings": settings}
    try:
        write_text(folder / INDEX, _render(content))
        sync(folder)
    except OSError as error:
        raise InputError(f"checkpoint {folder}: {INDEX} cannot be written: {first_line(error)}; make room") from error


def _render(content: Mapping[str, Any]) -> str:
    """The one text of an index of this content, its own hash included."""
    digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=32).hexdigest()
    return json.dumps({**content, "blake2b": digest}, indent=1) + "\n"


def digest_of(path: Path) -> str:
    """The hash of a file."""
    digest = hashlib.blake2b(digest_size=32)
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


# --- reading ----------------------------------------------------------------------------------------------------------


class DamagedError(InputError):
    """The files of a checkpoint are not those that were written."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"checkpoint {folder}: {reason}; {_DAMAGED}")
        self.reason = reason


class Shards:
    """A checkpoint on the disk. Nothing in it is believed before ``check``.

    Raises:
        DamagedError: there is no index, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            raw = (folder / INDEX).read_bytes()
        except OSError as error:
            raise self.refuse(
                INDEX, f"cannot be read ({error.strerror}), so this is no complete sharded checkpoint"
            ) from error
        try:
            content = json.loads(raw)
            claimed = {key: value for key, value in content.items() if key != "blake2b"}
        except (ValueError, RecursionError, AttributeError) as error:
            raise self.refuse(INDEX, "is damaged: it is no JSON object") from error
        if _render(claimed).encode() != raw:  # every byte counts, also one between two words
            raise self.refuse(INDEX, "is damaged: it does not have the hash that it names")
        if content["format"] != _FORMAT:
            raise self.refuse(
                INDEX, f"has format {content['format']}, expected {_FORMAT}: it was written by another version"
            )
        self.world: int = content["world"]
        self.files: dict[str, dict[str, Any]] = content["files"]
        self.settings: Any = content["settings"]
        self.tables: dict[str, Table] = {
            kind: {name: (dtype, tuple(shape)) for name, (dtype, shape) in table.items()}
            for kind, table in content["tensors"].items()
        }

    def refuse(self, file: str, reason: str) -> "DamagedError":
        """The error for a checkpoint that nobody can use."""
        return DamagedError(self.folder, f"{file} {reason}")

    def differs(self, reason: str) -> InputError:
        """The error for a checkpoint of something else."""
        return InputError(f"checkpoint {self.folder}: {INDEX} {reason}; {_ANOTHER}")

    def check(self, share: int = 0, shares: int = 1, kind: str = "") -> None:
        """Raise unless the files are those of the index. Contents are compared of every ``shares``-th file of the
        ``kind``.
        """
        found = {path.name for path in self.folder.glob("*.safetensors")}
        strangers = sorted(name for name in found - self.files.keys() if _FILE.fullmatch(name))
        if strangers:
            raise self.refuse(
                strangers[0], f"is not of this checkpoint, which {self.world} ranks wrote: two have been mixed"
            )
        for name, entry in self.files.items():
            match = _FILE.fullmatch(name)
            if match is None or int(match[3]) != self.world or int(match[2]) >= self.world:
                raise self.refuse(
                    INDEX, f"names {name!r}, which is no file of a checkpoint that {self.world} ranks wrote"
                )
            if name not in found:
                raise self.refuse(name, "is missing")
            size = (self.folder / name).stat().st_size
            if size != entry["bytes"]:
                raise self.refuse(name, f"has {size:,} bytes, was written with {entry['bytes']:,}")
        for name in [name for name in self.files if name.startswith(kind)][share::shares]:
            try:
                same = digest_of(self.folder / name) == self.files[name]["blake2b"]
            except OSError as error:
                raise self.refuse(name, f"cannot be read ({error.strerror})") from error
            if not same:
                raise self.refuse(name, "is damaged: its content does not have the hash that the index names")

    def read(self, kind: str, wanted: Mapping[str, Piece]) -> None:
        """Fill each wanted piece of the ``kind``, reading what overlaps it and no more."""
        missing = {name: piece.local.numel() for name, piece in wanted.items()}
        for file in self.files:
            if not file.startswith(f"{kind}-"):
                continue
            try:
                with safe_open(self.folder / file, framework="pt") as source:
                    offsets = json.loads(source.metadata()["offsets"])
                    for name in offsets.keys() & wanted.keys():
                        missing[name] -= _copy_overlap(source, name, offsets[name], wanted[name])
            except (OSError, ValueError, SafetensorError) as error:
                raise self.refuse(file, f"cannot be read: {first_line(error)}") from error
        lacking = [name for name, number in missing.items() if number]
        if lacking:
            raise self.refuse(INDEX, f"names {lacking[0]!r}, of which the files hold a part only")


def _copy_overlap(source: Any, name: str, offsets: list[int], piece: Piece) -> int:
    """Copy what a file has of ``piece``; how many numbers that is."""
    if not offsets:
        piece.local.copy_(source.get_tensor(name))
        return 1
    stored = source.get_slice(name)
    there, here = [], []
    for begin, length, own, size in zip(offsets, stored.get_shape(), piece.offsets, piece.local.shape, strict=True):
        low, high = max(begin, own), min(begin + length, own + size)
        if low >= high:
            return 0
        there.append(slice(low - begin, high - begin))
        here.append(slice(low - own, high - own))
    target = piece.local[tuple(here)]
    target.copy_(stored[tuple(there)])
    return target.numel()
