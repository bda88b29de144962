"""Step in the backward pass: each gradient is used as soon as it is there and then freed, so only one is held.

The low-rank gradients of several micro-batches of a projected weight are summed, ``R <- R + G Q``, and so are the
sketches of a residual that has them. The gradient itself is summed where a basis is due, where a residual needs all of
it, and for parameters that are not projected. With the last micro-batch the parameter takes its step.
``optimizer.step()`` is called as usual; it moves the schedule on.

Sources: LOMO (Lv et al. 2023, arXiv 2306.09782) and GaLore's layer-wise mode (Zhao et al. 2024, arXiv 2403.03507).
Deviations from GaLore's code: there is one optimizer and not one for each parameter, so schedulers, state and clipping
work on it. Micro-batches accumulate.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from subspan import distributed
from subspan.parts import Rule
from subspan.step.frame import frame_of
from subspan.step.method import Method
from subspan.step.parameters import step_on_
from subspan.step.refresh import low_rank_suffices
from subspan.step.weights import Inside
from subspan.step.work import Slot, work_of
from subspan.utils.checks import DIVISORS, is_divisor
from subspan.utils.errors import SettingError

Clip = Literal["none", "per_param", "lagged_global"]


class Stepper(Protocol):
    """What ``StepInBackward`` asks of the optimizer."""

    method: Method
    inside: Inside
    param_groups: list[dict[str, Any]]
    state: Any

    def slots(self) -> Iterable[Slot]:
        """Return where each parameter is kept."""

    def follow(self, *, in_pass: bool) -> None:
        """Fit the state to what the parameters are now."""


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
            "'lagged_global' to enable_step_in_backward, in place of clip_grad_norm_; a GradScaler cannot be used; and "
            "call optimizer.step() after the last micro-batch, before the next backward pass"
        )


class StepInBackward:
    """The hooks of one optimizer, and what they hold between micro-batches.

    Args:
        model: the module that is trained; its forward pass tells whether DistributedDataParallel wraps it. ``None`` for
            a copy, which has not been put into a wrapper yet.
    """

    def __init__(
        self, optimizer: Stepper, model: nn.Module | None, accumulate: int, clip: Clip, max_norm: float
    ) -> None:
        self.optimizer, self.accumulate, self.clip, self.max_norm = optimizer, accumulate, clip, max_norm
        self.seen: dict[Tensor, int] = {}
        self._low_rank: dict[Tensor, Tensor] = {}
        self._squares: list[tuple[Tensor, Tensor]] = []
        self._rules: dict[int, Rule] = {}
        self._slots: dict[Tensor, Slot] = {}
        self._handles: list[Any] = []
        self._hook()
        if clip == "lagged_global":  # from the start, because a checkpoint is loaded into the keys that are there
            optimizer.param_groups[0].setdefault("lagged_norm", 0.0)
        if model is not None and distributed.several_processes():
            self._handles.append(model.register_forward_pre_hook(_refuse_averaging))

    def _hook(self) -> None:
        self._slots = {slot.p: slot for slot in self.optimizer.slots() if slot.p.requires_grad}
        self._hooks = {p: p.register_post_accumulate_grad_hook(self._receive) for p in self._slots}

    def follow(self) -> None:
        """Wait for the gradients of the parameters that the optimizer has now."""
        slots = {slot.p: slot for slot in self.optimizer.slots() if slot.p.requires_grad}
        if not self.enabled or slots.keys() == self._slots.keys():
            self._slots = slots
            return
        for handle in self._hooks.values():
            handle.remove()
        self._hook()

    @property
    def settings(self) -> tuple[int, Clip, float]:
        """What a copy is made with: ``accumulate``, ``clip`` and ``max_norm``."""
        return self.accumulate, self.clip, self.max_norm

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in (*self._handles, *self._hooks.values()):
            handle.remove()
        self._handles.clear()
        self._hooks.clear()

    @property
    def enabled(self) -> bool:
        """Whether the hooks are there."""
        return bool(self._hooks)

    @torch.no_grad()
    def _receive(self, p: Tensor) -> None:
        """Take a micro-batch's gradient, which is in ``p.grad``."""
        if not self.seen:
            self.optimizer.follow(in_pass=True)
        slot, seen = self._slots[p], self.seen.get(p, 0) + 1
        slot = slot._replace(group=self.optimizer.param_groups[slot.number])  # load_state_dict makes new ones
        self.seen[p] = seen
        if seen > self.accumulate:
            raise RuntimeError(
                f"gradient of {slot.name!r}: the {seen}th since the last step, with accumulate={self.accumulate}; "
                "call optimizer.step() after the last micro-batch"
            )
        method, states = self.optimizer.method, self.optimizer.state
        if low_rank_suffices(method, slot, states):
            frame = frame_of(method, slot, distributed.local_state(states[p]))
            R = frame.project(slot.layout.enter(distributed.local_gradient(p, slot.name)))
            self._low_rank[p] = self._low_rank[p].add_(R) if p in self._low_rank else R
            p.grad = None
        if seen == self.accumulate:
            self._step(slot)

    def _step(self, slot: Slot) -> None:
        p, optimizer = slot.p, self.optimizer
        R = self._low_rank.pop(p, None)
        G = self._clipped(slot, R if R is not None else distributed.local_gradient(p, slot.name))
        p.grad = None
        if slot.number not in self._rules:
            self._rules[slot.number] = optimizer.method.rule_of(slot.group)
        work = work_of(optimizer.method, slot, G, self._rules[slot.number])._replace(low_rank=R is not None)
        step_on_(optimizer.method, optimizer.state, [work], optimizer.inside)
        p.grad = _Taken(p)

    def _clipped(self, slot: Slot, G: Tensor) -> Tensor:
        if self.clip == "none":
            return G
        square = torch.linalg.vector_norm(G, dtype=torch.promote_types(G.dtype, torch.float32)).square()
        if self.clip == "per_param":
            norm = distributed.rows_of(slot.p, len(slot.layout.shape)).total(square).sqrt()
            return G * (self.max_norm / (norm + 1e-6)).clamp_max(1).to(G.dtype)
        self._squares.append((slot.p, square))
        last = self.optimizer.param_groups[0]["lagged_norm"]
        return G * min(1.0, self.max_norm / (last + 1e-6)) if math.isfinite(last) else G

    def finish(self) -> None:
        """Note that the step is over. Raises unless every parameter has had all of its micro-batches."""
        late = [(self._slots[p].name, seen) for p, seen in self.seen.items() if seen != self.accumulate]
        if late:
            name, seen = late[0]
            raise RuntimeError(
                f"step(): {name!r} has had {seen} of accumulate={self.accumulate} micro-batches; call it after the last"
            )
        if self._squares:
            self.optimizer.param_groups[0]["lagged_norm"] = distributed.global_norm(self._squares)
        self._squares.clear()
        self._rules.clear()  # a scheduler may change what they are made of
        for p in self.seen:
            p.grad = None
        self.seen.clear()


