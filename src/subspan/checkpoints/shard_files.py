"""Files of shards: every rank writes its own shard of each tensor, and any number of ranks can read them.

index.json                                  each tensor's dtype and whole shape; each file's length and hash
model-RRRRR-of-WWWWW.safetensors            the rows that rank R of W held; their offsets are in the header
optimizer-RRRRR-of-WWWWW.safetensors

The index is written last: a directory without one is no checkpoint. PyTorch's own writer of this kind
(``torch.distributed.checkpoint``) pickles its metadata. Its safetensors variant, ``HuggingFaceStorageWriter``, carries
every dtype and every uneven shard over, but it writes no index. Its reader in torch 2.13 takes the whole shape from
the files that it finds. So a missing file in the middle leaves those rows as they were, in silence, and a changed byte
is loaded.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from subspan.checkpoints.checksums import digest_of
from subspan.checkpoints.collective import world
from subspan.checkpoints.directory import INDEX
from subspan.utils.atomic_files import disk_errors_explained, sync, write_text
from subspan.utils.errors import InputError, first_line
from subspan.utils.names import canonical_names

_FORMAT = 1
_FILE = re.compile(r"(model|optimizer)-(\d{5})-of-(\d{5})\.safetensors")
_DAMAGED = "remove it, or continue an older one with --resume PATH"
_ANOTHER = "nothing was changed; build what the checkpoint was saved from, or give another one"

Table = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and whole shape of each tensor, by name."""


_DIGEST = 32  # bytes of a hash in an index; those in checksums.json have half as many


@dataclass(frozen=True)
class Piece:
    """The local shard of a tensor, and where it begins in the whole."""

    offsets: tuple[int, ...]
    local: Tensor


def piece_of(tensor: Tensor) -> Piece:
    """Return the local shard of ``tensor``, in the same memory. It is all of a tensor that is no DTensor."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Piece((0,) * tensor.ndim, tensor)
    (chunk,) = tensor.__create_chunk_list__()  # the protocol of torch's own checkpoints
    local = tensor.to_local()
    assert local.shape == chunk.sizes, f"a local shard is {tuple(local.shape)}, its placement says {tuple(chunk.sizes)}"
    return Piece(tuple(chunk.offsets), local)


def is_ours(tensor: Tensor) -> bool:
    """Whether this rank is the one that writes its local shard of ``tensor``, of which others may hold copies."""
    if not isinstance(tensor, DTensor):
        return world()[0] == 0
    place = tensor.device_mesh.get_coordinate()
    placed = tensor.placements
    return place is not None and not any(at for at, kind in zip(place, placed, strict=True) if kind.is_replicate())


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HostCopy:
    """What a rank has to write of the ``model`` or of the ``optimizer``, copied to the host."""

    table: Table
    offsets: dict[str, tuple[int, ...]]
    tensors: dict[str, Tensor]


def copy_to_host(tensors: Mapping[str, Tensor]) -> HostCopy:
    """Copy what this rank has to write of ``tensors``, which may change afterwards."""
    table = {name: (dtype_name(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}
    pieces = {name: piece_of(tensor) for name, tensor in tensors.items() if is_ours(tensor)}
    pieces = {name: piece for name, piece in pieces.items() if piece.local.numel()}  # ranks beyond the rows hold none
    host = {
        name: piece.local.to("cpu", copy=True, memory_format=torch.contiguous_format) for name, piece in pieces.items()
    }
    return HostCopy(table, {name: piece.offsets for name, piece in pieces.items()}, host)


def dtype_name(tensor: Tensor) -> str:
    """Return the dtype of ``tensor`` as text, for example ``bfloat16``."""
    return str(tensor.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Written:
    """What a rank tells the others about its files."""

    files: dict[str, dict[str, Any]]
    elements: dict[str, int]
    digest: str


def table_bytes(tables: Mapping[str, Table]) -> int:
    """Return the bytes of all tensors in ``tables``, whole."""
    each = (entry for table in tables.values() for entry in table.values())
    return sum(torch.Size(shape).numel() * getattr(torch, dtype).itemsize for dtype, shape in each)


def own_files(folder: Path, kinds: Iterable[str]) -> dict[str, Path]:
    """Return the path of this rank's file of each of ``kinds``."""
    rank, count = world()
    return {kind: folder / f"{kind}-{rank:05d}-of-{count:05d}.safetensors" for kind in kinds}


