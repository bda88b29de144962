"""What the step asks of torch.distributed. No other file of the step knows it.

In one process, on plain tensors, everything here does nothing.

A weight of ``fully_shard`` is a DTensor whose rows are sharded over the ranks of its mesh. With a basis of its columns,
each row of ``R = G Q`` belongs to one row of the weight. So every rank steps on its own rows, with its own part of the
moments and with a basis that all ranks hold. Only the basis and a few sums over rows must be sent.
"""

import functools
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from subspan.parts import ALL_HERE, Rows
from subspan.storage.allocation import State
from subspan.utils.errors import SettingError


class Ranks:
    """The ranks that hold a parameter: a mesh of any number of dimensions.

    Args:
        groups: a process group for each dimension of the mesh.
        sharded: whether the rows are sharded along each dimension. Otherwise every rank along it has a copy.
    """

    def __init__(self, groups: Sequence[Any], sharded: Sequence[bool]) -> None:
        self.groups, self.sharded = groups, sharded
        self.place = [dist.get_rank(group) for group in groups]
        self.sizes = [dist.get_world_size(group) for group in groups]

    @property
    def count(self) -> int:
        """Number of ranks."""
        return functools.reduce(int.__mul__, self.sizes, 1)

    @property
    def index(self) -> int:
        """Number of this rank among them."""
        return sum(place * stride for place, stride in zip(self.place, self._strides(), strict=True))

    def _strides(self) -> list[int]:
        return [functools.reduce(int.__mul__, self.sizes[d + 1 :], 1) for d in range(len(self.sizes))]

    def mean_(self, A: Tensor) -> Tensor:
        """Replace ``A`` by its mean over the ranks."""
        for group in self.groups:
            dist.all_reduce(A, group=group)
        return A.div_(self.count)

    def add_rows_(self, A: Tensor) -> Tensor:
        """Replace ``A``, a sum over the local rows, by the sum over all rows."""
        for group, size, sharded in zip(self.groups, self.sizes, self.sharded, strict=True):
            if sharded and size > 1:
                dist.all_reduce(A, group=group)
        return A

    def send_(self, A: Tensor, owner: int) -> None:
        """Replace ``A`` on every rank by the ``A`` of rank number ``owner``."""
        source = [owner // stride % size for stride, size in zip(self._strides(), self.sizes, strict=True)]
        # Along the last dimension first, among the ranks that share the owner's other places. Then these send it on.
        for d in reversed(range(len(self.groups))):
            if self.sizes[d] > 1 and self.place[:d] == source[:d]:
                dist.broadcast(A, group=self.groups[d], group_src=source[d])

    def usable(self, gradients: Sequence[Tensor]) -> list[bool]:
        """Tell whether each gradient is finite and not zero, given its local rows. Waits for the device."""
        flags = [torch.stack([(~G.isfinite()).any(), (G != 0).any()]) for G in gradients]
        bad, some = self.add_rows_(torch.stack(flags).to(torch.int32)).unbind(-1)
        usable: list[bool] = ((bad == 0) & (some > 0)).tolist()
        return usable

    def share_(self, state: State, keys: Sequence[str], others: Sequence[Tensor], owner: int) -> None:
        """Give every rank the owner's ``others``, and the owner's ``state[key]``, tensor or integer, of each key."""
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

    def count(self, local: int) -> int:
        return self._rows


def mean_later(A: Tensor, group: Any, then: Callable[[Tensor], Tensor]) -> Any:
    """Return a future of ``then(mean)``, the mean of ``A`` over the ranks of ``group``. ``A`` is overwritten."""
    work = dist.all_reduce(A.div_(dist.get_world_size(group)), group=group, async_op=True)
    return work.get_future().then(lambda _: then(A))


def global_norm(squares: Sequence[tuple[Any, Tensor]]) -> float:
    """Return the norm of all gradients. Waits for the device.

    Args:
        squares: each parameter, with the squared norm of its gradient's local rows.
    """
    by_mesh: dict[Any, list[tuple[Any, Tensor]]] = {}
    for p, square in squares:
        by_mesh.setdefault(mesh_of(p) if is_sharded(p) else None, []).append((p, square))
    totals = [
        ranks_of(some[0][0]).add_rows_(torch.stack([square for _, square in some]).sum().reshape(1))
        for some in by_mesh.values()
    ]
    return float(torch.stack([total.squeeze(0).cpu() for total in totals]).sum().sqrt())


def is_sharded(A: object) -> bool:
    """Tell whether ``A`` is a DTensor."""
    # To import DTensor takes seconds. If nobody has imported it, there is none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(A, module.DTensor)


def ranks_of(p: Any, process_group: Any = None) -> Ranks:
    """Return the ranks that hold ``p``.

    They are those of its mesh if it is a DTensor, and otherwise those of ``process_group``, each with a copy. Without a
    process group only this process holds ``p``. Other processes may exist, but they may train other models, or other
    stages of a pipeline.
    """
    if is_sharded(p):
        mesh = p.device_mesh
        sharded = [not placed.is_replicate() for placed in p.placements]
        return Ranks([mesh.get_group(d) for d in range(mesh.ndim)], sharded)
    return Ranks([], []) if process_group is None else Ranks([process_group], [False])


def several_processes() -> bool:
    """Tell whether this process has joined a process group, for whatever purpose."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if several_processes() else 1


def running_wrapper() -> Any:
    """Return the DistributedDataParallel whose forward pass is running, or ``None``."""
    if not several_processes():
        return None
    from torch.nn.parallel import DistributedDataParallel

    # The wrapper leaves no other mark on the model that it wraps. torch's compiler asks in the same way.
    return DistributedDataParallel._get_active_ddp_module()


def averages(wrapper: Any, parameters: Iterable[Tensor]) -> bool:
    """Tell whether a DistributedDataParallel averages any of ``parameters``; another model's may be running."""
    averaged = {id(p) for p in wrapper.parameters()}
    return any(id(p) in averaged for p in parameters)


def rows_of(p: Any, dimensions: int) -> Rows:
    """Return the rows of ``p``, seen as a vector (1), a matrix (2) or a stack of matrices (3).

    The matrices of a stack are never divided, so each has all of its rows on one rank.
    """
    return _ShardedRows(ranks_of(p), p.shape[0]) if is_sharded(p) and dimensions in (1, 2) else ALL_HERE


def local(A: Any) -> Any:
    """Return the local rows of ``A``; ``A`` itself if it is no DTensor."""
    return A.to_local() if is_sharded(A) else A


def local_state(state: State) -> State:
    """Return ``state`` with the local rows of its tensors, in the same memory.

    It is a new dict if a value is a DTensor, and ``state`` itself otherwise.
    """
    return {key: local(value) for key, value in state.items()} if any(map(is_sharded, state.values())) else state


def shard_state(p: Any, own: State, grown: Collection[str]) -> State:
    """Return the state of ``p``, given this rank's part of it. What has a row for each row of ``p`` becomes a DTensor.

    Args:
        p: the parameter, a DTensor.
        own: this rank's part of the state.
        grown: names of the entries with a row for each row of ``p``. In 8 bits they end in ``.codes`` and ``.absmax``.
    """
    from torch.distributed.tensor import DTensor

    def whole(value: Tensor) -> Tensor:
        shape = torch.Size((p.shape[0], *value.shape[1:]))
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(value, p.device_mesh, p.placements, run_check=False, shape=shape, stride=strides)

    return {
        key: whole(value) if key.removesuffix(".codes").removesuffix(".absmax") in grown else value
        for key, value in own.items()
    }


def placed_like(p: Any, own: Tensor) -> Tensor:
    """Return ``own``, this rank's part of a tensor with the shape of ``p``, placed as ``p`` is."""
    if not is_sharded(p):
        return own
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(own, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def placed_as(own: State, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``saved`` with each tensor sharded or whole, as the entry of the same name in ``own``."""

    def placed(ours: Any, theirs: Any) -> Any:
        if is_sharded(ours) and not is_sharded(theirs):
            from torch.distributed.tensor import distribute_tensor

            # Every rank has loaded the tensor, so nothing is sent.
            return distribute_tensor(
                torch.as_tensor(theirs).to(ours.device), ours.device_mesh, ours.placements, src_data_rank=None
            )
        return theirs.full_tensor() if is_sharded(theirs) and not is_sharded(ours) else theirs

    return {key: placed(own.get(key), value) for key, value in saved.items()}


def mesh_of(p: Any) -> Any:
    """Return the mesh and the placements of ``p``. They are equal for parameters that the same ranks hold alike."""
    return p.device_mesh, p.placements


def place_of(p: Any) -> tuple[int, ...]:
    """Return the place of this rank along the dimensions over which ``p`` is sharded; it tells ranks' rows apart."""
    if not is_sharded(p):
        return ()
    ranks = ranks_of(p)
    return tuple(place for place, sharded in zip(ranks.place, ranks.sharded, strict=True) if sharded)


def local_gradient(p: Any, name: str) -> Tensor:
    """Return the local rows of the gradient of ``p``."""
    if p.grad.layout != torch.strided:
        raise SettingError(
            f"gradient of {name!r}: layout {p.grad.layout} is not supported; use dense gradients (sparse=False)"
        )
    if is_sharded(p) and (not is_sharded(p.grad) or p.grad.placements != p.placements):
        raise SettingError(
            f"gradient of {name!r}: {getattr(p.grad, 'placements', 'not on a mesh')}, but the parameter is "
            f"{p.placements}; reduce it first, as fully_shard does in the backward pass"
        )
    gradient: Tensor = local(p.grad)
    return gradient


def check_placement(p: Any, name: str) -> None:
    """Raise unless each rank holds whole rows of ``p``, or all of it."""
    if is_sharded(p) and not all(placed.is_replicate() or placed.is_shard(0) for placed in p.placements):
        raise SettingError(
            f"{name}: placed as {p.placements} on its mesh; a basis of the columns needs whole rows: shard dimension "
            "0, as fully_shard does"
        )
