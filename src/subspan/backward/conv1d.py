"""A backward-side layer with a weight ``(in, out)``: transformers' ``Conv1D``, the linear layer of GPT-2."""

from typing import Any

from torch import Tensor, nn

from subspan.backward.layer import BackwardLinear
from subspan.backward.projection import Projection
from subspan.distributed import is_sharded
from subspan.utils.errors import SettingError


class BackwardConv1D(BackwardLinear):
    """``y = x W + (x Q) Bᵀ + b`` with ``W (in, out)`` frozen and the carrier ``B (out, r)``.

    Everything works on ``weight (out, in)``, which is a view of the parameter. The parameter itself, and so what is
    saved, stays ``(in, out)``. ``project_backward`` makes such a layer of a ``Conv1D``, in place.
    """

    _was: type[nn.Module]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The frozen weight ``(out, in)``, in the memory of the parameter."""
        p = self._parameters["weight"]
        assert p is not None
        return p.mT

    def join(self, projection: Projection, weight_name: str) -> None:
        p = self._parameters["weight"]
        assert p is not None
        p.requires_grad_(False)
        self.in_features, self.out_features = p.shape
        super().join(projection, weight_name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "carrier" and isinstance(value, Tensor) and is_sharded(value):
            raise SettingError(
                f"{self.weight_name}: fully_shard shards the rows of a weight, which are the inputs of a Conv1D, and a "
                "backward-side layer needs all inputs; leave project_backward out, or shard models of nn.Linear"
            )
        super().__setattr__(name, value)

    def leave(self) -> None:
        was, p = self._was, self._parameters["weight"]
        assert p is not None
        super().leave()
        del self.in_features, self.out_features, self._was
        self.__class__ = was  # type: ignore[assignment]
        p.requires_grad_(True)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.projection.displaced:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].mT.contiguous()


def convert(layer: nn.Module) -> BackwardLinear:
    """Make a backward-side layer of an ``nn.Linear`` or a ``Conv1D``, in place. It has joined no projection yet."""
    if isinstance(layer, nn.Linear):
        layer.__class__ = BackwardLinear
    else:
        was = type(layer)
        layer.__class__ = BackwardConv1D
        layer._was = was  # type: ignore[assignment]
    assert isinstance(layer, BackwardLinear)
    return layer