def write_shards(paths: Mapping[str, Path], copies: Mapping[str, HostCopy]) -> Written:
    """Write this rank's files, and make sure that they have reached the disk.

    Raises:
        InputError: the disk does not take them.
    """
    files = {}
    tables = {kind: copy.table for kind, copy in copies.items()}
    for kind, copy in copies.items():
        if not copy.tensors:
            continue
        path = paths[kind]
        with disk_errors_explained(f"checkpoint {path.parent}", path.parent, table_bytes(tables)):
            # One entry: safetensors writes several in any order, and equal states should be equal files.
            save_file(copy.tensors, path, metadata={"offsets": json.dumps(copy.offsets)})
            sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "blake2b": digest_of(path, _DIGEST)}
    elements = {kind: sum(tensor.numel() for tensor in copy.tensors.values()) for kind, copy in copies.items()}
    return Written(files, elements, hashlib.blake2b(json.dumps(tables).encode()).hexdigest())


def write_index(folder: Path, tables: Mapping[str, Table], written: list[Written], settings: Any) -> None:
    """Write the index, which makes a checkpoint of what all ranks have written. For one rank to do.

    Raises:
        InputError: the disk does not take it.
    """
    for kind, table in tables.items():
        whole = sum(torch.Size(shape).numel() for _, shape in table.values())
        there = sum(each.elements[kind] for each in written)
        assert there == whole, f"the ranks have written {there} of the {whole} numbers of the {kind}"
    # The index has the names of rank 0: what only others have would be lost.
    assert len({each.digest for each in written}) == 1, "the ranks hold tensors of different names, dtypes or shapes"
    files = {name: entry for each in written for name, entry in each.files.items()}
    content = {"format": _FORMAT, "world": len(written), "files": files, "tensors": tables, "settings": settings}
    with disk_errors_explained(f"checkpoint {folder}", folder, table_bytes(tables)):
        write_text(folder / INDEX, _render(content))
        sync(folder)


def _render(content: Mapping[str, Any]) -> str:
    """Return the one text that an index of this content has, with its own hash."""
    digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=_DIGEST).hexdigest()
    return json.dumps({**content, "blake2b": digest}, indent=1) + "\n"


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
            reason = f"cannot be read ({error.strerror}), so this is no complete sharded checkpoint"
            raise self.refuse(INDEX, reason) from error
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
        self.model_names = {canonical: name for name, canonical in canonical_names(self.tables["model"]).items()}
        """The name in the files of each tensor of the model, by its canonical name."""

    def refuse(self, file: str, reason: str) -> DamagedError:
        """Make the error for a checkpoint that nobody can use."""
        return DamagedError(self.folder, f"{file} {reason}")

    def differs(self, reason: str) -> InputError:
        """Make the error for a checkpoint of something else."""
        return InputError(f"checkpoint {self.folder}: {INDEX} {reason}; {_ANOTHER}")

    def check(self, share: int = 0, shares: int = 1, kind: str = "") -> None:
        """Raise an error unless the files are those of the index.

        Args:
            share: which of ``shares`` shares of the files to read, so that ranks can divide the work among them.
            shares: how many there are. Names and lengths of all files are compared in any case.
            kind: ``model`` or ``optimizer``, to read only files of this kind.
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
                same = digest_of(self.folder / name, _DIGEST) == self.files[name]["blake2b"]
            except OSError as error:
                raise self.refuse(name, f"cannot be read ({error.strerror})") from error
            if not same:
                raise self.refuse(name, "is damaged: its content does not have the hash that the index names")

    def read(self, kind: str, wanted: Mapping[str, Piece]) -> None:
        """Fill each wanted piece of the ``kind``, and read only what overlaps it."""
        missing = {name: piece.local.numel() for name, piece in wanted.items()}
        for file in self.files:
            if not file.startswith(f"{kind}-"):
                continue
            try:
                with safe_open(self.folder / file, framework="pt") as source:
                    offsets = json.loads(source.metadata()["offsets"])
                    for name in offsets.keys() & wanted.keys():
                        missing[name] -= _copy_overlap(source, name, offsets[name], wanted[name])
            except (OSError, SafetensorError) as error:
                raise self.refuse(file, f"cannot be read: {first_line(error)}") from error
        lacking = [name for name, number in missing.items() if number]
        if lacking:
            raise self.refuse(INDEX, f"names {lacking[0]!r}, of which the files hold only a part")


def _copy_overlap(source: Any, name: str, offsets: list[int], piece: Piece) -> int:
    """Copy what a file has of ``piece``, and return how many numbers that is."""
    if not offsets:
        piece.local.copy_(source.get_tensor(name))
        return 1
    stored = source.get_slice(name)
    theirs, ours = [], []
    for begin, length, own, size in zip(offsets, stored.get_shape(), piece.offsets, piece.local.shape, strict=True):
        low, high = max(begin, own), min(begin + length, own + size)
        if low >= high:
            return 0
        theirs.append(slice(low - begin, high - begin))
        ours.append(slice(low - own, high - own))
    target = piece.local[tuple(ours)]
    target.copy_(stored[tuple(theirs)])
    return target.numel()
