"""The optimizer's side of ordinary weights: refresh if due, project, step inside, combine, apply.

Where the rows of a weight are spread over ranks, each rank steps on its own. A refresh is then taken before all else:
the Gram
matrices of the gradients are added up, each is factorised by one rank, and the bases are sent to all.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subspan import distributed, linalg
from subspan.linalg import Gram, LinAlgError
from subspan.parts import Key, Residual, Rows, Rule, Selector, Transfer
from subspan.step import proximal as prox
from subspan.step.carriers import layer_of
from subspan.step.layout import PROJ_TYPES, Layout, layout_of
from subspan.step.refresh_schedule import offset_of, refresh_due
from subspan.storage import eight_bit as quantization
from subspan.storage.allocation import State
from subspan.storage.stochastic_rounding import add_rounded_
from subspan.utils.errors import SettingError

logger = logging.getLogger(__name__)


class Work(NamedTuple):
    """One parameter in one step."""

    p: Tensor
    grad: Tensor
    """Its rows that are here."""
    layout: Layout
    """Of those rows."""
    group: dict[str, Any]
    rule: Rule
    key: Key
    order: int
    """Its number among the projected matrices."""
    low_rank: bool = False
    """``grad`` is ``R`` already, in a basis that stays."""


def step_inside(rule: Rule, R: Tensor, moments: State, rows: Rows) -> tuple[Tensor, Tensor]:
    """The rule's step: a function of tensors, for ``torch.compile``."""
    return rule.update_(R, moments, rows)


