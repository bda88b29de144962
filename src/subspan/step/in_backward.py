"""Step in the backward pass: each gradient is used as soon as it is there and then freed, so only one is held.

The low-rank gradients of several micro-batches of a projected weight are summed, ``R <- R + G Q``, and so are the
sketches of a residual that has them. The gradient itself is summed where a basis is due, where a residual needs all of
it, and for parameters that are not projected. With the last micro-batch the parameter takes its step.
``optimizer.step()`` is called as usual; it moves the schedule on. It also takes the steps of parameters that have had
fewer micro-batches, with what they got: at the short end of an epoch, or where a layer was used in some of them only.

In place of a gradient that is gone, ``p.grad`` has a stand-in. It tells the norm of what was used, so that trainers can
log it, and refuses everything else.

Sources: LOMO (Lv et al. 2023, arXiv 2306.09782) and GaLore's layer-wise mode (Zhao et al. 2024, arXiv 2403.03507).
Deviations from GaLore's code: there is one optimizer and not one for each parameter, so schedulers, state and clipping
work on it. Micro-batches accumulate.
"""

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, Protocol

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
from subspan.utils.compiler import untraced
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


_GONE = (
    "this gradient has been stepped on in the backward pass and is gone. To clip, pass clip='per_param' or "
    "'lagged_global' to enable_step_in_backward, in place of clip_grad_norm_; a GradScaler cannot be used; and "
    "call optimizer.step() after the last micro-batch, before the next backward pass"
)
_aten = torch.ops.aten


class _StandIn(Tensor):
    """Stands in ``p.grad`` for a gradient that has been used, or that is being summed over micro-batches.

    It stands for the local rows; where ``p`` is a DTensor, a DTensor holds it. It answers three questions. Autograd
    adds the gradient of the next micro-batch to it. ``clip_grad_norm_`` asks for its norm, and multiplies it by a
    factor, which must change nothing: see ``StepInBackward.check_factor``. Whoever reads it otherwise is told that the
    gradient is gone.

    Attributes:
        hooks: the ``StepInBackward`` that has taken the gradient, and
        parameter: the parameter; both are weak references, because ``p.grad`` is no link that Python can follow.
        added: the gradient of the next micro-batch, until the hook takes it.
    """

    hooks: Callable[[], "StepInBackward | None"]
    parameter: Callable[[], Tensor | None]
    added: Tensor | None

    @staticmethod
    def __new__(cls, p: Tensor, hooks: "StepInBackward") -> "_StandIn":
        own = distributed.local(p)
        made: _StandIn = Tensor._make_wrapper_subclass(
            cls, own.shape, strides=own.stride(), dtype=own.dtype, device=own.device, requires_grad=False
        )
        made.hooks, made.parameter, made.added = weakref.ref(hooks), weakref.ref(p), None
        return made

    def __init__(self, p: Tensor, hooks: "StepInBackward") -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        self, *others = args
        if func is _aten._foreach_norm.Scalar:  # FSDP2's gradients come as lists
            return [torch.linalg.vector_norm(one, *others, **kwargs or {}) for one in self]
        if func is _aten._foreach_mul_.Tensor:
            for one in self:
                one.mul_(*others)
            return None
        if func is _aten.detach.default:
            return self
        hooks, p = (self.hooks(), self.parameter()) if isinstance(self, cls) else (None, None)
        if func is _aten.zero_.default:  # zero_grad(set_to_none=False)
            if hooks is not None and p is not None:
                hooks.drop(p)
            return self
        if hooks is not None and p is not None:
            if func is _aten.view.default and tuple(others[0]) == self.shape:  # a DTensor holds a view
                return cls(p, hooks)
            if func is _aten.add_.Tensor and not kwargs and not hooks.has_stepped(p):
                self.added = others[0]
                return self
            if func is _aten.linalg_vector_norm.default and _is_plain_norm(*others):
                norm = hooks.norm_of(p)
                return norm if (kwargs or {}).get("dtype") is None else norm.to(kwargs["dtype"])
            if func is _aten.mul_.Tensor and isinstance(others[0], Tensor) and others[0].ndim == 0:
                hooks.check_factor(others[0])
                return self
        raise RuntimeError(_GONE)


def _is_plain_norm(order: float = 2, dim: object = None, keepdim: bool = False) -> bool:
    return order == 2 and dim is None and not keepdim


def _stand_in(p: Tensor) -> _StandIn | None:
    """Return what stands in ``p.grad``, or ``None`` if that is a gradient, or nothing."""
    held = distributed.local(p.grad)
    return held if isinstance(held, _StandIn) else None


