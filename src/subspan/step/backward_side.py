"""The optimizer's side of backward-side layers: it chooses their bases (``Carriers``), and steps on their carriers.

The gradient of a carrier is ``R`` already, so a step is

    U = rule(R),    W <- (1 - lr wd) W - lr scale U Qᵀ

If the residual has a sketch, the gradient is ``[R T]`` with ``T = G O``, and the residual's part goes into the weight
too. The carrier itself takes no part in that: it is only as wide as its gradient.

The basis is chosen before. That is in the forward pass if the selector needs no gradient, and in the backward pass of
the layers that share it if it does.
"""

import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from subspan import distributed, linalg
from subspan.step import refresh
from subspan.step.carriers import CarriedLayer, CarriedProjection, Plan, layer_of
from subspan.step.layout import PROJ_TYPES, layout_of
from subspan.step.method import Method
from subspan.step.proximal import Proximal
from subspan.step.weights import Inside, rounding_generator
from subspan.step.work import Held, Slot, Work, open_
from subspan.storage.allocation import State
from subspan.utils.errors import SettingError
from subspan.utils.ranks import Rank, rank_of_side

logger = logging.getLogger(__name__)


def step_(method: Method, work: Work, layer: CarriedLayer, held: Held, inside: Inside) -> None:
    """Step on one carrier, whose state is ``held``; the layer's projection writes the update into its weight."""
    group, proximal, projection = work.slot.group, Proximal.of(work.slot.group), layer.projection
    R, sketched = work.grad[:, : projection.rank].contiguous(), None
    U, factor = inside(work.rule, proximal.pull(R, held.state), held.moments, held.rows)
    proximal.move_(U, factor, held.state, group)
    held.store_(work.rule)
    if projection.sketch_width:
        T = work.grad[:, projection.rank :]
        A, phi = method.residual.combine(T, R, U, group["scale"], projection.back, held.state, held.rows)
        step = A.mul_(group["lr"] * factor)
        sketched = None if phi is None else T * phi.mul_(group["lr"] * factor)
    else:
        step = U.mul_(group["lr"] * group["scale"] * factor)
    keep = 1 - group["lr"] * group["weight_decay"]
    projection.apply_(layer, step, sketched, keep, rounding_generator(work, layer.weight))


class Owner(Protocol):
    """What ``Carriers`` reads of the optimizer that owns them."""

    method: Method
    param_groups: list[dict[str, Any]]
    state: Any

    def follow(self, *, in_pass: bool) -> None:
        """Fit the state to what the parameters are now."""


class Carrier(NamedTuple):
    """Where an optimizer keeps a carrier."""

    order: int
    """Number of its projection."""
    p: Tensor
    layer: CarriedLayer
    group: dict[str, Any]


class Carriers:
    """The backward-side half of an optimizer, which owns it: the driver that projections refer to.

    It reads the optimizer's groups and state each time, because loading a checkpoint replaces them.
    """

    def __init__(self, owner: Owner) -> None:
        self._said = self._looked = False
        self._owner = weakref.ref(owner)  # an optimizer without users is freed at once, and its layers say so

    @property
    def owner(self) -> Owner:
        """The optimizer."""
        owner = self._owner()
        assert owner is not None
        return owner

    def __iter__(self) -> Iterator[Carrier]:
        order = -1
        for group in self.owner.param_groups:
            for p in group["params"]:
                if (layer := layer_of(p)) is not None:
                    order += layer.number == 0
                    yield Carrier(order, p, layer, group)

    def bind(self) -> None:
        """Let each projection know its basis, which is kept with its first carrier."""
        method, states = self.owner.method, self.owner.state
        for _, p, layer, _ in self:
            first = layer.projection.layers[0]
            if first.carrier not in states:
                raise SettingError(
                    f"params: the carrier of {layer.weight_name} is here, and that of {first.weight_name}, which keeps "
                    "the basis they share, is not; pass both, unfreeze it, or call project_backward with share='none'"
                )
            if layer.number == 0:
                layer.projection.bind(method.selector, method.residual, states[p], self)
        self.schedule()

    def follow(self) -> None:
        """Let each projection that is bound to this optimizer know where its basis is now."""
        for one in self:
            if one.layer.number == 0:
                one.layer.projection.follow(self.owner.state[one.p], self)

    def look(self, device: torch.device, state: State) -> None:
        """Follow the parameters before a pass, if they may have changed. ``state`` is what holds the basis of the pass.

        They change between steps. What is on another device than the weight has certainly not followed it.
        """
        held = (value for value in state.values() if isinstance(value, Tensor) and value.ndim)
        if not self._looked or any(value.device != device for value in held):
            self._looked = True
            self.owner.follow(in_pass=True)

    def schedule(self) -> None:
        """Tell each projection what is due at the next gradient."""
        self._looked = False
        for order, p, layer, group in self:
            if layer.number == 0:
                key = self.owner.method.key(layer.weight_name, group["clock"])
                layer.projection.expect(self._plan(self.owner.state[p], group, order), key)

    def _say_that_it_is_alone(self) -> None:
        """Warn once where a gradient chooses a basis for this process only, while there are other processes."""
        if not self._said and distributed.world_size() > 1:
            self._said = True
            logger.warning(
                "backward-side layers: no DistributedDataParallel wraps them, so their bases are chosen on this process "
                "only; if other processes train the same model, pass project_backward(..., process_group=...)"
            )

    def fold(self) -> None:
        """Put the displacements of all carriers into the weights."""
        for one in self:
            one.layer.projection.fold()

    def _plan(self, state: State, group: Mapping[str, Any], order: int) -> Plan:
        method = self.owner.method
        if not refresh.is_due(method, state, group, order):
            return "keep"
        # If the first gradients were formed all at once, they would take the memory that is saved. So a basis is drawn
        # from noise until its turn comes.
        period = method.selector.period(group["update_proj_gap"], state) or 1
        early = state["refresh_step"] < 0 and refresh.offset(method, group, order) != group["clock"] % period
        return "form" if method.selector.needs_gradient and not early else "draw"

    @torch.no_grad()
    def refresh_projection(self, projection: CarriedProjection, G: Tensor | None) -> None:
        """Choose a new basis, from ``G (m, in)`` if one is given, and carry the moments of every carrier over."""
        method, states = self.owner.method, self.owner.state
        order, first, layer, group = next(one for one in self if one.layer is projection.layers[0])
        state, weight = states[first], layer.weight
        key = method.key(layer.weight_name, group["clock"])
        rank, width = projection.rank, weight.shape[1]
        if not method.selector.needs_gradient:
            G = weight.new_ones(1, width)
        elif G is None:
            # What a selector finds in noise is a random subspace, whatever it looks for.
            generator = linalg.keyed_generator("noise", *key)
            G = torch.randn(rank, width, generator=generator).to(weight.device)
        elif G.shape[0] < rank:  # fewer singular vectors than the rank: rows of zero add the others
            G = torch.cat([G, G.new_zeros(rank - G.shape[0], width)])
        ranks = distributed.ranks_of(first, projection.process_group)
        if ranks.count == 1 and projection.plan == "form":
            self._say_that_it_is_alone()
        if ranks.count == 1 or projection.plan != "form":
            change = refresh.choose(method, G, state, key)
        else:  # what depends on a gradient is chosen by one rank and sent to all
            if projection.select_from == "mean":
                ranks.mean_(G)
            wanted = refresh.Wanted(state, key, rank, G[:1], order % ranks.count, G)
            [change] = refresh.choose_by_owner(method, [wanted], ranks)
        projection.plan = self._plan(state, group, order)
        if change is None:
            return
        for one in self:
            if one.layer.projection is projection:
                rule = method.rule_of(one.group)
                held = open_(one.p, rule, states[one.p], one.group, 2)
                refresh.carry_over(method, change.to(one.p.dtype), held.state, held.moments, rule)
                if method.transfer != "keep":  # what has not changed must not be rounded to 8 bits again
                    held.store_(rule)


