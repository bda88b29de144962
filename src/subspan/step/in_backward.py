"""Step in the backward pass: each gradient is used as soon as it is there, and freed, so that one is held at a time.

Of a projected weight the low-rank gradients of several micro-batches add up, ``R <- R + G Q``; where a basis is due, or
a
residual needs all of the gradient, and for what is not projected, the gradient itself does. With the last micro-batch
the
parameter takes its step. ``optimizer.step()`` is called as ever; it moves the schedule on.

Sources: LOMO (Lv et al. 2023, arXiv 2306.09782) and GaLore's layer-wise mode (Zhao et al. 2024, arXiv 2403.03507).
Deviations from GaLore's code: one optimizer and not one for each parameter, so schedulers, state and clipping work on
it; and
micro-batches accumulate.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from subspan import distributed
from subspan.parts import Selector
from subspan.step.layout import Layout
from subspan.step.weights import Work
from subspan.utils.checks import DIVISORS, is_divisor
from subspan.utils.errors import SettingError

Clip = Literal["none", "per_param", "lagged_global"]


class Stepper(Protocol):
    """What is asked of the optimizer."""

    param_groups: list[dict[str, Any]]
    state: Any
    selector: Selector

    def _places(self) -> Iterable["Place"]: ...
    def _take(self, works: list[Work]) -> None: ...
    def _work(self, place: "Place", G: Tensor) -> Work: ...
    def _low_rank_suffices(self, p: Tensor, layout: Layout, group: Any, order: int) -> bool: ...


class Place(NamedTuple):
    """Where the optimizer keeps a parameter."""

    p: Tensor
    name: str
    number: int
    """Of its group."""
    group: dict[str, Any]
    layout: Layout
    order: int


class _Taken(Tensor):
    """Stands in for a gradient that has been used. Whoever reads it is told."""

    @staticmethod
    def __new__(cls, p: Tensor) -> "_Taken":
        stand_in: _Taken = Tensor._make_wrapper_subclass(
            cls, p.shape, dtype=p.dtype, device=p.device, requires_grad=False
        )
        return stand_in

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.zero_.default):  # zero_grad(set_to_none=False)
            return args[0]
        raise RuntimeError(
            "this gradient has been stepped on in the backward pass and is gone. To clip, pass clip='per_param' or "
            "'lagged_global' to enable_step_in_backward, in place of clip_grad_norm_; a GradScaler cannot be used; "
            "and call "
            "optimizer.step() after the last micro-batch, before the next backward pass"
        )


class StepInBackward:
    """The hooks of one optimizer, and what they hold between micro-batches."""

    def __init__(self, optimizer: Stepper, accumulate: int, clip: Clip, max_norm: float) -> None:
        self.optimizer, self.accumulate, self.clip, self.max_norm = optimizer, accumulate, clip, max_norm
        self.seen: dict[Tensor, int] = {}
        self._low_rank: dict[Tensor, Tensor] = {}
        self._squares: list[tuple[Tensor, Tensor]] = []
        self._places = {place.p: place for place in optimizer._places() if place.p.requires_grad}
        if clip == "lagged_global":  # from the start, for a checkpoint is loaded into the keys that are there
            optimizer.param_groups[0].setdefault("lagged_norm", 0.0)
        self._handles = [p.register_post_accumulate_grad_hook(self._receive) for p in self._places]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _receive(self, p: Tensor) -> None:
        """A micro-batch's gradient is in ``p.grad``."""
        place, seen = self._places[p], self.seen.get(p, 0) + 1
        place = place._replace(group=self.optimizer.param_groups[place.number])  # load_state_dict makes new ones
        self.seen[p] = seen
        if seen > self.accumulate:
            raise RuntimeError(
                f"gradient of {place.name!r}: the {seen}th since the last step, with accumulate={self.accumulate}; "
                "call "
                "optimizer.step() after the last micro-batch"
            )
        if self.optimizer._low_rank_suffices(p, place.layout, place.group, place.order):
            R = self.optimizer.selector.project(
                place.layout.enter(distributed.local_gradient(p, place.name)), self.optimizer.state[p]
            )
            self._low_rank[p] = self._low_rank[p].add_(R) if p in self._low_rank else R
            p.grad = None
        if seen == self.accumulate:
            self._step(place)

    def _step(self, place: Place) -> None:
        p = place.p
        R = self._low_rank.pop(p, None)
        G = self._clipped(place, R if R is not None else distributed.local_gradient(p, place.name))
        p.grad = None
        work = self.optimizer._work(place, G)
        self.optimizer._take([work if R is None else work._replace(low_rank=True)])
        p.grad = _Taken(p)

    def _clipped(self, place: Place, G: Tensor) -> Tensor:
        if self.clip == "none":
            return G
        square = torch.linalg.vector_norm(G, dtype=torch.promote_types(G.dtype, torch.float32)).square()
        if self.clip == "per_param":
            norm = distributed.rows_of(place.p, len(place.layout.shape)).total(square).sqrt()
            return G * (self.max_norm / (norm + 1e-6)).clamp_max(1).to(G.dtype)
        self._squares.append((place.p, square))
        last = self.optimizer.param_groups[0]["lagged_norm"]
        return G * min(1.0, self.max_norm / (last + 1e-6)) if math.isfinite(last) else G

    def finish(self) -> None:
        """The step is over. Raises unless every gradient was the last of its step."""
        late = [self._places[p].name for p, seen in self.seen.items() if seen != self.accumulate]
        if late:
            raise RuntimeError(
                f"step(): {late[0]!r} has had {self.seen[self._by_name(late[0])]} of accumulate={self.accumulate} "
                "micro-batches; call it after the last"
            )
        if self._squares:
            self.optimizer.param_groups[0]["lagged_norm"] = distributed.global_norm(self._squares)
        self._squares.clear()
        for p in self.seen:
            p.grad = None
        self.seen.clear()

    def _by_name(self, name: str) -> Tensor:
        return next(p for p, place in self._places.items() if place.name == name)


def check(optimizer: Stepper, model: nn.Module, accumulate: object, clip: object, max_norm: object) -> None:
    """Raise unless ``optimizer`` can step in the backward pass of ``model``."""
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise SettingError(f"accumulate={accumulate!r}: expected the number of micro-batches of a step, >= 1")
    if clip not in ("none", "per_param", "lagged_global"):
        raise SettingError(f"clip={clip!r}: expected 'none', 'per_param' or 'lagged_global'")
    if not is_divisor(max_norm):
        raise SettingError(f"max_norm={max_norm!r}: expected a number > 0, {DIVISORS}")
    places = list(optimizer._places())
    if any(
        kind.__name__ == "DistributedDataParallel" for module in model.modules() for kind in type(module).__mro__
    ) or any(not distributed.is_spread(place.p) and distributed.ranks_of(place.p).count > 1 for place in places):
        raise SettingError(
            "model: with DistributedDataParallel a gradient is stepped on before it has been averaged over the "
            "ranks, which "
            "then drift apart; shard the model with fully_shard, or step after the backward pass"
        )
    own = {id(p) for p in model.parameters()}
    if not any(id(place.p) in own for place in places):
        raise SettingError("model: holds none of this optimizer's parameters; pass the model it was built for")