class _Sum(NamedTuple):
    """What the micro-batches of a step have given to a parameter so far."""

    total: Tensor
    """The sum of their gradients' local rows, or of the low-rank gradients of these."""
    low_rank: bool


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
        self._sums: dict[Tensor, _Sum] = {}
        self._squares: dict[Tensor, Tensor] = {}
        self._factor: Tensor | None = None
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
        """Take a micro-batch's gradient, which autograd has put into ``p.grad`` or added to the stand-in there."""
        if not self.seen:
            self.optimizer.follow(in_pass=True)
        slot = self._slot(p)
        stand_in = _stand_in(p)
        if stand_in is None and self.is_summing(p):  # zero_grad has taken it away, and with it the sum
            self.drop(p)
        seen = self.seen.get(p, 0) + 1
        if seen > self.accumulate:
            raise RuntimeError(
                f"gradient of {slot.name!r}: number {seen} since the last step, with accumulate={self.accumulate}; "
                "call optimizer.step() after the last micro-batch"
            )
        self.seen[p] = seen
        method, states = self.optimizer.method, self.optimizer.state
        added = None if stand_in is None else stand_in.added
        part = distributed.local_gradient(p, slot.name) if added is None else added
        if low_rank := low_rank_suffices(method, slot, states):
            frame = frame_of(method, slot, distributed.local_state(states[p]))
            part = frame.project(slot.layout.enter(part))
        p.grad = None
        self._sums[p] = _Sum(self._sums[p].total.add_(part) if p in self._sums else part, low_rank)
        if seen == self.accumulate:
            self._step(slot)
        p.grad = distributed.placed_like(p, _StandIn(p, self))

    def _slot(self, p: Tensor) -> Slot:
        slot = self._slots[p]
        return slot._replace(group=self.optimizer.param_groups[slot.number])  # load_state_dict makes new ones

    def _step(self, slot: Slot) -> None:
        optimizer = self.optimizer
        total, low_rank = self._sums.pop(slot.p)
        self._squares[slot.p] = _square(total)
        G = self._clipped(slot, total)
        if slot.number not in self._rules:
            self._rules[slot.number] = optimizer.method.rule_of(slot.group)
        work = work_of(optimizer.method, slot, G, self._rules[slot.number])._replace(low_rank=low_rank)
        step_on_(optimizer.method, optimizer.state, [work], optimizer.inside)

    def _clipped(self, slot: Slot, G: Tensor) -> Tensor:
        if self.clip == "none":
            return G
        if self.clip == "per_param":
            square = self._squares[slot.p].clone()  # of the local rows; ``total`` may overwrite it
            norm = distributed.rows_of(slot.p, len(slot.layout.shape)).total(square).sqrt()
            return G * (self.max_norm / (norm + 1e-6)).clamp_max(1).to(G.dtype)
        last = self.optimizer.param_groups[0]["lagged_norm"]
        return G * min(1.0, self.max_norm / (last + 1e-6)) if math.isfinite(last) else G

    @torch.no_grad()
    def finish(self) -> None:
        """Step on what has had fewer micro-batches than ``accumulate``, and note that the step is over."""
        for p in self._slots:  # in this order on every rank
            if self.is_summing(p) and _stand_in(p) is not None:  # otherwise zero_grad has dropped the sum
                self._step(self._slot(p))
        if self.clip == "lagged_global" and self._squares:
            self.optimizer.param_groups[0]["lagged_norm"] = distributed.global_norm(list(self._squares.items()))
        for kept in (self.seen, self._sums, self._squares, self._rules):  # a scheduler may change the rules
            kept.clear()
        for p in self._slots:
            if _stand_in(p) is not None:
                p.grad = None

    # --- what the stand-ins ask ---------------------------------------------------------------------------------------

    def is_summing(self, p: Tensor) -> bool:
        """Whether ``p`` has had a part of its micro-batches, and has not stepped yet."""
        return p in self._sums

    def has_stepped(self, p: Tensor) -> bool:
        """Whether ``p`` has had all of its micro-batches, and has stepped on them."""
        return p in self.seen and p not in self._sums

    def drop(self, p: Tensor) -> None:
        """Forget the micro-batches of ``p``, as ``zero_grad`` asks, unless it has stepped on them."""
        if self._sums.pop(p, None) is not None:
            del self.seen[p]

    def norm_of(self, p: Tensor) -> Tensor:
        """Return the norm of what the step of ``p`` has used, or will use, before clipping: of ``G``, or of ``R``.

        It is that of the local rows.
        """
        return (_square(self._sums[p].total) if self.is_summing(p) else self._squares[p]).sqrt()

    def check_factor(self, factor: Tensor) -> None:
        """Raise if ``clip_grad_norm_``, which multiplies gradients by ``factor``, would clip what was not clipped.

        A factor of 1 or of no number changes nothing. Any other is the one of ``max_norm``, which ``clip`` has seen to
        in its own way. Waits for the device, once for each call of ``clip_grad_norm_``.
        """
        if factor is self._factor:
            return
        value = float(factor)
        if value < 1:
            if self.clip == "none":
                raise RuntimeError(_GONE)
            squares = self._squares | {p: _square(own.total) for p, own in self._sums.items()}
            norm = distributed.global_norm(list(squares.items()))
            if not math.isclose(value, self.max_norm / (norm + 1e-6), rel_tol=0.01):
                raise RuntimeError(
                    f"clip_grad_norm_: max_norm={value * (norm + 1e-6):.3g}, but gradients have been clipped in the "
                    f"backward pass with clip={self.clip!r} and max_norm={self.max_norm}; give both the same max_norm "
                    "and all parameters of the optimizer, or leave clip_grad_norm_ out"
                )
        self._factor = factor


def _square(G: Tensor) -> Tensor:
    """Return the squared norm of ``G``, in fp32 at least."""
    return torch.linalg.vector_norm(G, dtype=torch.promote_types(G.dtype, torch.float32)).square()


_AVERAGING = (
    "model: with DistributedDataParallel a gradient is stepped on before it has been averaged over the ranks, which then "
    "drift apart; shard the model with fully_shard, or step after the backward pass"
)


@untraced  # it asks Python, not tensors
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
