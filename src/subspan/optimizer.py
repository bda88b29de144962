"""The step that every method of this library shares. It holds no formulas and names no method.

oriented gradient   G (m, n)          the side to compress is last; orient once, on entry, undo once, on exit
if a refresh is due Q (n, r)          Selector chooses or moves the basis; Transfer carries the moments over
project             R = G Q (m, r)
inside              U = rule(R)
combine             D = scale * U Qᵀ + residual(G, R, U)
apply               W <- (1 - lr * wd) W - lr * D
"""

import difflib
import logging
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor, nn

from subspan import distributed, summary
from subspan.groups import EXCLUDED, FLATTENED, check_settings, names_of, param_groups
from subspan.parts import Key, Residual, Rule, Selector, Transfer
from subspan.state_dict import Restorable
from subspan.step import proximal as prox
from subspan.step.backward_side import CarriedSteps
from subspan.step.carriers import layer_of
from subspan.step.in_backward import Clip, Place, StepInBackward, check
from subspan.step.layout import Layout, layout_of
from subspan.step.weights import ProjectedSteps, Work, step_inside
from subspan.storage import eight_bit as quantization
from subspan.storage.allocation import State, StateDtype
from subspan.utils.errors import SettingError

logger = logging.getLogger(__name__)

Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class SubspaceOptimizer(ProjectedSteps, CarriedSteps, Restorable):
    """An optimizer made of a selector, a rule, a residual and a transfer.

    Matrices of groups with a ``rank`` are trained inside a subspace; everything else (``rank=None``, vectors, and
    matrices
    with a side no larger than the rank) takes the rule's full-rank step at ``lr``, without ``scale``. A parameter of
    three
    dimensions is a stack of matrices (experts), each with a basis of its own; one of four or five is flattened to
    ``(out, -1)``, as is one of three in a group with ``flatten=True`` (a 1-d convolution).

    A non-finite gradient reaches moments and weights as it does in ``torch.optim``; it never reaches a basis.

    Args:
        params: a module (its ``nn.Linear`` weights are projected, except what ``exclude`` names),
            ``named_parameters()``
            (every matrix is, except what ``exclude`` names), parameter groups (those with ``rank`` are, as with
            galore_torch), or bare tensors (every matrix is).
        lr: learning rate, a float or a tensor; read at every step.
        rank: dimension of the subspace, >= 1; ``None`` for full rank.
        selector: which subspace.
        rule: which step inside it.
        residual: what becomes of the rest of the gradient.
        transfer: what becomes of the moments at a refresh: ``keep``, ``rotate``, ``moments`` or ``reset``.
        update_proj_gap: steps between refreshes, >= 1.
        scale: factor on the step of projected matrices. ``lr * scale`` is their learning rate: halve one, double the
            other.
        proj_type: the side to compress: ``std`` (the shorter), ``reverse_std`` (the longer), ``right`` (columns) or
            ``left`` (rows).
        weight_decay: decoupled, multiplied by ``lr``; of every parameter, as in torch (``create`` spares biases and
            norms).
        stagger: spread the refreshes of different matrices over the period, after the first, so that no step pays for
            all.
            ``None``: of backward-side layers, whose first bases are then drawn at random, and not of others.
        state_dtype: ``"float32"``, or ``"int8"`` for moments in 8 bits (needs bitsandbytes).
        min_8bit_size: entries of the smallest moment that is kept in 8 bits, >= 1; vectors never are.
        eta: strength of RSO's proximal term, ``||B||² / (2 eta)``, B the way since the last refresh; > 0. ``None`` is
            none.
        proximal: ``"coupled"`` into the gradient, or ``"decoupled"``; see ``proximal.py``.
        bf16_stochastic_round: round updates of bf16 weights at random, right on average, where rounding to nearest
            would drop
            small ones.
        seed: of every random choice. A choice depends on the seed, the parameter's name and the step alone.
        targets: with a module or named parameters: ``"all-linear"``, a list of substrings, or a regular expression.
        exclude: likewise: regular expressions of names that stay full rank.

    Raises:
        ValueError: an argument out of range, a target that matches nothing, a ``rank`` for a group without a matrix.
    """

    _in_backward: StepInBackward | None = None

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        rank: int | None = None,
        *,
        selector: Selector,
        rule: Rule,
        residual: Residual,
        transfer: Transfer = "keep",
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        weight_decay: float = 0.0,
        stagger: bool | None = None,
        eta: float | None = None,
        proximal: str = "coupled",
        state_dtype: StateDtype = "float32",
        min_8bit_size: int = quantization.SMALLEST,
        bf16_stochastic_round: bool = False,
        seed: int = 0,
        targets: str | list[str] = "all-linear",
        exclude: tuple[str, ...] = EXCLUDED,
    ) -> None:
        if transfer not in typing.get_args(Transfer):
            raise SettingError(
                f"transfer={transfer!r}: expected one of {', '.join(typing.get_args(Transfer))}; 'keep' is usual"
            )
        for what, part, method, example in (
            ("selector", selector, "refresh_", "selectors.Importance()"),
            ("rule", rule, "update_", "rules.AdamW()"),
            ("residual", residual, "combine", "residuals.Discard()"),
        ):
            if isinstance(part, type) or not is_dataclass(part) or not hasattr(part, method):
                raise SettingError(f"{what}={part!r}: expected a {what}, such as subspan.{example}")
        if residual.needs_orthonormal and not selector.orthonormal:
            raise SettingError(
                f"residual={residual!r}: needs an orthonormal basis, and that of {selector!r} is not; use "
                "residuals.Discard(), or a selector such as selectors.Random()"
            )
        self.selector, self.rule, self.residual = selector, rule, residual
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise SettingError(f"seed={seed!r}: expected a whole number")
        self.transfer, self.seed = transfer, seed
        defaults = {
            "lr": lr,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "weight_decay": weight_decay,
            "flatten": False,
            "eta": eta,
            "proximal": proximal,
            "state_dtype": state_dtype,
            "min_8bit_size": min_8bit_size,
            "bf16_stochastic_round": bf16_stochastic_round,
            "clock": 0,
            # Compared on loading: moments mean nothing in another method's basis.
            "method": f"selector {_kind(selector)}, rule {_kind(rule)}, residual {_kind(residual)}, transfer {transfer}",
        }
        super().__init__(_as_groups(params, rank, targets, exclude), defaults | asdict(rule))
        self.stagger = any(layer_of(p) is not None for p in self._parameters()) if stagger is None else stagger
        self._bind()
        if rank is not None and all(p.ndim < 2 for p in self._parameters()):
            raise SettingError(_no_matrix(rank))
        summary.announce(self.summary())
        asked = any(group["rank"] is not None for group in self.param_groups)
        if asked and not any("refresh_step" in state for state in self.state.values()):
            self.warn_of_full_rank()

    # --- construction -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and allocate all of its state (contract R3). Nothing is added if a setting is wrong."""
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise SettingError(f"params: {param_group!r} is no parameter group; expected a dict with 'params'")
        for key in param_group.keys() - {"params", "param_names", *self.defaults}:
            # Other libraries add keys of their own (contract R8), so this is no error.
            near = difflib.get_close_matches(key, self.defaults, n=1, cutoff=0.7)
            if near:
                logger.warning("parameter group: %r is not used here; did you mean %r?", key, near[0])
        if self.param_groups:  # schedules run on the steps of the run, also of a group that comes later
            param_group.setdefault("clock", self.param_groups[0]["clock"])
        settings = self.defaults | param_group
        check_settings(settings)
        rule = self._rule(settings)
        if settings["state_dtype"] == "int8":
            quantization.check_available()
            if not rule.moments:
                raise SettingError(
                    f"state_dtype='int8': {rule} keeps no moments; use 'float32', or a rule with momentum"
                )
        if settings["eta"] is not None and self.selector.tracks:
            raise SettingError(
                f"eta={settings['eta']!r}: pulls towards where the weight was when its basis was chosen, and "
                f"{self.selector!r} "
                "moves the basis at every step; use eta=None, or a selector that is refreshed, such as "
                "selectors.Random()"
            )
        own_rank = param_group.get("rank")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            # A rank of the constructor may meet a group of biases; one that the group itself sets may not.
            if own_rank is not None and group["params"] and all(p.ndim < 2 for p in group["params"]):
                raise SettingError(_no_matrix(own_rank))
            for p in group["params"]:
                self._check_carried(p)
                self._check_spread(p, group)
                self.state[p] = self._allocate(p, group)
            if "stagger" in vars(self):  # else the constructor binds, when all groups are there
                self._bind()
        except ValueError:
            for p in self.param_groups.pop()["params"]:
                self.state.pop(p, None)
            raise

    def _allocate(self, p: Tensor, group: Mapping[str, Any]) -> State:
        here = distributed.local(p)
        state = self._state_of(p, here, group)
        length = None
        if distributed.is_spread(p):
            length = p.shape[0] if p.ndim else None
            longer = self._state_of(
                p, torch.empty((len(here) + 1, *here.shape[1:]), dtype=p.dtype, device="meta"), group
            )
            grown = {
                key for key, value in state.items() if isinstance(value, Tensor) and value.shape != longer[key].shape
            }
        if group["state_dtype"] == "int8":
            state = quantization.pack(state, self._rule(group).moments, group["min_8bit_size"], length)
        return distributed.spread_state(p, state, grown) if distributed.is_spread(p) else state

    def _state_of(self, p: Tensor, here: Tensor, group: Mapping[str, Any]) -> State:
        """The state of ``p`` for those of its rows that are ``here``."""
        layout, rule, rank = _layout(p, group, here), self._rule(group), group["rank"]
        # Integers of the host, not tensors: the schedule must not wait for a device.
        refreshes = {"refresh_step": -1, "skipped_refreshes": 0}  # the clock at the last one; -1 before the first
        if (layer := layer_of(p)) is not None:
            state = {**rule.init(here, tuple(here.shape), -2), **prox.init(here, tuple(here.shape), group)}
            if layer.number == 0:  # it keeps the basis that its projection shares
                state |= {**self.selector.init(layer.weight, p.shape[1]), **refreshes}
            return state
        if layout.side is None:
            return rule.init(here, layout.shape, layout.rows)
        G = layout.enter(here)
        shape = (*G.shape[:-1], rank)
        parts = (rule.init(here, shape, layout.rows), self.selector.init(G, rank), self.residual.init(G))
        return {
            key: value for part in (*parts, prox.init(here, shape, group), refreshes) for key, value in part.items()
        }

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        """The rule with the settings of ``group``, where schedulers change them; raises if one is out of range."""
        rule: Any = self.rule
        return replace(rule, **{field.name: group[field.name] for field in fields(rule)})

    # --- the step -----------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. ``closure`` is run with gradients enabled; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._in_backward is not None:
            self._in_backward.finish()
        # Those that have stepped in the backward pass have no gradient any more.
        places = [place for place in self._places() if place.p.grad is not None]
        for place in places:
            if place.p not in self.state:
                raise SettingError(
                    f"params: {place.name!r} {tuple(place.p.shape)} has been put into its group since, and has no "
                    "state. If "
                    f"it is another tensor of the same model, load a state_dict of this optimizer. {FLATTENED}"
                )
        self._take([self._work(place, distributed.local_gradient(place.p, place.name)) for place in places])
        for group in self.param_groups:
            group["clock"] += 1
        self._plan()
        return loss

    def _take(self, works: list[Work]) -> None:
        """Step on these parameters."""
        changes = self._choose_spread(works)
        for work in works:
            if (layer := layer_of(work.p)) is not None:
                self._update_carried(work, layer)
            else:
                self._update(work, changes)

    def _places(self) -> Iterator[Place]:
        """Every parameter in order."""
        order = 0  # among projected matrices, for staggering
        for number, group in enumerate(self.param_groups):
            for name, p in zip(names_of(number, group), group["params"], strict=True):
                layout = _layout(p, group)
                yield Place(p, name, number, group, layout, order)
                order += layout.side is not None

    def _work(self, place: Place, G: Tensor) -> Work:
        key = Key(self.seed, place.name, place.group["clock"])
        return Work(place.p, G, place.layout, place.group, self._rule(place.group), key, place.order)

    def enable_step_in_backward(
        self, model: nn.Module, accumulate: int = 1, clip: Clip = "none", max_norm: float = 1.0
    ) -> StepInBackward:
        """Step on each parameter in the backward pass, as soon as its gradient is there, and free it: one is held at a
        time.

        Call it once the model is where and as it is to be trained (after ``fully_shard``). ``step()``, schedulers,
        hooks and
        ``state_dict`` are used as before; save after a step. Until ``step()`` is called nobody else can read a
        gradient:
        ``clip_grad_norm_`` is refused. See ``in_backward.py``.

        Args:
            model: holds this optimizer's parameters.
            accumulate: micro-batches (backward passes) of a step; their gradients are added up.
            clip: ``"none"``; ``"per_param"``, the norm of each parameter's gradient to ``max_norm``;
                ``"lagged_global"``, all
                gradients by what the global norm of the last step would ask for. The norm is that of ``R`` between
                refreshes.
            max_norm: > 0.

        Returns:
            The hooks; ``remove()`` ends it.

        Raises:
            ValueError: an argument out of range, or the model's gradients are averaged by DistributedDataParallel.
        """
        check(self, model, accumulate, clip, max_norm)
        if self._in_backward is not None:
            self._in_backward.remove()
        self._in_backward = StepInBackward(self, accumulate, clip, max_norm)
        return self._in_backward

    def compile(self, **options: Any) -> None:
        """Let ``torch.compile`` fuse what the rule does with ``R`` and its moments; in place, as
        ``torch.nn.Module.compile``.

        What differs (rule, dtype, number of dimensions) is compiled at its first step, as often as torch's recompile
        limit
        allows in one process (``torch._dynamo.config.recompile_limit``, 8 as it comes); what is beyond runs as it is.
        The
        results equal those without it to rounding. Copies and pickles of the optimizer are not compiled. Not worth it
        for
        AdamW on a CPU, where torch's fused kernel is used as it is.

        Args:
            options: those of ``torch.compile``.
        """
        self._inside = torch.compile(step_inside, **options)

    # --- looking at it ------------------------------------------------------------------------------------------------

    @staticmethod
    def warn_of_full_rank() -> None:
        """Zero projected matrices is never a silent outcome (contract R13)."""
        logger.warning("no matrix is projected, so this is full-rank training: give a rank below the matrices' sides")

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def summary(self) -> str:
        """The parts, and one table: what is projected, to which rank, the bytes of state held, and what AdamW would
        hold.
        """
        parts = f"{self.selector!r}, {self.rule!r}, {self.residual!r}, transfer={self.transfer!r}"
        return f"{parts}\n{summary.table(self.param_groups, self.state)}"