def check_carrier(method: Method, p: Tensor) -> None:
    """Raise if ``p`` is a carrier whose layer this method cannot train."""
    if (layer := layer_of(p)) is None:
        return
    if distributed.is_sharded(p) and layer.projection.merge == "refresh":
        raise SettingError(
            "merge='refresh': a displacement cannot be put into weights that fully_shard has sharded over ranks; call "
            "project_backward with merge='step'"
        )
    if method.residual.needs_gradient:
        raise SettingError(
            f"residual={method.residual!r}: needs every gradient, and the backward-side layers of this model form none; "
            "use residuals.Discard(), or leave project_backward out"
        )
    made, wanted = layer.projection.sketch_width, method.residual.sketch_width(layer.in_features, layer.projection.rank)
    if made != wanted:
        raise SettingError(
            f"residual={method.residual!r}: has a sketch of {wanted} directions of the inputs of {layer.weight_name}, and "
            f"the backward-side layer was made for one of {made}; give the optimizer's residual to project_backward too, "
            "as in project_backward(..., residual=subspan.residuals.Sketch())"
        )
    if method.selector.tracks:
        raise SettingError(
            f"selector={method.selector!r}: follows every gradient, and the backward-side layers of this model form one "
            "only at a refresh; use another selector, or leave project_backward out"
        )


def check_ranks(slots: Iterable[Slot], rank: Rank | None) -> None:
    """Refuse what would be ignored: where only backward-side layers are projected, their rank and side are given.

    ``rank`` is that of the optimizer, which is not for layers whose rank a pattern has set.
    """
    projected = [
        slot
        for slot in slots
        if slot.p.requires_grad and slot.p.ndim > 1
        if layer_of(slot.p) is not None or slot.group["rank"] is not None
    ]
    for slot in projected if all(layer_of(slot.p) is not None for slot in projected) else []:
        layer = layer_of(slot.p)
        assert layer is not None
        made, own = layer.projection, layer.projection.rank
        for asked in (slot.group["rank"], None if made.by_pattern else rank):
            if asked is not None and rank_of_side(asked, layer.weight.shape[1]) != own:
                raise SettingError(
                    f"rank={asked}: the backward-side layer of {layer.weight_name} was made with rank={made.asked}; give "
                    f"that, or another rank to project_backward"
                )
        proj_type = slot.group["proj_type"]
        compresses_rows = layout_of(layer.weight.shape, own, proj_type, False).side == "left"
        if PROJ_TYPES[proj_type] != "short" and compresses_rows:
            raise SettingError(
                f"proj_type={proj_type!r}: would compress the rows of {layer.weight_name} {tuple(layer.weight.shape)}, and "
                "a backward-side layer compresses columns ('right'); leave proj_type out, or leave project_backward out"
            )
