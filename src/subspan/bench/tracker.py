"""What lives in memory during a step, counted storage by storage, on any device."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensor storages alive, and their peak after any operation.

    Exact but for what an operation allocates and frees within itself, such as the workspace of a factorisation.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        """``held``: what is there before."""
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.peak = 0
        for tensor in held:
            self._add(tensor)
        self.peak = self.now

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata not in self._storages:
            self._storages[reference.cdata] = (reference, storage.nbytes())
            self.now += storage.nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        if self.now > self.peak:  # only then does it matter what has gone meanwhile
            self._drop_dead()
            self.peak = max(self.peak, self.now)
        return out

    def _drop_dead(self) -> None:
        for key, (reference, size) in list(self._storages.items()):
            if reference.expired():
                del self._storages[key]
                self.now -= size
