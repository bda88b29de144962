"""``SubspaceOptimizer``: every method of this library is this optimizer with other parts.

It calls the parts of a step in this order, holds no formulas and names no method:

    oriented gradient   G (m, n)          the side to compress is last; orient once, on entry, undo once, on exit
    if a refresh is due Q (n, r)          Selector chooses or moves the basis; Transfer carries the moments over
    project             R = G Q (m, r)
    inside              U = rule(R)
    combine             D = scale * U Qᵀ + residual(G, R, U)
    apply               W <- (1 - lr * wd) W - lr * D

``step/plain.py`` states the step on bare tensors. Here ``step()`` collects what is to be done and hands it to
``step.parameters.step_on_``, which calls ``step.weights`` and ``step.backward_side``.
"""

import difflib
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from subspan import distributed, summary
from subspan.following import Following
from subspan.groups import EXCLUDED, param_groups
from subspan.parts import Residual, Rule, Selector, Transfer
from subspan.state_dict import Restorable
from subspan.step.backward_side import Carriers, check_carrier, check_ranks
from subspan.step.carriers import layer_of
from subspan.step.frame import whole_sketches
from subspan.step.in_backward import Clip, StepInBackward, check
from subspan.step.method import Method
from subspan.step.parameter_state import check_trainable, state_of
from subspan.step.parameters import step_on_
from subspan.step.settings import FIELDS, AllStepOptions, StepSettings, check_names, spelled_out
from subspan.step.shardable import check_shardable, check_sharded
from subspan.step.weights import step_inside
from subspan.step.work import names_of, work_of
from subspan.utils.errors import SettingError
from subspan.utils.missing_matrices import FLATTENED
from subspan.utils.ranks import Rank

logger = logging.getLogger(__name__)