def _kind(part: object) -> str:
    """The kinds of a part: ``Switch(Dominant, Random)``; settings may change between runs, kinds may not."""
    inner = [_kind(value) for value in vars(part).values() if is_dataclass(value)]
    return type(part).__name__ + (f"({', '.join(inner)})" if inner else "")


def _no_matrix(rank: int) -> str:
    return f"rank={rank}: there is no matrix among the parameters to project. {FLATTENED}"


def _layout(p: Tensor, group: Mapping[str, Any], here: Tensor | None = None) -> Layout:
    """How the rows of ``p`` that are here are seen. If they are some of all, the columns are compressed."""
    layout = layout_of(p.shape, group["rank"], group["proj_type"], group["flatten"])
    if not distributed.is_spread(p) or p.ndim == 0:
        return layout
    here = distributed.local(p) if here is None else here
    return Layout((len(here), *layout.shape[1:]), layout.side and "right")


def _as_groups(params: Params, rank: int | None, targets: str | list[str], exclude: tuple[str, ...]) -> list[Any]:
    if isinstance(params, nn.Module):
        return param_groups(params, rank=rank, targets=targets, exclude=exclude)
    if isinstance(params, (Tensor, dict)):
        raise SettingError(
            f"params: got a {type(params).__name__}; expected a module, its named_parameters(), groups, or tensors"
        )
    given: list[Any] = list(params)
    if given and isinstance(given[0], tuple):
        return param_groups(given, rank=rank, targets=targets, exclude=exclude)
    if targets != "all-linear" or exclude != EXCLUDED:
        raise SettingError(
            f"targets={targets!r}, exclude={exclude!r}: choose by name, and groups and bare tensors are taken as "
            "they come; "
            "leave both out, or pass the model, its named_parameters(), or what subspan.param_groups makes of them"
        )
    if not given or isinstance(given[0], dict):
        return given
    if rank is not None and sum(p.ndim > 1 for p in given) > 1:
        logger.warning(
            "parameters without names: every matrix is projected, embeddings and heads too; pass "
            "model.named_parameters()"
        )
    return given
