"""A counter of what a forward pass keeps for the backward pass. It counts storages, on any device."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class SavedBytes:
    """Counts the bytes that autograd saves for the backward pass, without those of parameters and buffers.

    Use it around the forward pass. ``total`` is everything, ``by_layers`` is what ``layers`` save. Each of the two
    counts a storage once; what ``layers`` save others may save too.
    """

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module], also_held: Iterable[Tensor] = ()) -> None:
        """Count for ``model``, leaving out its tensors and those of ``also_held``."""
        self.total = self.by_layers = 0
        # The storages are kept, so that no address is used twice while this counts.
        self._kept: dict[int, Any] = {}
        self._kept_by_layers: set[int] = set()
        self._held = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers(), *also_held)}
        self._inside = 0
        self._layers = list(layers)

    def __enter__(self) -> "SavedBytes":
        def enter(*_: Any) -> None:
            self._inside += 1

        def leave(*_: Any) -> None:
            self._inside -= 1

        self._hooks = [
            h
            for layer in self._layers
            for h in (layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave))
        ]
        self._saved = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._saved.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._saved.__exit__(*exception)
        for hook in self._hooks:
            hook.remove()
        self._kept.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return tensor
        if key not in self._kept:
            self._kept[key] = storage
            self.total += storage.nbytes()
        if self._inside and key not in self._kept_by_layers:
            self._kept_by_layers.add(key)
            self.by_layers += storage.nbytes()
        return tensor
