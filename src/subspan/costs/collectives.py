"""Counters of what ranks send to each other, at the moment when they send it.

On a fake process group one process stands for a world of any size.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from subspan.utils.errors import SettingError

_PAYLOAD = {
    # c10d's operation, our name for it, which argument is the payload
    "allreduce_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
}


def wire_share(operation: str, world: int) -> float:
    """Number of bytes that each rank sends for each byte of payload, under the ring algorithms.

    The payload of an all-gather is what comes out of it, and the payload of a reduce-scatter is what goes into it. A
    broadcast passes the payload on from rank to rank.
    """
    around = (world - 1) / world
    return {"all_reduce": 2 * around, "all_gather": around, "reduce_scatter": around, "broadcast": 1.0}[operation]


@dataclass
class Sent:
    """The payloads that were sent, by operation."""

    bytes: dict[str, int] = field(default_factory=dict)
    """Bytes of all payloads of an operation."""
    calls: dict[str, int] = field(default_factory=dict)
    """How often the operation was called."""

    def add(self, operation: str, size: int) -> None:
        """Count a call of ``operation`` with ``size`` bytes."""
        self.bytes[operation] = self.bytes.get(operation, 0) + size
        self.calls[operation] = self.calls.get(operation, 0) + 1

    def payload(self) -> int:
        """Bytes of the payloads of all operations."""
        return sum(self.bytes.values())

    def wire(self, world: int) -> float:
        """Bytes that each of ``world`` ranks sends."""
        return sum(size * wire_share(operation, world) for operation, size in self.bytes.items())

    def report(self, world: int) -> dict[str, Any]:
        """Everything that was counted, for JSON."""
        return {
            "payload_bytes": self.payload(),
            "wire_bytes": round(self.wire(world)),
            "collectives": {operation: [self.calls[operation], size] for operation, size in self.bytes.items()},
        }


class CountCollectives(TorchDispatchMode):
    """Counts every collective operation that is called under it, in ``sent``.

    Raises:
        NotImplementedError: an operation is called that it does not know.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = Sent()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (name := func._schema.name.partition("::")[2]) not in (
            "barrier",
            "monitored_barrier_",
        ):
            if name not in _PAYLOAD:
                raise NotImplementedError(f"collective operation {name!r} is not counted yet; add it to _PAYLOAD")
            operation, place = _PAYLOAD[name]
            tensors = [leaf for leaf in tree_leaves(args[place]) if isinstance(leaf, Tensor)]
            self.sent.add(operation, sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def fake_world(size: int) -> Iterator[None]:
    """Make a process group of ``size`` ranks in which this process is rank 0 and the other ranks do not exist.

    Nothing waits for the others. A sum over ranks is what rank 0 has, and what is gathered is copies of it.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise SettingError(
            f"world={size}: this process belongs to a process group already; count in a process of its own"
        )
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
