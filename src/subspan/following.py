"""An optimizer follows its parameters: what it holds for each of them fits what the parameter is now.

A model may be moved, cast, sharded, resized or made from ``meta`` after its optimizer has been built. Some of this
changes a parameter in place; some of it puts another parameter in its place, in the model or also in the groups. So the
optimizer remembers what it was built for, and compares before it uses its state:

    the model has another parameter of this name    it takes the place of the old one in the group
    another device, dtype or sharding               state of that form is allocated, and the values are copied into it
    nothing has been stepped on yet                 state of that form is allocated
    anything else                                   a ``SettingError`` says what has changed and what to do

Nothing is changed where one parameter is refused. In an ordinary step this costs a comparison for each parameter.
"""

import logging
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from subspan import distributed
from subspan.step.backward_side import check_carrier
from subspan.step.carriers import layer_of
from subspan.step.method import Method
from subspan.step.parameter_state import check_trainable, state_of
from subspan.step.shardable import check_sharded
from subspan.step.work import names_of
from subspan.storage.allocation import State
from subspan.utils.errors import SettingError
from subspan.utils.missing_matrices import FLATTENED
from subspan.utils.names import canonical_name

logger = logging.getLogger(__name__)

Form = tuple[Any, ...]
"""Shape, dtype, device, and mesh with placements (``None`` if it is whole) of a parameter."""


class Built(NamedTuple):
    """What a state has been allocated for."""

    p: Tensor
    form: Form
    keys: frozenset[str]
    """The entries of the state that are the optimizer's own. Others may put more into it."""


class Plan(NamedTuple):
    """What the optimizer would hold if it followed its parameters."""

    states: dict[Tensor, State]
    built: list[list[Built]]
    names: list[list[str] | None]
    """Names of the parameters of each group, for those that have names."""
    swapped: list[Tensor]
    """Parameters that are in the place of others now."""


class Owner(Protocol):
    """What ``Following`` reads and changes of the optimizer that owns it."""

    method: Method
    param_groups: list[dict[str, Any]]
    state: Any