class ProjectedSteps:
    """What ``SubspaceOptimizer`` does with weights that have a gradient of their own."""

    _inside: Callable[[Rule, Tensor, State, Rows], tuple[Tensor, Tensor]] = staticmethod(step_inside)

    state: Any
    selector: Selector
    residual: Residual
    transfer: Transfer
    stagger: bool

    def _update(self, work: Work, changes: Mapping[Tensor, Tensor | None]) -> None:
        """Step on one parameter. ``changes``: of the bases that have been chosen already."""
        p, group, layout, rule = distributed.local(work.p), work.group, work.layout, work.rule
        held = self.state[work.p]
        state = distributed.local_state(held)
        moments = self._unpacked(state, rule, group, p)
        rows = distributed.rows_of(work.p, len(layout.shape))
        G = work.grad if work.low_rank else layout.enter(work.grad)
        if layout.side is None:
            D, factor = self._inside(rule, G, moments, rows)
        else:
            if not work.low_rank:
                G = self.residual.receive(G, state)
                if work.p in changes:
                    self._carry_over(changes[work.p], state, moments, rule)
                else:
                    self._move_basis(G, state, moments, work)
            R = G if work.low_rank else self.selector.project(G, state)
            U, factor = self._inside(rule, prox.pull(R, state, group), moments, rows)
            prox.move_(U, factor, state, group)
            A, phi = self.residual.combine(
                G, R, U, group["scale"], lambda A: self.selector.project_back(A, state), state, rows
            )
            if self._lifts_in_place(p, layout, group, phi):
                if moments is not state:
                    quantization.store_(state, moments, rule.moments)
                self._decay(p, group)
                W, step = layout.enter(p), group["lr"] * factor
                self.selector.subtract_(W, A.mul_(step), state)
                if phi is not None:
                    W.addcmul_(G, phi.mul_(step), value=-1)
                return
            D = self.selector.project_back(A, state)
            if phi is not None:
                D.addcmul_(G, phi)
        if moments is not state:
            quantization.store_(state, moments, rule.moments)
        D = layout.leave(D, p.shape).mul_(group["lr"] * factor)
        if group["bf16_stochastic_round"] and p.dtype == torch.bfloat16:
            generator = linalg.keyed_generator("round", *work.key, *distributed.place_of(work.p), device=p.device)
            add_rounded_(p, D.neg_(), 1 - group["lr"] * group["weight_decay"], generator)
            return
        self._decay(p, group)
        p.sub_(D)

    @staticmethod
    def _lifts_in_place(p: Tensor, layout: Layout, group: Mapping[str, Any], phi: Tensor | None) -> bool:
        """Whether ``A Qᵀ + phi G`` may be subtracted from the weight itself, without a tensor of its size: the weight
        is seen
        as matrices without a copy, and is as precise as what is added to it, or rounded to nearest once."""
        if (p.dtype == torch.bfloat16 and group["bf16_stochastic_round"]) or (phi is not None and phi.dtype != p.dtype):
            return False
        return p.ndim == len(layout.shape) or p.is_contiguous()

    @staticmethod
    def _decay(p: Tensor, group: Mapping[str, Any]) -> None:
        if group["weight_decay"] != 0:
            p.mul_(1 - group["lr"] * group["weight_decay"])

    def _due(self, state: State, group: Mapping[str, Any], order: int) -> bool:
        period = self.selector.period(group["update_proj_gap"], state)
        offset = offset_of(order, group["update_proj_gap"]) if self.stagger else 0
        return refresh_due(state["refresh_step"], group["clock"], period, offset)

    def _low_rank_suffices(self, p: Tensor, layout: Layout, group: Mapping[str, Any], order: int) -> bool:
        """Whether ``R`` is all that the coming step needs of the gradient of ``p``. Of a carrier, the gradient is
        ``R``.
        """
        if layout.side is None or layer_of(p) is not None or self.residual.needs_gradient or self.selector.tracks:
            return False
        return not self._due(self.state[p], group, order)

    def _move_basis(self, G: Tensor, state: State, moments: State, work: Work) -> None:
        """Refresh the basis if that is due, or let it follow the gradient if it does; carry the moments along."""
        due, rule = self._due(state, work.group, work.order), work.rule
        if not due and not self.selector.tracks:
            return
        momentum = rule.first_moment(moments)
        watched = momentum if self.residual.keeps_momentum else None
        before = None if watched is None else self.selector.project_back(watched.value, state)
        change = self._refresh(G, state, work.key) if due else self.selector.track_(G, state, momentum)
        self._carry_over(change, state, moments, rule)
        if change is not None and watched is not None and before is not None:  # its value has been changed in place
            lost = before.sub_(self.selector.project_back(watched.value, state))
            self.residual.lose_(lost.mul_(watched.weight), state)

    def _carry_over(self, change: Tensor | None, state: State, moments: State, rule: Rule) -> None:
        if change is None:
            return
        if "displacement" in state:
            state["displacement"].zero_()
        if self.transfer != "keep":
            rule.transfer_(moments, change, self.transfer)

    def _refresh(self, G: Tensor | Gram, state: State, key: Key) -> Tensor | None:
        # The only place that waits for the device. A zero or non-finite gradient tells nothing of a subspace (contract
        # R4).
        if 0 < linalg.largest(G) < float("inf"):
            try:
                change = self.selector.refresh_(G, state, key)
                state["refresh_step"] = key.step
                return change
            except LinAlgError as error:
                logger.warning("refresh of %s at step %d keeps the old basis: %s", key.name, key.step, error)
        state["skipped_refreshes"] += 1
        return None

    def _unpacked(self, state: State, rule: Rule, group: Mapping[str, Any], p: Tensor) -> State:
        if group["state_dtype"] != "int8":
            return state
        return quantization.unpack(state, rule.moments, torch.promote_types(p.dtype, torch.float32))

    # --- rows on several ranks ----------------------------------------------------------------------------------------

    def _check_spread(self, p: Tensor, group: Mapping[str, Any]) -> None:
        if not distributed.is_spread(p):
            return
        distributed.check_placement(p, f"a parameter of shape {tuple(p.shape)}")
        self.check_spreadable(p, group)

    def check_spreadable(self, p: Tensor, group: Mapping[str, Any]) -> None:
        """Raise unless this method can train ``p`` when its rows are spread over ranks."""
        if group["rank"] is None or p.ndim < 2 or layer_of(p) is not None:
            return
        why = None
        if p.ndim == 3 and not group["flatten"]:
            why = f"params: a stack of matrices {tuple(p.shape)}"
        elif (
            PROJ_TYPES[group["proj_type"]] != "short"
            and layout_of(p.shape, group["rank"], group["proj_type"], group["flatten"]).side == "left"
        ):  # of std: the columns
            why = f"proj_type={group['proj_type']!r}, which is the rows of a matrix {tuple(p.shape)}"
        elif self.selector.tracks or (self.selector.needs_gradient and not self.selector.takes_gram):
            why = f"selector={self.selector!r}"
        elif not self.residual.takes_rows:
            why = f"residual={self.residual!r}"
        if why is not None:
            raise SettingError(
                f"{why}: does not work where the rows of a weight are spread over ranks (fully_shard); use "
                "proj_type='std' or "
                "'right'; a selector that chooses from the Gram matrix, such as selectors.Importance(), or draws, "
                "such as "
                "selectors.Random(); residuals.Discard() or residuals.Fira(); and exclude stacks of experts"
            )

    def _choose_spread(self, works: Iterable[Work]) -> dict[Tensor, Tensor | None]:
        """The new bases of weights that are spread over ranks: the change of each that was due, ``None`` where it
        stays.
        """
        due: dict[Any, list[Work]] = {}
        for work in works:
            projected = distributed.is_spread(work.p) and work.layout.side is not None and layer_of(work.p) is None
            if projected and not work.low_rank and self._due(self.state[work.p], work.group, work.order):
                due.setdefault(distributed.mesh_of(work.p), []).append(work)
        changes: dict[Tensor, Tensor | None] = {}
        for some in due.values():
            ranks = distributed.ranks_of(some[0].p)
            if not self.selector.needs_gradient:
                good = ranks.usable([work.grad for work in some])
                for work, usable in zip(some, good, strict=True):
                    row = work.grad.new_full((1, work.layout.shape[-1]), float(usable))
                    changes[work.p] = self._refresh(row, self.state[work.p], work.key)
                continue
            # One for each rank at a time, those of like cost together, so that none waits long for another.
            some.sort(key=lambda work: -work.layout.shape[-1])
            remaining = iter(some)
            while chunk := list(itertools.islice(remaining, ranks.count)):
                # Where one comes alone, as in the backward pass, another rank has its turn.
                owners = [(index + chunk[0].order * (len(chunk) == 1)) % ranks.count for index in range(len(chunk))]
                changes |= self._choose_together_spread(chunk, owners, ranks)
        return changes

    def _choose_together_spread(
        self, chunk: list[Work], owners: list[int], ranks: distributed.Ranks
    ) -> dict[Tensor, Tensor | None]:
        mine, before = None, [self.state[work.p]["refresh_step"] for work in chunk]
        for owner, work in zip(owners, chunk, strict=True):
            G = work.layout.enter(work.grad)
            S = ranks.add_rows_(linalg.gram(G))
            if owner == ranks.index:
                mine = Gram(S, G.new_zeros(1, G.shape[-1]), work.p.shape[0])
        change = None
        if mine is not None:
            own = chunk[owners.index(ranks.index)]
            change = self._refresh(mine, self.state[own.p], own.key)
        changes: dict[Tensor, Tensor | None] = {}
        for owner, work, old in zip(owners, chunk, before, strict=True):
            state, rank = self.state[work.p], work.group["rank"]
            row = work.grad.new_zeros(1, work.layout.shape[-1])
            sent = torch.zeros(rank, rank, dtype=torch.promote_types(row.dtype, torch.float32), device=row.device)
            if owner == ranks.index and change is not None:
                sent.copy_(change)
            ranks.share_(state, [*self.selector.init(row, rank), "refresh_step", "skipped_refreshes"], [sent], owner)
            changes[work.p] = sent if state["refresh_step"] != old else None
        return changes
