"""The optimizer's side of backward-side layers: it chooses their bases, and steps on their carriers.

The gradient of a carrier is ``R`` already, so a step is ``U = rule(R)``, ``W <- (1 - lr wd) W - lr scale U Qᵀ``. The
basis
is chosen before: in the forward pass if the selector needs no gradient, else in the backward pass of the layers that
share it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from subspan import distributed, linalg
from subspan.linalg import Gram
from subspan.parts import Key, Residual, Rows, Rule, Selector, Transfer
from subspan.step import proximal
from subspan.step.carriers import CarriedLayer, CarriedProjection, Plan, layer_of
from subspan.step.refresh_schedule import offset_of, refresh_due
from subspan.step.weights import Work
from subspan.storage import eight_bit as quantization
from subspan.storage.allocation import State
from subspan.utils.errors import SettingError


class CarriedSteps:
    """What ``SubspaceOptimizer`` does with carriers."""

    param_groups: list[dict[str, Any]]
    state: Any
    selector: Selector
    residual: Residual
    transfer: Transfer
    stagger: bool
    seed: int

    _inside: Callable[[Rule, Tensor, State, Rows], tuple[Tensor, Tensor]]

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        raise NotImplementedError

    def _refresh(self, G: Tensor | Gram, state: State, key: Key) -> Tensor | None:
        raise NotImplementedError

    def _unpacked(self, state: State, rule: Rule, group: Mapping[str, Any], p: Tensor) -> State:
        raise NotImplementedError

    def _carried(self) -> Iterator[tuple[int, Tensor, CarriedLayer, dict[str, Any]]]:
        """Each carrier with the number of its projection, its layer and its group."""
        number = -1
        for group in self.param_groups:
            for p in group["params"]:
                if (layer := layer_of(p)) is not None:
                    number += layer.number == 0
                    yield number, p, layer, group

    def _check_carried(self, p: Tensor) -> None:
        if (layer := layer_of(p)) is None:
            return
        if distributed.is_spread(p) and layer.projection.merge == "refresh":
            raise SettingError(
                "merge='refresh': a displacement cannot be put into weights that fully_shard has spread over ranks; "
                "call "
                "project_backward with merge='step'"
            )
        if self.residual.needs_gradient:
            raise SettingError(
                f"residual={self.residual!r}: needs every gradient, and the backward-side layers of this model form "
                "none; use "
                "residuals.Discard(), or leave project_backward out"
            )
        if self.selector.tracks:
            raise SettingError(
                f"selector={self.selector!r}: follows every gradient, and the backward-side layers of this model "
                "form one only "
                "at a refresh; use another selector, or leave project_backward out"
            )

    def _bind(self) -> None:
        """Let each projection know its basis, which is kept with its first carrier."""
        for _, p, layer, _ in self._carried():
            first = layer.projection.layers[0]
            if first.carrier not in self.state:
                raise SettingError(
                    f"params: the carrier of {layer.weight_name} is here, and that of {first.weight_name}, which "
                    "keeps the "
                    "basis they share, is not; pass both, unfreeze it, or call project_backward with share='none'"
                )
            if layer.number == 0:
                layer.projection.bind(self.selector, self.state[p], self)
        self._plan()

    def _plan(self) -> None:
        """Tell each projection what is due at the next gradient."""
        for order, p, layer, group in self._carried():
            if layer.number == 0:
                layer.projection.expect(self._plan_of(self.state[p], group, order))

    def _plan_of(self, state: State, group: Mapping[str, Any], order: int) -> Plan:
        period = self.selector.period(group["update_proj_gap"], state)
        offset = offset_of(order, group["update_proj_gap"]) if self.stagger else 0
        if not refresh_due(state["refresh_step"], group["clock"], period, offset):
            return "keep"
        # All at once the first gradients would take the memory that is saved: until its turn a basis is drawn from
        # noise.
        early = state["refresh_step"] < 0 and offset != group["clock"] % (period or 1)
        return "form" if self.selector.needs_gradient and not early else "draw"

    @torch.no_grad()
    def refresh_projection(self, projection: CarriedProjection, G: Tensor | None) -> None:
        """Choose a new basis, from ``G (m, in)`` if one is given, and carry the moments of every carrier over."""
        order, first, _, group = next(row for row in self._carried() if row[2] is projection.layers[0])
        state, weight = self.state[first], projection.layers[0].weight
        key = Key(self.seed, projection.layers[0].weight_name, group["clock"])
        rank, width = first.shape[1], weight.shape[1]
        if not self.selector.needs_gradient:
            G = weight.new_ones(1, width)
        elif G is None:
            # What a selector finds in noise is a random subspace, whatever it looks for.
            generator = linalg.keyed_generator("noise", *key)
            G = torch.randn(rank, width, generator=generator).to(weight.device)
        elif G.shape[0] < rank:  # fewer singular vectors than the rank: rows of zero add the others
            G = torch.cat([G, G.new_zeros(rank - G.shape[0], width)])
        change = self._choose_together(G, state, key, order, projection)
        projection.plan = self._plan_of(state, group, order)
        if change is None:
            return
        for _, p, layer, own_group in self._carried():
            if layer.projection is not projection:
                continue
            rule, own = self._rule(own_group), distributed.local_state(self.state[p])
            if "displacement" in own:
                own["displacement"].zero_()
            if self.transfer != "keep":
                moments = self._unpacked(own, rule, own_group, p)
                rule.transfer_(moments, change.to(p.dtype), self.transfer)
                if moments is not own:
                    quantization.store_(own, moments, rule.moments)

    def _choose_together(
        self, G: Tensor, state: State, key: Key, order: int, projection: CarriedProjection
    ) -> Tensor | None:
        """``_refresh``, with the same outcome on every rank: what depends on a gradient is chosen by one and sent to
        all.
        """
        ranks = distributed.ranks_of(next(p for _, p, layer, _ in self._carried() if layer is projection.layers[0]))
        if ranks.count == 1 or projection.plan != "form":
            return self._refresh(G, state, key)
        if projection.select_from == "mean":
            ranks.mean_(G)
        owner, before = order % ranks.count, state["refresh_step"]
        change = self._refresh(G, state, key) if ranks.index == owner else None
        r = projection.layers[0].carrier.shape[1]
        sent = torch.zeros(r, r, dtype=G.dtype, device=G.device) if change is None else change.to(G.dtype).contiguous()
        keys = [*self.selector.init(G[:1], r), "refresh_step", "skipped_refreshes"]
        ranks.share_(state, keys, [sent], owner)
        return sent if state["refresh_step"] != before else None

    def _update_carried(self, work: Work, layer: CarriedLayer) -> None:
        group, rule = work.group, work.rule
        own = distributed.local_state(self.state[work.p])
        moments = self._unpacked(own, rule, group, work.grad)
        U, factor = self._inside(rule, proximal.pull(work.grad, own, group), moments, distributed.rows_of(work.p, 2))
        proximal.move_(U, factor, own, group)
        if moments is not own:
            quantization.store_(own, moments, rule.moments)
        step = U.mul_(group["lr"] * group["scale"] * factor)
        random = group["bf16_stochastic_round"] and layer.weight.dtype == torch.bfloat16
        generator = None
        if random:
            generator = linalg.keyed_generator("round", *work.key, *distributed.place_of(work.p), device=step.device)
        layer.projection.apply_(layer, step, 1 - group["lr"] * group["weight_decay"], generator)