_AVERAGING = (
    "model: with DistributedDataParallel a gradient is stepped on before it has been averaged over the ranks, which then "
    "drift apart; shard the model with fully_shard, or step after the backward pass"
)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it asks Python, not tensors
def _refuse_averaging(model: nn.Module, inputs: Any) -> None:
    """Raise in the forward pass of a model that steps in the backward pass and that DistributedDataParallel wraps."""
    wrapper = distributed.running_wrapper()
    if wrapper is not None and distributed.averages(wrapper, filter(_steps_in_backward, model.parameters())):
        raise SettingError(_AVERAGING)


def _steps_in_backward(p: Tensor) -> bool:
    """Tell it by the hooks: the model may be a copy, whose optimizer has others."""
    hooks: Any = getattr(p, "_post_accumulate_grad_hooks", None) or {}
    return any(isinstance(getattr(hook, "__self__", None), StepInBackward) for hook in hooks.values())


def check(optimizer: Stepper, model: nn.Module, accumulate: object, clip: object, max_norm: object) -> None:
    """Raise unless ``optimizer`` can step in the backward pass of ``model``."""
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise SettingError(f"accumulate={accumulate!r}: expected the number of micro-batches of a step, >= 1")
    if clip not in ("none", "per_param", "lagged_global"):
        raise SettingError(f"clip={clip!r}: expected 'none', 'per_param' or 'lagged_global'")
    if not is_divisor(max_norm):
        raise SettingError(f"max_norm={max_norm!r}: expected a number > 0, {DIVISORS}")
    if any(kind.__name__ == "DistributedDataParallel" for module in model.modules() for kind in type(module).__mro__):
        raise SettingError(_AVERAGING)
    own = {id(p) for p in model.parameters()}
    if not any(id(slot.p) in own for slot in optimizer.slots()):
        raise SettingError("model: holds none of this optimizer's parameters; pass the model it was built for")
