"""A counter of the tensors that are alive during a step. It counts storages, on any device."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensor storages that are alive, and their peak after any operation.

    The count is exact, except for what an operation allocates and frees within itself. The workspace of a factorisation
    is an example.
    """

    def __init__(self, held: Iterable[Tensor], device: str | None = None) -> None:
        """Start with the tensors that are there before.

        Args:
            held: those tensors.
            device: kind of the device whose tensors count; ``None`` counts the tensors of every device.
        """
        super().__init__()
        self._device = device
        self._storages: dict[int, Any] = {}  # a reference to each storage alive, which says when it has gone
        self.now = self.peak = 0
        for tensor in held:
            self._add(tensor)
        self.peak = self.now

    def _add(self, tensor: Tensor) -> None:
        if self._device not in (None, tensor.device.type):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _: self._drop(key, size))
            self.now += size

    def _drop(self, key: int, size: int) -> None:
        if self._storages.pop(key, None) is not None:
            self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        self.peak = max(self.peak, self.now)
        return out