_OF_GROUPS = ("params", "param_names", "initial_lr", "lagged_norm", "transposed")
"""Keys that torch, its schedulers, a step in the backward pass and ``param_groups`` put into a parameter group."""

Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class SubspaceOptimizer(Restorable):
    """An optimizer made of a selector, a rule, a residual and a transfer.

    Matrices of groups with a ``rank`` are trained inside a subspace. Everything else takes the rule's full-rank step at
    ``lr``, without ``scale``: groups with ``rank=None``, vectors, and matrices with a side no larger than the rank. A
    parameter of three dimensions is a stack of matrices (experts), each with a basis of its own. One of four or five is
    flattened to ``(out, -1)``, as is one of three in a group with ``flatten=True`` (a 1-d convolution). The matrices of
    a group with ``transposed=True`` are ``(in, out)``, as those of transformers' ``Conv1D`` are, and not ``(out, in)``.

    A non-finite gradient reaches moments and weights as it does in ``torch.optim``; it never reaches a basis.

    Args:
        params: a module (the weights of its linear layers are projected, except what ``exclude`` names),
            ``named_parameters()`` (every matrix is, except what ``exclude`` names), parameter groups (those with
            ``rank`` are, as with galore_torch), or bare tensors (every matrix is).
        lr: learning rate, a float or a tensor; it is read at every step.
        rank: dimension of the subspace, >= 1, or its share of each compressed side, such as 0.25; ``None`` stands for
            full rank.
        selector: chooses the subspace.
        rule: takes the step inside it.
        residual: uses the rest of the gradient.
        transfer: what becomes of the moments at a refresh: ``keep``, ``rotate``, ``moments`` or ``reset``.
        stagger: spread the refreshes of different matrices over the period, after the first, so that no step pays for
            all. ``None`` does so only for backward-side layers, whose first bases are then drawn at random.
        seed: seed of every random choice. A choice depends only on the seed, the parameter's name and the step.
        targets: with a module or named parameters: ``"all-linear"``, a list of substrings, or a regular expression.
        exclude: regular expressions of names that stay full rank; one that begins with ``+`` is added to the default.

    The other keywords are the settings of ``step.settings.StepSettings``, such as ``update_proj_gap=200``.

    Attributes:
        method: the parts, the transfer, the seed and the staggering: a frozen ``step.method.Method``.

    Raises:
        SettingError: an argument is out of range, a target matches nothing, or a group with a ``rank`` has no matrix.
    """

    _built = True

    @spelled_out(AllStepOptions)
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        rank: Rank | None = None,
        *,
        selector: Selector,
        rule: Rule,
        residual: Residual,
        transfer: Transfer = "keep",
        stagger: bool | None = None,
        seed: int = 0,
        targets: str | list[str] = "all-linear",
        exclude: tuple[str, ...] = EXCLUDED,
        **settings: Unpack[AllStepOptions],
    ) -> None:
        check_names(settings, SubspaceOptimizer.__init__, "SubspaceOptimizer")
        self.method = Method(selector, rule, residual, transfer, seed, bool(stagger))
        own = {name: field.default for name, field in FIELDS.items()} | {"lr": lr, "rank": rank, **settings, "clock": 0}
        own["method"] = self.method.text
        defaults = own | {field.name: getattr(rule, field.name) for field in fields(rule)}
        if taken := sorted({field.name for field in fields(rule)} & {*own, *_OF_GROUPS}):
            raise SettingError(
                f"rule={rule!r}: its setting {taken[0]!r} is one of every parameter group, which it would overwrite; "
                "give the rule's another name"
            )
        self.carriers, self.following = Carriers(self), Following(self)
        self._built = False
        super().__init__(_as_groups(params, rank, targets, exclude), defaults)
        self._built = True
        if isinstance(params, nn.Module):
            self.following.watch(params)
        check_ranks(self.slots(), rank)
        if stagger is None and any(layer_of(p) is not None for p in self._parameters()):
            self.method = replace(self.method, stagger=True)
        self.carriers.bind()
        if rank is not None and all(p.ndim < 2 for p in self._parameters()):
            raise SettingError(_no_matrix(rank))
        summary.announce(self.summary())
        if words := whole_sketches(self.method, self.slots()):
            logger.warning("%s", words)
        asked = any(group["rank"] is not None for group in self.param_groups)
        if asked and not any("refresh_step" in state for state in self.state.values()):
            self.warn_of_full_rank()

    # --- construction -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and allocate all of its state (contract R3). Nothing is added if a setting is wrong."""
        if self._built:
            self.follow(in_pass=True)
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise SettingError(f"params: {param_group!r} is no parameter group; expected a dict with 'params'")
        for key in param_group.keys() - {"params", "param_names", *self.defaults}:
            # Other libraries add keys of their own (contract R8), so this is no error.
            near = difflib.get_close_matches(key, self.defaults, n=1, cutoff=0.7)
            if near:
                logger.warning("parameter group: %r is not used here; did you mean %r?", key, near[0])
        if self.param_groups:  # schedules run on the steps of the run, also of a group that comes later
            param_group.setdefault("clock", self.param_groups[0]["clock"])
        self._check_group(self.defaults | param_group)
        self._take_form(param_group)
        own_rank = param_group.get("rank")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            # A rank of the constructor may meet a group of biases; one that the group itself sets may not.
            if own_rank is not None and group["params"] and all(p.ndim < 2 for p in group["params"]):
                raise SettingError(_no_matrix(own_rank))
            for name, p in zip(names_of(self.param_groups)[-1], group["params"], strict=True):
                check_trainable(p, name, group)
                check_carrier(self.method, p)
                check_sharded(self.method, p, group)
                self.state[p] = state_of(self.method, p, group)
            self.following.note(group)
            group["method"] = self.method.text  # whatever group it was made from
            if self._built:  # else the constructor does this, when all groups are there
                check_ranks(self.slots(), None)
                self.carriers.bind()
        except Exception:
            for p in self.param_groups.pop()["params"]:
                self.state.pop(p, None)
            del self.following.built[len(self.param_groups) :]
            raise

    def _take_form(self, param_group: dict[str, Any]) -> None:
        """Give the parameters of a later group names, or take them away, as the first groups have them or not.

        Those who unfreeze a model in the course of training pass bare tensors, and torch wants one form.
        """
        given = param_group["params"]
        if not self.param_groups or isinstance(given, set):  # which torch refuses
            return
        params = [given] if isinstance(given, Tensor) else list(given)
        param_group["params"] = params
        named = [isinstance(one, tuple) for one in params]
        if "param_names" in self.param_groups[0] and not any(named) and "param_names" not in param_group:
            param_group["params"] = self.following.named(params, len(self.param_groups))
        elif "param_names" not in self.param_groups[0] and all(named):
            param_group["params"] = [p for _, p in params]

    def _check_group(self, settings: Mapping[str, Any]) -> None:
        """Raise unless the settings of a group are in range and go with the method."""
        own, rule = StepSettings.of(settings), self.method.rule_of(settings)
        if own.state_dtype == "int8" and not rule.moments:
            raise SettingError(f"state_dtype='int8': {rule} keeps no moments; use 'float32', or a rule with momentum")
        if own.eta is not None and self.method.selector.tracks:
            raise SettingError(
                f"eta={own.eta!r}: pulls towards where the weight was when its basis was chosen, and "
                f"{self.method.selector!r} moves the basis at every step; use eta=None, or a selector that is refreshed, "
                "such as selectors.Random()"
            )

    # --- the step -----------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step. ``closure`` is run with gradients enabled; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._in_backward is not None:
            self._in_backward.finish()
        self.carriers.meet()
        rules = [self.method.rule_of(group) for group in self.param_groups]
        works = []
        for slot in self.slots():
            if slot.p.grad is None:  # those that have stepped in the backward pass have no gradient any more
                continue
            gradient = distributed.local_gradient(slot.p, slot.name)
            works.append(work_of(self.method, slot, gradient, rules[slot.number]))
        if not works and self._in_backward is None:
            self.following.say_that_nothing_is_trained()
        step_on_(self.method, self.state, works, self.inside)
        self.carriers.choose_late()
        for group in self.param_groups:
            group["clock"] += 1
        self.carriers.schedule()
        return loss

    def enable_step_in_backward(
        self, model: nn.Module, accumulate: int = 1, clip: Clip = "none", max_norm: float = 1.0
    ) -> StepInBackward:
        """Step on each parameter in the backward pass, as soon as its gradient is there, and free the gradient.

        So only one gradient is held at a time. Call this when the model is on its device and sharded (after
        ``fully_shard``). ``step()``, schedulers, hooks and ``state_dict`` are used as before; save after a step.
        Nobody else can read a gradient. Only its norm is known, so that trainers can log it: between refreshes it is
        the norm of ``R``, which is smaller than that of ``G``. ``clip_grad_norm_`` returns the norm of what was used,
        before clipping, and changes nothing. It raises where it would have to clip, unless ``clip`` has done so to the
        same ``max_norm``. Copies and pickles step in the backward pass too. See ``step/in_backward.py``.

        Args:
            model: holds this optimizer's parameters.
            accumulate: largest number of micro-batches (backward passes) of a step; their gradients are added up. A
                parameter steps with the last of them. If it has had fewer, ``step()`` steps on these.
            clip: ``"none"`` does not clip. ``"per_param"`` scales each parameter's gradient down to ``max_norm``.
                ``"lagged_global"`` scales all gradients by the factor that the global norm of the last step asks for;
                the first step is not clipped.
            max_norm: largest norm, > 0.

        Returns:
            The hooks; their ``remove()`` ends it.

        Raises:
            SettingError: an argument is out of range, or DistributedDataParallel averages the model's gradients.
        """
        check(self, model, accumulate, clip, max_norm)
        if self._in_backward is not None:
            self._in_backward.remove()
        self._in_backward = StepInBackward(self, model, accumulate, clip, max_norm)
        return self._in_backward

    def compile(self, **options: Any) -> None:
        """Let ``torch.compile`` fuse what the rule does with ``R`` and its moments, in place as ``nn.Module.compile``.

        Each combination of rule, dtype and number of dimensions is compiled at its first step, as often as torch's
        recompile limit allows in one process (``torch._dynamo.config.recompile_limit``, 8 by default). Beyond that
        limit the step runs uncompiled. The results are equal up to rounding. Copies and pickles of the optimizer are
        not compiled. Compiling is not worth it for AdamW on a CPU, where torch's fused kernel is used anyway.

        Args:
            options: those of ``torch.compile``.
        """
        self.inside = torch.compile(step_inside, **options)

    # --- looking at it ------------------------------------------------------------------------------------------------

    @property
    def selector(self) -> Selector:
        """What chooses the subspace."""
        return self.method.selector

    @property
    def rule(self) -> Rule:
        """What steps inside the subspace, with the settings that it had when the optimizer was built."""
        return self.method.rule

    @property
    def residual(self) -> Residual:
        """What uses the rest of the gradient."""
        return self.method.residual

    @property
    def transfer(self) -> Transfer:
        """What becomes of the moments at a refresh."""
        return self.method.transfer

    @property
    def seed(self) -> int:
        """Seed of every random choice."""
        return self.method.seed

    @property
    def stagger(self) -> bool:
        """Whether the refreshes of different matrices are spread over the period."""
        return self.method.stagger

    def check_shardable(self, p: Tensor, group: Mapping[str, Any]) -> None:
        """Raise unless this method can train ``p`` when its rows are sharded over ranks."""
        check_shardable(self.method, p, group)

    @staticmethod
    def warn_of_full_rank() -> None:
        """Warn that no matrix is projected, which is never a silent outcome (contract R13)."""
        logger.warning("no matrix is projected, so this is full-rank training: give a rank below the matrices' sides")

    def summary(self) -> str:
        """Return the parts and one table.

        The table says what is projected, to which rank, the bytes of the state, and what AdamW would hold.
        """
        parts = f"{self.selector!r}, {self.rule!r}, {self.residual!r}, transfer={self.transfer!r}"
        return f"{parts}\n{summary.table(self.param_groups, self.state, self.residual)}"


