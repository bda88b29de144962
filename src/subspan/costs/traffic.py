"""Bytes that a training step sends, in closed form: from shapes, rank and world alone.

Weights are ``W (out, inputs)``, a basis compresses the side ``n`` to rank ``r``.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from subspan.costs.collectives import Sent
from subspan.costs.llama import Layer, Llama, padded
from subspan.linalg import spectral_dtype
from subspan.step.layout import layout_of

PERIOD = 200


@dataclass(frozen=True)
class Way:
    """How a step is taken."""

    optimizer: str
    sharded: bool = False
    backward_side: bool = False
    hook: bool = False

    @property
    def proj_type(self) -> str:
        """Sharded rows want a basis of the columns."""
        return "right" if self.sharded else "std"


WAYS = {
    "adamw_ddp": Way("adamw"),
    "sara_ddp_hook": Way("sara_adamw", hook=True),
    "sara_backward_ddp": Way("sara_adamw", backward_side=True),
    "adamw_fsdp": Way("adamw", sharded=True),
    "sara_fsdp": Way("sara_adamw", sharded=True),
    "sara_backward_fsdp": Way("sara_adamw", sharded=True, backward_side=True),
}


@dataclass(frozen=True)
class Traffic:
    """What each rank takes part in sending."""

    model: Llama
    rank: int
    world: int
    way: Way
    width: int = 4
    """Bytes of a number of a gradient as it is reduced."""
    gathered_width: int = 4
    """Of a weight as ``fully_shard`` gathers it."""
    select_from: Literal["owner", "mean"] = "owner"
    device: torch.device = torch.device("cpu")
    """What a Gram matrix is made on, which decides its precision."""

    def step(self) -> Sent:
        """An ordinary step."""
        sent = Sent()
        if self.way.sharded:
            for operation, size in self._sharded():
                sent.add(operation, size)
        else:
            sent.add("all_reduce", self.width * self._gradients())
            sent.add("broadcast", 4 * self.model.buffers)
        return sent

    def refresh(self) -> Sent:
        """A step in which every basis is chosen anew. Backward-side layers send R in it too."""
        sent = self.step()
        if self.way.optimizer == "adamw":
            return sent
        if self.way.backward_side:
            for group in self.model.sharing * self.model.layers:
                if self.select_from == "mean":
                    sent.add(
                        "all_reduce", self.width * sum(layer.numel for layer in group)
                    )  # the gradient of all of them
                sent.add("broadcast", self._basis(group[0].inputs))
        elif self.way.sharded:
            for layer in self.model.block * self.model.layers:
                if (n := self.compressed(layer)) is not None:
                    sent.add("all_reduce", spectral_dtype(self.device, n).itemsize * n * n)
                    sent.add("broadcast", self._basis(n))
        else:  # whole gradients, and each rank chooses the same basis from them
            sent.bytes["all_reduce"] = self.width * self.model.numel
        return sent

    def zeros(self) -> int:
        """Bytes of the step's all-gathers that are zeros: carriers are parameters, and ``fully_shard`` gathers those
        too.
        """
        carriers = sum(padded((layer.out, self.rank), self.world) for layer in self.model.block)
        return (
            2 * self.gathered_width * carriers * self.model.layers if self.way.sharded and self.way.backward_side else 0
        )

    def compressed(self, layer: Layer) -> int | None:
        """The side that the optimizer compresses; ``None`` of a layer that it does not project."""
        side = layout_of((layer.out, layer.inputs), self.rank, self.way.proj_type).side
        return None if side is None else layer.inputs if side == "right" else layer.out

    def _basis(self, n: int) -> int:
        """Bytes of a basis, of its product with the last one, and of two integers."""
        return 4 * n * self.rank + 4 * self.rank**2 + 16

    def _gradients(self) -> int:
        """Numbers that data-parallel ranks average: G, or R in its place."""
        model = self.model
        outside = sum(map(math.prod, model.outside)) + model.layers * sum(map(math.prod, model.block_vectors))
        return outside + model.layers * sum(map(self._gradient, model.block))

    def _gradient(self, layer: Layer) -> int:
        if self.way.backward_side:
            return layer.out * self.rank
        n = self.compressed(layer) if self.way.hook else None
        return layer.numel if n is None else layer.numel // n * self.rank

    def _sharded(self) -> Iterator[tuple[str, int]]:
        """What ``fully_shard`` sends: blocks are gathered in the forward and in the backward pass, what is outside of
        them
        once; gradients are reduced as they come. Frozen weights have none."""
        model = self.model
        vectors = sum(padded(shape, self.world) for shape in model.block_vectors)
        weights = sum(padded((layer.out, layer.inputs), self.world) for layer in model.block)
        carriers = (
            sum(padded((layer.out, self.rank), self.world) for layer in model.block) if self.way.backward_side else 0
        )
        outside = sum(padded(shape, self.world) for shape in model.outside)
        yield "all_gather", self.gathered_width * (2 * model.layers * (weights + carriers + vectors) + outside)
        yield "reduce_scatter", self.width * (model.layers * ((carriers or weights) + vectors) + outside)


def amortised(step: float, refresh: float, period: float = PERIOD) -> float:
    """The mean over a period."""
    return step + (refresh - step) / period
