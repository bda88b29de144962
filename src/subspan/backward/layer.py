"""The layer: ``nn.Linear`` with a frozen weight and a carrier."""

from typing import Any

import torch
from torch import Tensor, nn

from subspan.backward.autograd import linear
from subspan.backward.projection import Projection
from subspan.step.carriers import mark


class BackwardLinear(nn.Linear):
    """``y = x Wᵀ + (x Q) Bᵀ + b`` with ``W`` frozen and the carrier ``B (out, r)``, which is zero or a displacement.

    The gradient of ``B`` is ``R = dyᵀ (x Q)``, the projection of that of ``W``. It takes neither ``x``, which is not
    saved, nor the full gradient. Made of an ``nn.Linear`` in place, by ``project_backward``.

    A ``state_dict`` holds the weight under its own name, displacement included, and no carrier.
    """

    carrier: nn.Parameter
    projection: Projection
    number: int
    weight_name: str

    def enter(self, projection: Projection, weight_name: str) -> None:
        """Become one of the layers of ``projection``."""
        self.projection, self.number, self.weight_name = projection, len(projection.layers), weight_name
        projection.layers.append(self)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.weight.requires_grad_(False)
        self.carrier = nn.Parameter(
            torch.zeros(self.out_features, projection.rank, dtype=dtype, device=self.weight.device)
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "carrier":  # fully_shard puts another in its place
            mark(value, self)

    def leave(self) -> None:
        """Become an ``nn.Linear`` again; the displacement is in the weight by then."""
        del self.carrier, self.projection, self.number, self.weight_name
        self.__class__ = nn.Linear  # type: ignore[assignment]
        self.weight.requires_grad_(True)

    def forward(self, input: Tensor) -> Tensor:  # named as nn.Linear names it, for who passes it by name
        if torch.is_grad_enabled() and self.carrier.requires_grad:
            return self._train(input)
        y = super().forward(input)
        return y + self.projection.moved(input, self).to(y.dtype) if self.projection.displaced else y

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the basis may change on the way, and what is saved depends on it
    def _train(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            entered, part = self.projection.take(self.number, x, dtype)
            moved = self.carrier if self.projection.displaced else None
            return linear(entered, self.weight, self.bias, part, moved, self.projection.back)

    # --- as a plain linear layer --------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}carrier"]
        if self.projection.displaced:  # merged in what is saved alone: saving must not change the run
            weight = self.weight.detach()
            destination[f"{prefix}weight"] = (weight + self.projection.displacement(self)).to(weight.dtype)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        errors = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys[:] = [key for key in missing_keys if key != f"{prefix}carrier"]
        if f"{prefix}weight" in state_dict and len(error_msgs) == errors:  # the displacement was of the old weight
            with torch.no_grad():
                self.carrier.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.projection.fold_copy()  # its basis is not among what is moved
        super()._apply(fn, recurse)
        if self.carrier.dtype in (torch.bfloat16, torch.float16):  # steps add up in it, in fp32, whatever the weight is
            self.carrier.data = self.carrier.data.float()
        mark(self.carrier, self)  # of a DTensor another parameter is made
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        mark(self.carrier, self)  # a copied parameter has lost it

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.projection.rank}, share={len(self.projection.layers)}"
