"""A backward-side layer: ``nn.Linear`` with a frozen weight and a carrier."""

from typing import Any

import torch
from torch import Tensor, nn

from subspan.backward.autograd import linear
from subspan.backward.projection import Projection
from subspan.distributed import is_sharded, several_processes
from subspan.step.carriers import mark
from subspan.utils.compiler import untraced


class BackwardLinear(nn.Linear):
    """``y = x Wᵀ + (x Q) Bᵀ + b`` with ``W`` frozen and the carrier ``B (out, r)``, which is zero or a displacement.

    The gradient of ``B`` is ``R = dyᵀ (x Q)``, the projection of the gradient of ``W``. To compute it, the full
    gradient is not formed. Nor is ``x`` saved, unless bases of their own would save more of it.
    ``project_backward`` makes such a layer of an ``nn.Linear``, in place.

    With a sketch the carrier has ``s`` more columns, for whose sake its gradient is ``[R T] = dyᵀ (x [Q O])``. They are
    always zero.

    A ``state_dict`` holds no carrier. It holds the weight under its own name, with the displacement added.
    """

    carrier: nn.Parameter
    projection: Projection
    number: int
    weight_name: str

    def join(self, projection: Projection, weight_name: str) -> None:
        """Become one of the layers of ``projection``."""
        self.projection, self.number, self.weight_name = projection, len(projection.layers), weight_name
        projection.layers.append(self)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.weight.requires_grad_(False)
        self.carrier = nn.Parameter(
            torch.zeros(self.out_features, projection.columns, dtype=dtype, device=self.weight.device)
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "carrier":  # fully_shard puts another parameter in its place
            mark(value, self)
            self._note_shard()

    def _note_shard(self) -> None:
        if is_sharded(self.carrier):  # past nn.Module, which would register it once more
            self.__dict__["shard"] = self.carrier

    @property
    def home(self) -> nn.Parameter:
        """The carrier that an optimizer holds: the shard, where ``fully_shard`` has gathered it for a pass."""
        shard: nn.Parameter | None = self.__dict__.get("shard")
        return self.carrier if shard is None else shard

    def leave(self) -> None:
        """Become an ``nn.Linear`` again. The displacement must be in the weight already."""
        self.__dict__.pop("shard", None)
        del self.carrier, self.projection, self.number, self.weight_name
        self.__class__ = nn.Linear  # type: ignore[assignment]
        self.weight.requires_grad_(True)

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Linear has, for calls by keyword
        if several_processes():
            self.projection.note_wrapper()
        if torch.is_grad_enabled() and self.carrier.requires_grad:
            return self._train(input)
        y = super().forward(input)
        return y + self.projection.moved(input, self).to(y.dtype) if self.projection.displaced else y

    @untraced  # the basis may change in it, and what is saved depends on that
    def _train(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):
            entered, layer_pass = self.projection.join_pass(self.number, x, dtype)
            moved = self.projection.displaced_by(self) if self.projection.displaced else None
            return linear(entered, self.weight, self.bias, layer_pass, moved, self.projection)

    # --- as a plain linear layer --------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}carrier"]
        if self.projection.displaced:  # merged only in what is saved, because saving must not change the run
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
        if f"{prefix}weight" in state_dict and len(error_msgs) == errors:  # the displacement belonged to the old weight
            with torch.no_grad():
                self.carrier.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.projection.fold_copy()  # the basis of a copy is not moved with it
        super()._apply(fn, recurse)
        # Steps add up in the carrier in fp32, whatever the dtype of the weight.
        if self.carrier.dtype in (torch.bfloat16, torch.float16):
            self.carrier.data = self.carrier.data.float()
        mark(self.carrier, self)  # for a DTensor, another parameter has been made
        self._note_shard()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        mark(self.carrier, self)  # a copied parameter has lost the mark

    def extra_repr(self) -> str:
        sketch = f", sketch={self.projection.sketch_width}" if self.projection.sketch_width else ""
        return f"{super().extra_repr()}, rank={self.projection.rank}{sketch}, share={len(self.projection.layers)}"
