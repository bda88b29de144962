"""The bytes that a training step sends, in closed form. They follow from shapes, ranks and world.

Weights are ``W (out, inputs)``. A basis compresses the side ``n`` to rank ``r``. Where the residual has a sketch of
``s`` directions, ``[R T]`` is sent in place of ``R``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch

from subspan.costs.collectives import Sent
from subspan.costs.llama import Layer, Llama, padded
from subspan.groups import RankPattern
from subspan.linalg import spectral_dtype
from subspan.recipes import find
from subspan.step.layout import layout_of
from subspan.utils.ranks import Rank, rank_of_side

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
    own_bases: bool = False
    """Whether backward-side layers with one input have bases of their own (``share="none"``)."""

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
"""The ways that are compared on many machines."""
COUNTED = WAYS | {"sara_sketch_backward_ddp": Way("sara_sketch_adamw", backward_side=True)}
"""The ways whose traffic is counted. A sketch is among them, for which ``[R T]`` is sent."""


class Projected(NamedTuple):
    """A linear layer whose weight is projected."""

    layer: Layer
    n: int
    """Length of the side that is compressed."""
    r: int
    """The rank."""
    s: int
    """Number of directions in the sketch of the residual, 0 for none."""

    @property
    def columns(self) -> int:
        """Number of columns of ``R``, and of the sketch beside it."""
        return self.r + self.s


@dataclass(frozen=True)
class Traffic:
    """The collective operations of a step, and their payloads."""

    model: Llama
    rank: Rank
    """The rank, as a whole number or as a share of each compressed side."""
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
    rank_pattern: Mapping[str, Rank] | None = None
    """Other ranks by name, as ``create`` takes them."""

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
            for group in self.bases:
                if self.select_from == "mean":  # the gradients of all layers of the group
                    sent.add("all_reduce", self.width * sum(one.layer.numel for one in group))
                sent.add("broadcast", _basis(group[0]))
        elif self.way.sharded:
            for [one] in self.bases:
                sent.add("all_reduce", spectral_dtype(self.device, one.n).itemsize * one.n * one.n)
                sent.add("broadcast", _basis(one))
        else:  # gradients are sent whole, and each rank chooses the same basis from them
            sent.bytes["all_reduce"] = self.width * self.model.numel
        return sent

    def zeros(self) -> int:
        """Number of bytes in the all-gathers of a step that are zeros.

        Carriers hold zeros. They are parameters, so ``fully_shard`` gathers them too.
        """
        gathered = self.way.sharded and self.way.backward_side
        return 2 * self.gathered_width * self._carriers() if gathered else 0

    @cached_property
    def inputs(self) -> list[list[list[Projected]]]:
        """The projected layers of all blocks: for each input the bases, and for each basis its layers."""
        pattern, residual, found = RankPattern(self.rank_pattern), find(self.way.optimizer).residual, []
        for block in range(self.model.layers):
            for group in self.model.sharing:
                shared: dict[str | int, list[Projected]] = {}
                for layer in group:
                    asked = pattern.of(f"model.layers.{block}.{layer.name}.weight", self.rank)
                    if self.way.backward_side:
                        n, r = layer.inputs, rank_of_side(asked, layer.inputs)
                        one = Projected(layer, n, r, residual.sketch_width(n, r))
                        shared.setdefault(layer.name if self.way.own_bases else one.r, []).append(one)
                        continue
                    layout = layout_of((layer.out, layer.inputs), asked, self.way.proj_type)
                    if layout.rank is not None:
                        n = layout.oriented[-1]
                        one = Projected(layer, n, layout.rank, residual.sketch_width(n, layout.rank))
                        shared[layer.name] = [one]
                found.append(list(shared.values()))
        return found

    @property
    def bases(self) -> list[list[Projected]]:
        """The projected layers of all blocks. Those that share a basis are together."""
        return [basis for bases in self.inputs for basis in bases]

    @property
    def kept(self) -> int:
        """Numbers that backward-side layers keep of each token: of an input ``x [Q O]`` for each basis, or ``x``.

        They keep no more than ``x``, which all layers with this input can use.
        """
        return sum(min(bases[0][0].n, sum(basis[0].columns for basis in bases)) for bases in self.inputs)

    @property
    def projected(self) -> list[Projected]:
        """The projected layers of all blocks."""
        return [one for group in self.bases for one in group]

    def _carriers(self) -> int:
        """Number of entries of all carriers, filled up as ``fully_shard`` does."""
        return sum(padded((one.layer.out, one.columns), self.world) for one in self.projected)

    def _gradients(self) -> int:
        """Number of entries that data-parallel ranks average: those of G, or of R in its place."""
        if not (self.way.backward_side or self.way.hook):
            return self.model.numel
        return self.model.numel - sum(
            one.layer.numel - one.layer.numel // one.n * one.columns for one in self.projected
        )

    def _sharded(self) -> Iterator[tuple[str, int]]:
        """What ``fully_shard`` sends.

        Blocks are gathered in the forward pass and again in the backward pass, and what is outside of blocks is
        gathered once. Gradients are reduced as they come; frozen weights have none.
        """
        model = self.model
        vectors = sum(padded(shape, self.world) for shape in model.block_vectors)
        weights = sum(padded((layer.out, layer.inputs), self.world) for layer in model.block)
        carriers = self._carriers() if self.way.backward_side else 0
        outside = sum(padded(shape, self.world) for shape in model.outside)
        inside = model.layers * (weights + vectors)
        yield "all_gather", self.gathered_width * (2 * (inside + carriers) + outside)
        yield "reduce_scatter", self.width * ((carriers + model.layers * vectors if carriers else inside) + outside)


def _basis(one: Projected) -> int:
    """Bytes of a basis, of its product with the basis before, and of two integers."""
    return 4 * one.n * one.r + 4 * one.r**2 + 16


def amortised(step: float, refresh: float, period: float = PERIOD) -> float:
    """The mean over a period of what a step costs and of what a step with a refresh costs."""
    return step + (refresh - step) / period
