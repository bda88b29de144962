"""Saving, restoring and copying an optimizer, by checkpoints, ``pickle`` and ``deepcopy``."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subspan import distributed
from subspan.step.backward_side import Carriers
from subspan.step.in_backward import StepInBackward
from subspan.step.method import Method
from subspan.step.parameter_state import state_of
from subspan.step.settings import StepSettings
from subspan.step.weights import Inside, step_inside
from subspan.step.work import Slot, names_of, slots
from subspan.storage.allocation import State, check_state, copy_state_
from subspan.utils.errors import SettingError
from subspan.utils.names import canonical_name

logger = logging.getLogger(__name__)


def group_keys(method: Method) -> dict[str, Any]:
    """Return what every parameter group says of the method, so that a checkpoint carries it.

    ``method`` must be the same on loading, because moments mean nothing in another method's basis. ``seed`` and
    ``stagger`` are restored. ``parts`` cannot be restored, since a part is an object. A warning says where they differ.
    """
    return {"method": method.kinds, "parts": method.parts, "seed": method.seed, "stagger": method.stagger}


class Restorable(torch.optim.Optimizer):
    """An optimizer that saves, restores and copies itself: the base of ``SubspaceOptimizer``.

    Attributes:
        method: its parts.
        carriers: its backward-side half.
        inside: the rule's step, compiled after ``compile()``; a copy is not compiled.
    """

    method: Method
    carriers: Carriers
    inside: Inside = staticmethod(step_inside)
    _in_backward: StepInBackward | None = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a checkpoint into the tensors allocated at construction, exact in value, dtype and device (contract R2).

        torch's own method would cast every tensor but ``step`` to the dtype of the parameter. Settings that a saved
        group lacks stay as they are here; keys of other libraries are kept (contract R8). The seed and the staggering
        of the checkpoint are restored. A selector or residual with other settings than the checkpoint's is kept, and a
        warning says what differs.

        Raises:
            SettingError: the checkpoint is of another model, method, rank or side. Nothing has been changed then.
        """
        # Frameworks may have swapped parameters in the groups (contract R6). Those get fresh state to copy into.
        own = {
            p: self.state[p] if p in self.state else state_of(self.method, p, group)
            for group in self.param_groups
            for p in group["params"]
        }
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
            self.state.update(own)
            for number, state in zip(saved_ids(saved), own.values(), strict=True):
                copy_state_(state, distributed.placed_as(state, saved["state"][number]))
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
        names = [name for number, group in enumerate(self.param_groups) for name in names_of(number, group)]
        check_checkpoint(state_dict, self.param_groups, own, names)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            merged = {**group, **saved}
            StepSettings.of(merged)
            self.method.rule_of(merged)
            replace(self.method, seed=merged["seed"], stagger=merged["stagger"])

    def _restore_method(self) -> None:
        """Take over what the checkpoint carries of the method, and say what it cannot carry."""
        if not self.param_groups:
            return
        before, group = self.method, self.param_groups[0]
        self.method = replace(before, seed=group["seed"], stagger=group["stagger"])
        for name in ("seed", "stagger"):
            if (saved := getattr(self.method, name)) != (built := getattr(before, name)):
                logger.warning("load_state_dict: %s=%r of the checkpoint replaces %s=%r", name, saved, name, built)
        if group["parts"] != before.parts:
            logger.warning(
                "load_state_dict: the checkpoint was made with %s, and this optimizer goes on with %s; to go on as before, "
                "build it with the settings of the checkpoint",
                group["parts"],
                before.parts,
            )
        for group in self.param_groups:
            group.update(group_keys(self.method))

    def __getstate__(self) -> dict[str, Any]:
        own: dict[str, Any] = {**super().__getstate__(), "method": self.method}
        if self._in_backward is not None and self._in_backward.enabled:
            if self._in_backward.seen:
                raise SettingError(
                    "optimizer: gradients of a step in the backward pass are under way, which no copy can hold; copy or "
                    "pickle it after optimizer.step()"
                )
            own["in_backward"] = self._in_backward.settings
        return own

    def __setstate__(self, state: dict[str, Any]) -> None:
        in_backward = state.pop("in_backward", None) if "method" in state else None
        super().__setstate__(state)
        if "method" in state:  # a copy, not torch's load_state_dict
            self.carriers = Carriers(self)
            self.carriers.bind()
            if in_backward is not None:
                self._in_backward = StepInBackward(self, None, *in_backward)

    def slots(self) -> Iterator[Slot]:
        """Return where each parameter is kept, in order."""
        return slots(self.param_groups)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Restorable":
        if any(id(one.p) not in memo for one in self.carriers):
            raise SettingError(
                "deepcopy: this optimizer steps on backward-side layers of a model; copy both at once, the model first: "
                "copy.deepcopy((model, optimizer))"
            )
        memo[id(self)] = new = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
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
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        ours, theirs = (list(map(canonical_name, one.get("param_names") or ())) for one in (group, saved))
        if ours and theirs and ours != theirs:
            first = next(pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1])
            raise SettingError(f"the checkpoint has parameter {first[1]!r} where this optimizer has {first[0]!r}")
        if saved.get("method", group["method"]) != group["method"]:
            raise SettingError(
                f"the checkpoint is of {saved['method']}, this optimizer is {group['method']}; build it alike"
            )
    for number, name, state in zip(saved_ids(state_dict), names, own.values(), strict=True):
        check_state(state, state_dict["state"].get(number, {}), name)


def saved_ids(state_dict: Mapping[str, Any]) -> list[Any]:
    """Return the keys of the saved state in the order of the parameters.

    They are numbers, or names where torch.distributed.checkpoint has written them.
    """
    return [key for group in state_dict["param_groups"] for key in group["params"]]