class Following:
    """The memory of an optimizer, which owns it, of what its parameters were.

    Attributes:
        built: what each parameter was when its state was allocated, by group and in order.
    """

    def __init__(self, owner: Owner) -> None:
        self._owner = weakref.ref(owner)
        self.built: list[list[Built]] = []
        self._model: weakref.ref[nn.Module] | None = None
        self._aliases: dict[str, str] = {}
        self._said: set[str] = set()

    @property
    def owner(self) -> Owner:
        """The optimizer."""
        owner = self._owner()
        assert owner is not None
        return owner

    @property
    def model(self) -> nn.Module | None:
        """The model that the optimizer was built for, if it was given a model, and that still exists."""
        return None if self._model is None else self._model()

    def note(self, group: Mapping[str, Any], keys: Sequence[Iterable[str]] | None = None) -> None:
        """Note that the states of a group, which comes after those noted, have been allocated for what it is now.

        Args:
            keys: the optimizer's own entries of each state, if there may be others.
        """
        own = [self.owner.state[p] for p in group["params"]] if keys is None else keys
        self.built.append([Built(p, _form(p), frozenset(some)) for p, some in zip(group["params"], own, strict=True)])

    def watch(self, model: nn.Module) -> None:
        """Follow the parameters of ``model`` by their names, too."""
        self._model = weakref.ref(model)
        first: dict[int, str] = {}
        named = [(canonical_name(name), p) for name, p in model.named_parameters(remove_duplicate=False)]
        self._aliases = {name: first[id(p)] for name, p in named if first.setdefault(id(p), name) != name}

    def named(self, params: Sequence[Tensor], number: int) -> list[tuple[str, Tensor]]:
        """Return bare parameters of a group with their names in the model, or else with the number of the group."""
        names = {} if self.model is None else {id(p): name for name, p in self.model.named_parameters()}
        return [(names.get(id(p), f"{number}.{place}"), p) for place, p in enumerate(params)]

    # --- who is in the groups -----------------------------------------------------------------------------------------

    def take_carriers(self) -> None:
        """Put the carriers that backward-side layers have now into the groups."""
        for group in self.owner.param_groups:
            for number, p in enumerate(group["params"]):
                home = None if (layer := layer_of(p)) is None else getattr(layer, "home", None)
                if home is not None and home is not p:
                    group["params"][number] = home

    def take_members(self) -> None:
        """Put the parameters that the model has now in the place of those that it has no longer.

        Raises:
            SettingError: a parameter has been replaced by several, or tied weights have been untied.
        """
        model, groups = self.model, self.owner.param_groups
        if model is None:
            return
        known = {id(p) for group in groups for p in group["params"]}
        if not any(p.requires_grad and id(p) not in known for p in _parameters(model)):
            return
        here = {id(p) for p in _parameters(model)}
        built = {id(one.p) for some in self.built for one in some}
        by_name = {canonical_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
        strangers = {name: p for name, p in by_name.items() if p.requires_grad and id(p) not in known}
        lost: dict[str, Tensor] = {}
        for group, names in zip(groups, names_of(groups), strict=True):
            for number, (name, p) in enumerate(zip(names, group["params"], strict=False)):
                found = strangers.get(name)
                if found is not None and distributed.is_sharded(p) and not distributed.is_sharded(found):
                    del strangers[name]  # fully_shard has gathered it for a pass; the shard is what is trained
                elif id(p) not in here and id(p) in built:  # else others have put it into the group, and know why
                    if found is not None:
                        group["params"][number] = strangers.pop(name)
                    else:
                        lost[name] = p
        self._refuse_strangers(lost, strangers)

    def _refuse_strangers(self, lost: Mapping[str, Tensor], strangers: Mapping[str, Tensor]) -> None:
        """Raise, or warn once, where the model trains parameters that are in no group."""
        for name, p in lost.items():
            owner, _, own = name.rpartition(".")
            inside = f"{owner}.parametrizations.{own}.".lstrip(".")
            weight = None if (layer := layer_of(p)) is None else layer.weight_name
            if parts := [other for other in strangers if other == weight or other.startswith(inside)]:
                raise SettingError(
                    f"params: the model has no {name!r} any more, but {', '.join(map(repr, parts))}; build the optimizer "
                    "after its layers have been replaced or parametrized"
                )
        for name in strangers:
            if name in self._aliases:
                raise SettingError(
                    f"params: {name!r} was tied to {self._aliases[name]!r} when the optimizer was built, and is a parameter "
                    "of its own now, which is in no group; give it to add_param_group, or build the optimizer after the "
                    "weights have been untied"
                )
        new = [name for name, p in strangers.items() if p.grad is not None and name not in self._said]
        self._said.update(new)
        if new:
            logger.warning(
                "params: the model has parameters that have a gradient and are in no group, so they are not trained; give "
                "them to add_param_group: %s",
                ", ".join(new[:4]) + (f", and {len(new) - 4} more" if len(new) > 4 else ""),
            )

    def say_that_nothing_is_trained(self) -> None:
        """Warn once that no parameter has a gradient.

        Raises:
            SettingError: the parameters are on ``meta``, so the model must have others by now.
        """
        for group, names in zip(self.owner.param_groups, names_of(self.owner.param_groups), strict=True):
            for name, p in zip(names, group["params"], strict=True):
                if p.is_meta:
                    raise SettingError(
                        f"params: {name!r} is on meta and has no gradient; if the model has got other parameters since "
                        "(to_empty), give the optimizer the model itself, whose parameters it then follows, or build it "
                        "after that"
                    )
        if "" not in self._said:
            self._said.add("")
            logger.warning(
                "step(): no parameter of this optimizer has a gradient, so nothing is trained; if the model has got other "
                "parameters since, give the optimizer the model itself, whose parameters it then follows"
            )

    # --- what is held for them ----------------------------------------------------------------------------------------

    def plan(self, carry: bool = True) -> Plan | None:
        """Return what the optimizer would hold if it followed its parameters; ``None`` if it does already.

        Args:
            carry: whether the values of the state are carried over. Otherwise state that does not fit is left for a
                checkpoint that is to be loaded.

        Raises:
            SettingError: what is held cannot follow. Nothing has been changed.
        """
        groups = self.owner.param_groups
        if len(groups) == len(self.built) and all(map(_fits, groups, self.built)):
            return None
        before = {id(built.p): built for some in self.built for built in some}
        now = {id(p) for group in groups for p in group["params"]}
        aligned = self.built if len(groups) == len(self.built) else [[] for _ in groups]
        plan = Plan({}, [], [], [])
        for number, (group, olds) in enumerate(zip(groups, aligned, strict=True)):
            names = self._names(number, group, olds, before, now)
            plan.names.append(names if group.get("param_names") else None)
            built = []
            for place, (name, p) in enumerate(zip(names, group["params"], strict=True)):
                was = before.get(id(p))
                if was is None and place < len(olds) and id(olds[place].p) not in now:
                    was = olds[place]
                    plan.swapped.append(p)
                plan.states[p], own = self._state(p, group, name, was, carry)
                built.append(Built(p, _form(p), own))
            plan.built.append(built)
        return plan

    def _names(
        self, number: int, group: Mapping[str, Any], olds: Sequence[Built], before: Mapping[int, Built], now: set[int]
    ) -> list[str]:
        """Return the names of the parameters that are in a group now. Raises if it cannot be told which is which."""
        params = group["params"]
        given = list(group.get("param_names") or ())
        names = given if len(given) == len(olds) else [f"{number}.{place}" for place in range(len(olds))]
        gone = [name for name, built in zip(names, olds, strict=True) if id(built.p) not in now]
        new = [place for place, p in enumerate(params) if id(p) not in before]
        if not olds:
            return given if len(given) == len(params) else [f"{number}.{place}" for place in range(len(params))]
        if gone and new and (len(params) != len(olds) or any(id(olds[place].p) in now for place in new)):
            raise SettingError(
                f"params: group {number} was built with {len(olds)} parameters, such as {gone[0]!r}, and others have been "
                f"put into it since, so that it has {len(params)}, such as one of {tuple(params[new[0]].shape)}. "
                f"{FLATTENED}; or build the optimizer again from the parameters that it is to train"
            )
        named = {id(built.p): name for name, built in zip(names, olds, strict=True)}
        return [
            named.get(id(p)) or (names[place] if gone and place in new else f"{number}.{place}")
            for place, p in enumerate(params)
        ]

    def _state(
        self, p: Tensor, group: Mapping[str, Any], name: str, was: Built | None, carry: bool
    ) -> tuple[State, frozenset[str]]:
        """Return the state of ``p``, which follows that of what it was, and the names of its own entries."""
        method, form = self.owner.method, _form(p)
        old = None if was is None else self.owner.state.get(was.p)
        if was is not None and old is not None and form == was.form:
            return old, was.keys
        begun = was is not None and old is not None and carry and not _is_untouched(old, group)
        if was is not None and form[0] != was.form[0]:
            self._check_reshaped(p, name, was, begun)
        check_trainable(p, name, group)
        check_carrier(method, p)
        check_sharded(method, p, group)
        state = state_of(method, p, group)
        own = frozenset(state)
        if was is None or old is None:
            return state, own
        if begun:
            _copy(old, state, name, was, form)
        return state | _foreign(old, was, p), own

    def _check_reshaped(self, p: Tensor, name: str, was: Built, begun: bool) -> None:
        """Raise unless ``p`` has been resized before the first step."""
        shape, before = tuple(p.shape), tuple(was.form[0])
        declared = self._declared(p)
        resized = p.ndim == len(before) and (declared == shape if declared else p.ndim > 1 or self.model is not None)
        if resized and not begun:
            return
        if resized:
            raise SettingError(
                f"params: {name!r} was {before} when it was stepped on last, and is {shape} now, and its moments cannot be "
                "resized with it; build the optimizer again after the model has been resized"
            )
        if p is not was.p:
            raise SettingError(
                f"params: {name!r} {shape} has been put into its group since, and has no state: it was {before} when the "
                "optimizer was built. If it is another tensor of the same model, load a state_dict of this optimizer. "
                f"{FLATTENED}"
            )
        raise SettingError(
            f"params: {name!r} was {before} when the optimizer was built, and is {shape} now; if the model has been "
            f"resized, build the optimizer after that. {FLATTENED}"
        )

    def _declared(self, p: Tensor) -> tuple[int, ...] | None:
        """Return the shape that the layer of ``p`` says it has, if the layer is known and says one."""
        for module in () if self.model is None else _modules(self.model):
            for own, q in module._parameters.items():
                if q is p:
                    if isinstance(module, nn.Embedding):
                        return module.num_embeddings, module.embedding_dim
                    if isinstance(module, nn.Linear) and own in ("weight", "bias"):
                        return (module.out_features, module.in_features)[: p.ndim] if p.ndim < 3 else None
        return None

    def commit(self, plan: Plan) -> None:
        """Hold what is planned."""
        owner, model = self.owner, self.model
        here = set() if model is None else {id(p) for p in _parameters(model)}
        if any(id(p) not in here and not distributed.is_sharded(p) for p in plan.swapped):
            self._model = None  # the optimizer has been given to another model
        for some in self.built:
            for built in some:
                owner.state.pop(built.p, None)
        owner.state.update(plan.states)
        self.built = plan.built
        for group, names in zip(owner.param_groups, plan.names, strict=True):
            if names is not None:
                group["param_names"] = names


def _form(p: Any) -> Form:
    return p.shape, p.dtype, p.device, distributed.mesh_of(p) if distributed.is_sharded(p) else None


def _fits(group: Mapping[str, Any], built: Sequence[Built]) -> bool:
    params = group["params"]
    return len(params) == len(built) and all(
        p is one.p and _form(p) == one.form for p, one in zip(params, built, strict=True)
    )


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of a model. Those that are shared come twice: this is for speed."""
    waiting = [model]
    while waiting:
        module = waiting.pop()
        yield module
        waiting.extend(inner for inner in module._modules.values() if inner is not None)


def _parameters(model: nn.Module) -> Iterator[Tensor]:
    return (p for module in _modules(model) for p in module._parameters.values() if p is not None)


def _is_untouched(state: State, group: Mapping[str, Any]) -> bool:
    """Tell whether no step has been taken with a state. Rules count steps on the CPU, so no device is waited for."""
    if state.get("refresh_step", -1) >= 0:
        return False
    step = state.get("step")
    if type(step) is not Tensor:  # a rule of its own kind, or a fake tensor, which has no value
        return bool(group["clock"] == 0)
    return step.is_meta or float(step) == 0


def _copy(old: State, new: State, name: str, was: Built, form: Form) -> None:
    """Copy the values of ``old`` into ``new``, which is of another form. Raises if they do not fit."""
    for key, value in new.items():
        theirs = old.get(key)
        if theirs is None or (isinstance(value, Tensor) and value.shape != theirs.shape):
            how = "sharded over ranks" if form[3] is not None else "whole on every rank"
            raise SettingError(
                f"params: {name!r} is {how} now, and was not when it was stepped on last; what is held for it ({key!r}) is "
                "of another side of the matrix and cannot follow. Shard the model before the first step, build the "
                "optimizer with proj_type='right', or build it again"
            )
    for key, value in new.items():
        if isinstance(value, Tensor):
            value.copy_(_placed(value, old[key]))
        else:
            new[key] = old[key]


def _placed(value: Any, theirs: Any) -> Tensor:
    """Return ``theirs`` placed on the mesh of ``value``, or whole where ``value`` is. All ranks take part."""
    if distributed.is_sharded(theirs) and distributed.is_sharded(value):
        if distributed.mesh_of(value) == distributed.mesh_of(theirs):
            return theirs
        theirs = theirs.full_tensor()
    placed: Tensor = distributed.placed_as({"": value}, {"": theirs})[""]
    return placed


def _foreign(old: State, was: Built, p: Tensor) -> State:
    """Return the entries that others have put into a state, on the device of ``p``."""
    found: State = {}
    for key in [key for key in old if key not in was.keys]:
        value = old[key]
        if isinstance(value, Tensor) and value.ndim:
            value = _placed(p, value).to(p.device) if value.shape == p.shape else value.to(p.device)
        found[key] = value
    return found