def _no_matrix(rank: Rank) -> str:
    return f"rank={rank}: there is no matrix among the parameters to project. {FLATTENED}"


def _projects_embeddings(groups: list[dict[str, Any]]) -> bool:
    """Whether matrices that may be embeddings would be projected only because the constructor has a rank.

    One matrix is nobody's model. A group with names shows what it holds.
    """
    loose: list[Any] = []
    for group in groups:
        if isinstance(group, dict) and "rank" not in group and isinstance(group.get("params"), list | tuple):
            loose += group["params"]
    named = [one[0] for one in loose if isinstance(one, tuple)]
    embeddings = any(re.search(pattern, name) for pattern in EXCLUDED for name in named)
    return embeddings or sum(isinstance(one, Tensor) and one.ndim > 1 for one in loose) > 1


def _as_groups(params: Params, rank: Rank | None, targets: str | list[str], exclude: tuple[str, ...]) -> list[Any]:
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
            f"targets={targets!r}, exclude={exclude!r}: choose by name, and groups and bare tensors are taken as they "
            "come; leave both out, or pass the model, its named_parameters(), or what subspan.param_groups makes of them"
        )
    if not given or isinstance(given[0], dict):
        if rank is not None and _projects_embeddings(given):
            logger.warning(
                "parameter groups with neither ranks nor names of their own: rank=%s projects every matrix, embeddings and "
                "heads too. Pass the model, or what subspan.param_groups makes of it; in transformers' Trainer give "
                "optimizer_cls_and_kwargs=(subspan.integrations.transformers.Subspace, dict(name='sara_adamw', rank=%s))",
                rank,
                rank,
            )
        return given
    if rank is not None and sum(p.ndim > 1 for p in given) > 1:
        logger.warning(
            "parameters without names: every matrix is projected, embeddings and heads too; pass model.named_parameters()"
        )
    return given
