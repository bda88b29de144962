"""Saving and restoring an optimizer: checkpoints, ``pickle`` and ``deepcopy``."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from subspan import distributed
from subspan.groups import check_settings, names_of
from subspan.parts import Rule
from subspan.step.carriers import CarriedLayer
from subspan.storage.allocation import State, check_state, copy_state_
from subspan.utils.errors import SettingError


class Restorable(torch.optim.Optimizer):
    """What ``SubspaceOptimizer`` does with copies of itself. The first four methods are its own, declared for those
    below.
    """

    def _allocate(self, p: Tensor, group: Mapping[str, Any]) -> State:
        raise NotImplementedError

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        raise NotImplementedError

    def _carried(self) -> Iterator[tuple[int, Tensor, CarriedLayer, dict[str, Any]]]:
        raise NotImplementedError

    def _bind(self) -> None:
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a checkpoint into the tensors allocated at construction, exact in value, dtype and device (contract R2).

        torch's own method would cast every tensor but ``step`` to the dtype of the parameter. Settings that a saved
        group
        lacks stay as they are here; keys of other libraries are kept (contract R8).

        Raises:
            ValueError: the checkpoint is of another model, method, rank or side. Nothing has been changed then.
        """
        # Frameworks may have swapped parameters in the groups (contract R6): those get fresh state to copy into.
        own = {
            p: self.state[p] if p in self.state else self._allocate(p, group)
            for group in self.param_groups
            for p in group["params"]
        }
        saved: dict[str, Any] = {}

        def take_state(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            self._check(given, own)
            saved.update(given)
            groups = zip(self.param_groups, given["param_groups"], strict=True)
            return {**given, "state": {}, "param_groups": [{**ours, **theirs} for ours, theirs in groups]}

        def put_state(_: torch.optim.Optimizer) -> None:
            for row in self._carried():
                row[2].projection.fold()  # before its basis is overwritten
            self.state.update(own)
            for number, state in zip(saved_ids(saved), own.values(), strict=True):
                copy_state_(state, distributed.placed_as(state, saved["state"][number]))
            self._bind()

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
            check_settings({**group, **saved})
            self._rule({**group, **saved})

    def __getstate__(self) -> dict[str, Any]:
        parts = ("selector", "rule", "residual", "transfer", "stagger", "seed")
        return {**super().__getstate__(), **{part: getattr(self, part) for part in parts}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "selector" in state:  # a copy, not torch's load_state_dict
            self._bind()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Restorable":
        if any(id(p) not in memo for _, p, _, _ in self._carried()):
            raise SettingError(
                "deepcopy: this optimizer steps on backward-side layers of a model; copy both at once, the model "
                "first: "
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
    """Raise a ``ValueError`` that says what differs.

    Args:
        groups: this optimizer's parameter groups.
        own: the state of each of its parameters, in order.
        names: of the parameters, in order.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise SettingError(f"state_dict has {sorted(state_dict)}: expected what an optimizer's state_dict() returns")
    sizes = [len(group["params"]) for group in groups]
    if [len(group["params"]) for group in state_dict["param_groups"]] != sizes:
        raise SettingError(
            f"the checkpoint has parameter groups of {[len(g['params']) for g in state_dict['param_groups']]} "
            "parameters, this "
            f"optimizer of {sizes}; build it from the same model with the same targets"
        )
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        ours, theirs = group.get("param_names"), saved.get("param_names")
        if ours and theirs and list(ours) != list(theirs):
            first = next(pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1])
            raise SettingError(f"the checkpoint has parameter {first[1]!r} where this optimizer has {first[0]!r}")
        if saved.get("method", group["method"]) != group["method"]:
            raise SettingError(
                f"the checkpoint is of {saved['method']}, this optimizer is {group['method']}; build it alike"
            )
    for number, name, state in zip(saved_ids(state_dict), names, own.values(), strict=True):
        check_state(state, state_dict["state"].get(number, {}), name)


def saved_ids(state_dict: Mapping[str, Any]) -> list[Any]:
    """The keys of the saved state in the order of the parameters: numbers, or names from
    torch.distributed.checkpoint.
    """
    return [key for group in state_dict["param_groups"] for key in group["params"]]
