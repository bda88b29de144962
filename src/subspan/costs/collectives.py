"""What is sent between ranks, counted as it is sent: on a fake process group one process stands for a world of any
size.
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
    """Bytes that each rank sends, for each byte of payload, under the ring algorithms.

    The payload of an all-gather is what comes out of it, that of a reduce-scatter what goes in. A broadcast passes the
    payload on from rank to rank.
    """
    around = (world - 1) / world
    return {"all_reduce": 2 * around, "all_gather": around, "reduce_scatter": around, "broadcast": 1.0}[operation]


@dataclass
class Sent:
    """Payloads in bytes, by operation."""

    bytes: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def add(self, operation: str, size: int) -> None:
        """Count a call of ``operation`` with ``size`` bytes."""
        self.bytes[operation] = self.bytes.get(operation, 0) + size
        self.calls[operation] = self.calls.get(operation, 0) + 1

    def payload(self) -> int:
        """Of all operations."""
        return sum(self.bytes.values())

    def wire(self, world: int) -> float:
        """Bytes that each of ``world`` ranks sends."""
        return sum(size * wire_share(operation, world) for operation, size in self.bytes.items())

    def report(self, world: int) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "payload_bytes": self.payload(),
            "wire_bytes": round(self.wire(world)),
            "collectives": {operation: [self.calls[operation], size] for operation, size in self.bytes.items()},
        }


class CountCollectives(TorchDispatchMode):
    """Counts every collective operation under it in ``sent``.

    Raises:
        NotImplementedError: an operation that it does not know.
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
    """A process group of ``size`` ranks of which this process is rank 0 and the others are not there: nothing is waited
    for,
    a sum is what rank 0 has, and everything gathered is copies of it."""
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
