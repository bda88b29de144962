"""The bytes that a training step sends, in closed form. They follow from shapes, rank and world.

Weights are ``W (out, inputs)``. A basis compresses the side ``n`` to rank ``r``.
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
"""Steps between two refreshes, over which what a refresh costs is averaged."""


@dataclass(frozen=True)
class Way:
    """A way to take a step: the optimizer, and what the ranks share."""

    optimizer: str
    sharded: bool = False
    """Whether ``fully_shard`` shards the parameters; otherwise each rank has all of them, as under DDP."""
    backward_side: bool = False
    """Whether the backward pass makes the low-rank gradient."""
    hook: bool = False
    """Whether DDP sends R in place of G (``subspan.ddp.register``)."""

    @property
    def proj_type(self) -> str:
        """The side to compress: sharded rows need a basis of the columns."""
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
    """The collective operations of a step, and their payloads."""

    model: Llama
    rank: int
    world: int
    way: Way
    width: int = 4
    """Bytes of one number of a gradient when it is reduced."""
    gathered_width: int = 4
    """Bytes of one number of a weight when ``fully_shard`` gathers it."""
    select_from: Literal["owner", "mean"] = "owner"
    """Gradient that chooses the basis of backward-side layers: that of one rank, or the mean over all."""
    device: torch.device = torch.device("cpu")
    """Where a Gram matrix is made, which decides its precision."""

    def step(self) -> Sent:
        """What an ordinary step sends."""
        sent = Sent()
        if self.way.sharded:
            for operation, size in self._sharded():
                sent.add(operation, size)
        else:
            sent.add("all_reduce", self.width * self._gradients())
            sent.add("broadcast", 4 * self.model.buffers)
        return sent

    def refresh(self) -> Sent:
        """What a step sends in which every basis is chosen again. Backward-side layers send R in it too."""
        sent = self.step()
        if self.way.optimizer == "adamw":
            return sent
        if self.way.backward_side:
            for group in self.model.sharing * self.model.layers:
                if self.select_from == "mean":  # the gradients of all layers of the group
                    sent.add("all_reduce", self.width * sum(layer.numel for layer in group))
                sent.add("broadcast", self._basis(group[0].inputs))
        elif self.way.sharded:
            for layer in self.model.block * self.model.layers:
                if (n := self.compressed(layer)) is not None:
                    sent.add("all_reduce", spectral_dtype(self.device, n).itemsize * n * n)
                    sent.add("broadcast", self._basis(n))
        else:  # gradients are sent whole, and each rank chooses the same basis from them
            sent.bytes["all_reduce"] = self.width * self.model.numel
        return sent

    def zeros(self) -> int:
        """Number of bytes in the all-gathers of a step that are zeros.

        Carriers hold zeros. They are parameters, so ``fully_shard`` gathers them too.
        """
        carriers = sum(padded((layer.out, self.rank), self.world) for layer in self.model.block)
        gathered = self.way.sharded and self.way.backward_side
        return 2 * self.gathered_width * carriers * self.model.layers if gathered else 0

    def compressed(self, layer: Layer) -> int | None:
        """Length of the side that the optimizer compresses; ``None`` for a layer that it does not project."""
        side = layout_of((layer.out, layer.inputs), self.rank, self.way.proj_type).side
        return None if side is None else layer.inputs if side == "right" else layer.out

    def _basis(self, n: int) -> int:
        """Bytes of a basis, of its product with the basis before, and of two integers."""
        return 4 * n * self.rank + 4 * self.rank**2 + 16

    def _gradients(self) -> int:
        """Number of entries that data-parallel ranks average: those of G, or of R in its place."""
        model = self.model
        outside = sum(map(math.prod, model.outside)) + model.layers * sum(map(math.prod, model.block_vectors))
        return outside + model.layers * sum(map(self._gradient, model.block))

    def _gradient(self, layer: Layer) -> int:
        if self.way.backward_side:
            return layer.out * self.rank
        n = self.compressed(layer) if self.way.hook else None
        return layer.numel if n is None else layer.numel // n * self.rank

    def _sharded(self) -> Iterator[tuple[str, int]]:
        """What ``fully_shard`` sends.

        Blocks are gathered in the forward pass and again in the backward pass, and what is outside of blocks is
        gathered once. Gradients are reduced as they come; frozen weights have none.
        """
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
    """The mean over a period of what a step costs and of what a step with a refresh costs."""
    return step + (refresh - step) / period
