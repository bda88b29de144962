"""Saving, restoring and copying an optimizer, by checkpoints, ``pickle`` and ``deepcopy``."""

import copy
import itertools
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subspan import distributed
from subspan.following import Following, Plan
from subspan.step.backward_side import Carriers
from subspan.step.in_backward import StepInBackward
from subspan.step.method import Method
from subspan.step.parameter_state import SCHEDULE
from subspan.step.settings import StepSettings
from subspan.step.weights import Inside, step_inside
from subspan.step.work import Slot, names_of, slots
from subspan.storage.allocation import State, check_state, copy_state_
from subspan.utils.errors import SettingError

logger = logging.getLogger(__name__)


class Restorable(torch.optim.Optimizer):
    """An optimizer that saves, restores and copies itself: the base of ``SubspaceOptimizer``.

    Attributes:
        carriers: its backward-side half.
        following: what its parameters were when their state was allocated.
        inside: the rule's step, compiled after ``compile()``; a copy is not compiled.
    """

    carriers: Carriers
    following: Following
    inside: Inside = staticmethod(step_inside)
    _method: Method
    _in_backward: StepInBackward | None = None

    @property
    def method(self) -> Method:
        """The parts, the transfer, the seed and the staggering; assign another to change the groups with it."""
        return self._method

    @method.setter
    def method(self, method: Method) -> None:
        self._method = method
        for group in (vars(self).get("defaults", {}), *vars(self).get("param_groups", ())):
            group["method"] = method.text

    def follow(self, *, in_pass: bool = False) -> None:
        """Fit the state to what the parameters are now, if the model has been moved, cast, sharded or resized.

        Args:
            in_pass: whether a pass of the model is running, in which ``fully_shard`` puts other tensors into it.

        Raises:
            SettingError: what is held for a parameter cannot follow it. Nothing has been changed then.
        """
        self.following.take_carriers()
        if not in_pass:
            self.following.take_members()
        if (plan := self.following.plan()) is not None:
            self._take(plan)

    def _take(self, plan: Plan) -> None:
        self.following.commit(plan)
        self.carriers.follow()
        if self._in_backward is not None:
            self._in_backward.follow()

    def state_dict(self) -> dict[str, Any]:
        """Return state and groups, as ``torch.optim.Optimizer.state_dict`` does, for the parameters as they are now."""
        self.follow()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a checkpoint into the tensors allocated at construction, exact in value, dtype and device (contract R2).

        torch's own method would cast every tensor but ``step`` to the dtype of the parameter. Settings that a saved
        group lacks stay as they are here; keys of other libraries are kept (contract R8). The seed and the staggering
        of the checkpoint are restored. A selector or residual with other settings than the checkpoint's is kept, and a
        warning says what differs. What other libraries have put into the state of a parameter is taken over (contract
        R8).

        Raises:
            SettingError: the checkpoint is of another model, method, rank or side. Nothing has been changed then.
        """
        # Frameworks may have swapped parameters in the groups (contract R6). Those get fresh state to copy into.
        try:
            self.follow()
            plan = None
        except SettingError:  # what cannot be carried over may yet be loaded
            if (plan := self.following.plan(carry=False)) is None:
                raise
        states = plan.states if plan is not None else {p: self.state[p] for p in self._parameters()}
        built = [one for some in (plan or self.following).built for one in some]
        own = {one.p: {key: entry for key, entry in states[one.p].items() if key in one.keys} for one in built}
        saved: dict[str, Any] = {}

        def take_state(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            self._check(given, own)
            saved.update(given)
            groups = [
                # Names stay as they are here: a wrapper may have changed those of the checkpoint.
                {**ours, **theirs, **{key: ours[key] for key in ("param_names",) if key in ours}}
                for ours, theirs in zip(self.param_groups, given["param_groups"], strict=True)
            ]
            return {**given, "state": {}, "param_groups": groups}

        def put_state(_: torch.optim.Optimizer) -> None:
            self.carriers.fold()  # before their bases are overwritten
            if plan is not None:
                self._take(plan)
            for number, (p, mine) in zip(saved_ids(saved), own.items(), strict=True):
                theirs = saved["state"][number]
                state = self.state[p]
                state.clear()
                state.update(mine)
                copy_state_(state, distributed.placed_as(state, theirs))
                state.update(_taken_over(p, {key: entry for key, entry in theirs.items() if key not in mine}))
            self._restore_method()
            self.carriers.bind()

        # Around torch's method, inside of the hooks that others have registered.
        hooks = (
            self.register_load_state_dict_pre_hook(take_state),
            self.register_load_state_dict_post_hook(put_state, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _check(self, state_dict: Mapping[str, Any], own: Mapping[Tensor, State]) -> None:
        names = [name for own in names_of(self.param_groups) for name in own]
        check_checkpoint(state_dict, self.param_groups, own, names)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            merged = {**group, **saved}
            StepSettings.of(merged)
            self.method.rule_of(merged)

    def _restore_method(self) -> None:
        """Take over what the checkpoint carries of the method, and say what it cannot carry: a part is an object."""
        if not self.param_groups:
            return
        before = self.method
        _, saved = Method.read(self.param_groups[0]["method"])
        restored = {name: saved[name] for name in ("seed", "stagger") if name in saved}
        for name, value in restored.items():
            if value != getattr(before, name):
                logger.warning(
                    "load_state_dict: %s=%r of the checkpoint replaces %s=%r", name, value, name, getattr(before, name)
                )
        if saved.get("parts", before.parts) != before.parts:
            logger.warning(
                "load_state_dict: the checkpoint was made with %s, and this optimizer goes on with %s; to go on as before, "
                "build it with the settings of the checkpoint",
                saved["parts"],
                before.parts,
            )
        self.method = replace(before, **restored)

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def __getstate__(self) -> dict[str, Any]:
        self.follow()
        own: dict[str, Any] = {**super().__getstate__(), "_method": self._method}
        own["own_keys"] = [[one.keys for one in some] for some in self.following.built]
        if self._in_backward is not None and self._in_backward.enabled:
            if self._in_backward.seen:
                raise SettingError(
                    "optimizer: gradients of a step in the backward pass are under way, which no copy can hold; copy or "
                    "pickle it after optimizer.step()"
                )
            own["in_backward"] = self._in_backward.settings
        return own

    def __setstate__(self, state: dict[str, Any]) -> None:
        in_backward, keys = state.pop("in_backward", None), state.pop("own_keys", ())
        super().__setstate__(state)
        if "_method" in state:  # a copy, not torch's load_state_dict
            self.carriers = Carriers(self)
            self.following = Following(self)
            for group, own in itertools.zip_longest(self.param_groups, keys):
                self.following.note(group, own)
            self.carriers.bind()
            if in_backward is not None:
                self._in_backward = StepInBackward(self, None, *in_backward)

    def slots(self) -> Iterator[Slot]:
        """Return where each parameter is kept, in order."""
        self.follow()
        return slots(self.param_groups)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Restorable":
        self.follow()
        if any(id(one.p) not in memo for one in self.carriers):
            raise SettingError(
                "deepcopy: this optimizer steps on backward-side layers of a model; copy both at once, the model first: "
                "copy.deepcopy((model, optimizer))"
            )
        memo[id(self)] = new = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        if (twin := memo.get(id(self.following.model))) is not None:
            new.following.watch(twin)
        return new


def check_checkpoint(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    own: Mapping[Tensor, State],
    names: Sequence[str],
) -> None:
    """Raise a ``SettingError`` that says what differs, unless a checkpoint is of this optimizer.

    Args:
        groups: this optimizer's parameter groups.
        own: the state of each of its parameters, in order.
        names: the names of the parameters, in order.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise SettingError(f"state_dict has {sorted(state_dict)}: expected what an optimizer's state_dict() returns")
    sizes = [len(group["params"]) for group in groups]
    if [len(group["params"]) for group in state_dict["param_groups"]] != sizes:
        raise SettingError(
            f"the checkpoint has parameter groups of {[len(g['params']) for g in state_dict['param_groups']]} parameters, "
            f"this optimizer of {sizes}; build it from the same model with the same targets"
        )
    both = zip(groups, state_dict["param_groups"], names_of(groups), names_of(state_dict["param_groups"]), strict=True)
    for group, saved, ours, theirs in both:
        if group.get("param_names") and saved.get("param_names") and ours != theirs:
            first = next(pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1])
            raise SettingError(f"the checkpoint has parameter {first[1]!r} where this optimizer has {first[0]!r}")
        kinds, _ = Method.read(group["method"])
        saved_kinds, _ = Method.read(saved.get("method", group["method"]))
        if saved_kinds != kinds:
            raise SettingError(f"the checkpoint is of {saved_kinds}, this optimizer is {kinds}; build it alike")
    reserved = {key for state in own.values() for key in state} | {*SCHEDULE, "displacement"}
    for number, name, (p, state) in zip(saved_ids(state_dict), names, own.items(), strict=True):
        saved = state_dict["state"].get(number, {})
        check_state(
            state, {key: value for key, value in saved.items() if not _is_foreign(key, value, p, reserved)}, name
        )


def _is_foreign(key: str, value: object, p: Tensor, reserved: Collection[str]) -> bool:
    """Tell whether an entry of a saved state is another library's, such as an average of the parameter.

    What only a method of ours has, such as moments, is none: this optimizer should hold it then.
    """
    if key.removesuffix(".codes").removesuffix(".absmax") in reserved or key.startswith("exp_avg"):
        return False
    return not isinstance(value, Tensor) or value.ndim == 0 or value.shape == p.shape


def _taken_over(p: Tensor, entries: Mapping[str, Any]) -> State:
    """Return copies of other libraries' entries, placed as ``p`` where they have its shape."""
    taken: State = {}
    for key, value in entries.items():
        if isinstance(value, Tensor) and value.shape == p.shape and value.ndim:
            value = distributed.placed_as({key: p}, {key: value})[key].to(p.device)
        taken[key] = copy.deepcopy(value)
    return taken


def saved_ids(state_dict: Mapping[str, Any]) -> list[Any]:
    """Return the keys of the saved state in the order of the parameters.

    They are numbers, or names where torch.distributed.checkpoint has written them.
    """
    return [key for group in state_dict["param_groups"] for key in group["params"]]
