"""Whether a checkpoint is this optimizer's. It is asked before anything is changed."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from subspan.state import State, check_state


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
        raise ValueError(f"state_dict has {sorted(state_dict)}: expected what an optimizer's state_dict() returns")
    sizes = [len(group["params"]) for group in groups]
    if [len(group["params"]) for group in state_dict["param_groups"]] != sizes:
        raise ValueError(
            f"the checkpoint has parameter groups of {[len(g['params']) for g in state_dict['param_groups']]} parameters, this "
            f"optimizer of {sizes}; build it from the same model with the same targets"
        )
    for group, saved in zip(groups, state_dict["param_groups"], strict=True):
        ours, theirs = group.get("param_names"), saved.get("param_names")
        if ours and theirs and list(ours) != list(theirs):
            first = next(pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1])
            raise ValueError(f"the checkpoint has parameter {first[1]!r} where this optimizer has {first[0]!r}")
        if saved.get("method", group["method"]) != group["method"]:
            raise ValueError(f"the checkpoint is of {saved['method']}, this optimizer is {group['method']}; build it alike")
    for number, name, state in zip(saved_ids(state_dict), names, own.values(), strict=True):
        check_state(state, state_dict["state"].get(number, {}), name)


def saved_ids(state_dict: Mapping[str, Any]) -> list[Any]:
    """The keys of the saved state in the order of the parameters: numbers, or names from torch.distributed.checkpoint."""
    return [key for group in state_dict["param_groups"] for key in group["params"]]
