"""The only file that knows torch.distributed. In one process, on plain tensors, everything here does nothing.

A weight of ``fully_shard`` is a DTensor whose rows are spread over the ranks of its mesh. With a basis of its columns
each row of ``R = G Q`` belongs to one row of the weight, so every rank steps on its own rows, with its own part of the
moments, and with a basis that all ranks hold. What remains to be sent is a sum over rows, here and there, and the
basis.
"""

import functools
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from subspan.parts import ALL_HERE, Rows
from subspan.storage.allocation import State
from subspan.utils.errors import SettingError


class Ranks:
    """The ranks that hold a parameter: a mesh of any number of dimensions."""

    def __init__(self, groups: Sequence[Any], spread: Sequence[bool]) -> None:
        """A process group for each dimension of the mesh, and whether rows are spread along it."""
        self.groups, self.spread = groups, spread
        self.place = [dist.get_rank(group) for group in groups]
        self.sizes = [dist.get_world_size(group) for group in groups]

    @property
    def count(self) -> int:
        """How many ranks."""
        return functools.reduce(int.__mul__, self.sizes, 1)

    @property
    def index(self) -> int:
        """This rank's number among them."""
        return sum(place * stride for place, stride in zip(self.place, self._strides(), strict=True))

    def _strides(self) -> list[int]:
        return [functools.reduce(int.__mul__, self.sizes[d + 1 :], 1) for d in range(len(self.sizes))]

    def mean_(self, A: Tensor) -> Tensor:
        """Replace ``A`` by its mean over the ranks."""
        for group in self.groups:
            dist.all_reduce(A, group=group)
        return A.div_(self.count)

    def add_rows_(self, A: Tensor) -> Tensor:
        """Replace ``A``, a sum over the rows here, by the sum over all rows."""
        for group, size, spread in zip(self.groups, self.sizes, self.spread, strict=True):
            if spread and size > 1:
                dist.all_reduce(A, group=group)
        return A

    def send_(self, A: Tensor, owner: int) -> None:
        """Replace ``A`` on every rank by that of rank number ``owner``."""
        source = [owner // stride % size for stride, size in zip(self._strides(), self.sizes, strict=True)]
        # Along the last dimension first, among the ranks that share the owner's other places; then those send on.
        for d in reversed(range(len(self.groups))):
            if self.sizes[d] > 1 and self.place[:d] == source[:d]:
                dist.broadcast(A, group=self.groups[d], group_src=source[d])

    def usable(self, gradients: Sequence[Tensor]) -> list[bool]:
        """Whether each gradient, of which the rows here are given, is finite and not zero. Waits for the device."""
        flags = [torch.stack([(~G.isfinite()).any(), (G != 0).any()]) for G in gradients]
        bad, some = self.add_rows_(torch.stack(flags).to(torch.int32)).unbind(-1)
        usable: list[bool] = ((bad == 0) & (some > 0)).tolist()
        return usable

    def share_(self, state: State, keys: Sequence[str], others: Sequence[Tensor], owner: int) -> None:
        """Give every rank the owner's value of ``state[key]``, tensors and integers, and of the tensors ``others``."""
        tensors = [state[key] for key in keys if isinstance(state[key], Tensor)] + list(others)
        names = [key for key in keys if not isinstance(state[key], Tensor)]
        numbers = torch.tensor([state[key] for key in names], dtype=torch.int64, device=tensors[0].device)
        for tensor in (*tensors, numbers):
            self.send_(tensor, owner)
        state.update(zip(names, numbers.tolist(), strict=True))


class _ShardedRows(Rows):
    def __init__(self, ranks: Ranks, rows: int) -> None:
        self._ranks, self._rows = ranks, rows

    def total(self, A: Tensor) -> Tensor:
        return self._ranks.add_rows_(A.contiguous())

    def count(self, here: int) -> int:
        return self._rows


def mean_later(A: Tensor, group: Any, then: Callable[[Tensor], Tensor]) -> Any:
    """A future of ``then`` of the mean of ``A`` over the ranks of ``group``. ``A`` is overwritten."""
    work = dist.all_reduce(A.div_(dist.get_world_size(group)), group=group, async_op=True)
    return work.get_future().then(lambda _: then(A))


def global_norm(squares: Sequence[tuple[Any, Tensor]]) -> float:
    """The norm of all gradients, of each parameter given the square of that of its rows here. Waits for the device."""
    by_mesh: dict[Any, list[tuple[Any, Tensor]]] = {}
    for p, square in squares:
        by_mesh.setdefault(mesh_of(p) if is_sharded(p) else None, []).append((p, square))
    totals = [
        ranks_of(some[0][0]).add_rows_(torch.stack([square for _, square in some]).sum().reshape(1))
        for some in by_mesh.values()
    ]
    return float(torch.stack([total.squeeze(0).cpu() for total in totals]).sum().sqrt())


def is_sharded(A: object) -> bool:
    """Whether ``A`` is a DTensor."""
    # Importing it takes seconds; where nobody has, there is none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(A, module.DTensor)


def ranks_of(p: Any, process_group: Any = None) -> Ranks:
    """Return the ranks that hold ``p``: those of its mesh if it is a DTensor, else those of ``process_group``, each
    with a copy; without one ``p`` is this process's own.

    That other processes exist says nothing: they may train other models, or other stages of a pipeline.
    """
    if is_sharded(p):
        mesh = p.device_mesh
        sharded = [not placed.is_replicate() for placed in p.placements]
        return Ranks([mesh.get_group(d) for d in range(mesh.ndim)], sharded)
    return Ranks([], []) if process_group is None else Ranks([process_group], [False])


def several_processes() -> bool:
    """Tell whether this process has joined a process group, whatever for."""
    return dist.is_available() and dist.is_initialized()


def wrapping_process_group() -> Any:
    """Return the process group of the DistributedDataParallel whose forward pass is running, or ``None``."""
    if not several_processes():
        return None
    from torch.nn.parallel import DistributedDataParallel

    # The wrapper leaves no other mark on the model that it wraps. torch's compiler asks the same question in this way.
    wrapper: Any = DistributedDataParallel._get_active_ddp_module()
    return None if wrapper is None else wrapper.process_group


def rows_of(p: Any, dimensions: int) -> Rows:
    """The rows of ``p``, seen as a vector (1), a matrix (2) or a stack of them (3), which are whole wherever they
    are.
    """
    return _ShardedRows(ranks_of(p), p.shape[0]) if is_sharded(p) and dimensions in (1, 2) else ALL_HERE


def local(A: Any) -> Any:
    """The rows of ``A`` that are here; ``A`` itself if it is no DTensor."""
    return A.to_local() if is_sharded(A) else A


def local_state(state: State) -> State:
    """``state`` with the rows that are here: the same memory. A dict of its own if there is a DTensor among its
    values.
    """
    return {key: local(value) for key, value in state.items()} if any(map(is_sharded, state.values())) else state


def shard_state(p: Any, here: State, grown: Collection[str]) -> State:
    """The state of ``p``, of which ``here`` is this rank's part: DTensors for what has a row for each row of ``p``.

    Args:
        grown: the names of those; with ``.codes`` and ``.absmax`` if they are in 8 bits.
    """
    from torch.distributed.tensor import DTensor

    def whole(value: Tensor) -> Tensor:
        shape = torch.Size((p.shape[0], *value.shape[1:]))
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(value, p.device_mesh, p.placements, run_check=False, shape=shape, stride=strides)

    return {
        key: whole(value) if key.removesuffix(".codes").removesuffix(".absmax") in grown else value
        for key, value in here.items()
    }


def placed_as(own: State, saved: Mapping[str, Any]) -> dict[str, Any]:
    """``saved`` with each tensor spread, or whole, as its namesake in ``own``."""

    def placed(ours: Any, theirs: Any) -> Any:
        if is_sharded(ours) and not is_sharded(theirs):
            from torch.distributed.tensor import distribute_tensor

            # Every rank has loaded it, so nothing is sent.
            return distribute_tensor(
                torch.as_tensor(theirs).to(ours.device), ours.device_mesh, ours.placements, src_data_rank=None
            )
        return theirs.full_tensor() if is_sharded(theirs) and not is_sharded(ours) else theirs

    return {key: placed(own.get(key), value) for key, value in saved.items()}


def mesh_of(p: Any) -> Any:
    """What tells apart the ranks that hold ``p`` and how: to be compared."""
    return p.device_mesh, p.placements


def place_of(p: Any) -> tuple[int, ...]:
    """What tells this rank's rows of ``p`` from those of other ranks."""
    if not is_sharded(p):
        return ()
    ranks = ranks_of(p)
    return tuple(place for place, spread in zip(ranks.place, ranks.spread, strict=True) if spread)


def local_gradient(p: Any, name: str) -> Tensor:
    """The rows of the gradient of ``p`` that are here."""
    if p.grad.layout != torch.strided:
        raise SettingError(
            f"gradient of {name!r}: layout {p.grad.layout} is not supported; use dense gradients (sparse=False)"
        )
    if is_sharded(p) and (not is_sharded(p.grad) or p.grad.placements != p.placements):
        raise SettingError(
            f"gradient of {name!r}: {getattr(p.grad, 'placements', 'not on a mesh')}, but the parameter is "
            f"{p.placements}; "
            "reduce it first, as fully_shard does in the backward pass"
        )
    gradient: Tensor = local(p.grad)
    return gradient


def check_placement(p: Any, name: str) -> None:
    """Raise unless each rank holds whole rows of ``p``, or all of it."""
    if is_sharded(p) and not all(placed.is_replicate() or placed.is_shard(0) for placed in p.placements):
        raise SettingError(
            f"{name}: placed as {p.placements} on its mesh; a basis of the columns needs whole rows: shard dimension "
            "0, as "
            "fully_shard does"
        )
