"""Which layers have the same input, and so may share a basis and ``x Q``."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from subspan.backward.dummies import inputs_to_try
from subspan.roles import inputs_of
from subspan.utils.errors import SettingError, named

logger = logging.getLogger(__name__)

Share = str | Sequence[Sequence[str]] | Mapping[str, Any]


def met_by(model: nn.Module, layers: Mapping[str, Any], share: Share) -> list[list[str]] | None:
    """Run the model once, and return the names of the layers that each of their inputs meets, in their order.

    It runs on the inputs in ``share``, or on inputs of its own. ``None`` if it has none that it runs on; a warning says
    so where ``share="auto"`` depends on it.
    """
    if isinstance(share, Mapping):
        return _seen(model, layers, share)
    why = "has no dummy_inputs"
    for inputs in inputs_to_try(model):
        try:
            return _seen(model, layers, inputs)
        except SettingError as error:
            why = f"does not run on its own {' and '.join(sorted(inputs))} ({named(error.__cause__ or error)})"
    if share == "auto":
        logger.warning(
            "share='auto': %s %s to see which layers get the same tensor; each gets a basis of its own, and saves its own "
            "x Q; give share=dict(inputs of the model), or lists of names",
            type(model).__name__,
            why,
        )
    return None


def groups_of(
    model: nn.Module, layers: Mapping[str, Any], share: Share, met: Sequence[list[str]] | None
) -> list[list[str]]:
    """Sort the names of ``layers`` into groups that share, in the order of the model.

    ``project_backward`` explains ``share``. ``met`` is what ``met_by`` has found.
    """
    if share == "none":
        return [[name] for name in layers]
    if share == "auto" or isinstance(share, Mapping):
        return [[name] for name in layers] if met is None else _of_one_input(layers, met)
    if isinstance(share, str):
        raise SettingError(
            f"share={share!r}: expected 'auto', 'none', inputs of the model as a dict, or lists of names"
        )
    return _named(layers, share)


def passes_on(names: Sequence[str], projections: Mapping[str, int], groups: Sequence[Sequence[str]]) -> list[int]:
    """Return the numbers of the groups that begin a pass on an input, when ``names`` meet it in this order.

    Args:
        names: the layers, of which one may come several times.
        projections: the number of the group of each layer.
        groups: the layers of each group, which pass together.
    """
    began: list[int] = []
    waiting: dict[int, set[str]] = {}
    for name in names:
        number = projections[name]
        if name not in waiting.get(number, ()):
            began.append(number)
            waiting[number] = set(groups[number])
        waiting[number].remove(name)
    return began


def of_one_rank(
    groups: Sequence[list[str]], ranks: Mapping[str, int], share: Share
) -> tuple[list[list[str]], str | None]:
    """Divide ``groups`` of layers with one input, because layers of different rank share no basis.

    Args:
        groups: those of ``groups_of``.
        ranks: the rank of each layer.
        share: what made the groups.

    Returns:
        The groups, and a sentence on those that are divided, if there are any.

    Raises:
        SettingError: layers that ``share`` lists together have different ranks.
    """
    found: list[list[str]] = []
    divided: list[str] = []
    for names in groups:
        parts: dict[int, list[str]] = {}
        for name in names:
            parts.setdefault(ranks[name], []).append(name)
        found += parts.values()
        if len(parts) > 1:
            divided.append("; ".join(f"{', '.join(own)} (rank {rank})" for rank, own in parts.items()))
    if not divided:
        return found, None
    if not isinstance(share, str | Mapping):
        raise SettingError(
            f"rank_pattern: layers that share lists together get different ranks, and so no common basis: {divided[0]}; give "
            "them one rank, or list them apart"
        )
    return found, (
        "rank_pattern: layers with the same input share a basis and one x Q only where they have one rank; apart are, "
        f"for example, {divided[0]}"
    )


def _seen(model: nn.Module, layers: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[list[str]]:
    """Run the model once, and list the layers that get the same tensor, for each tensor."""
    calls: list[tuple[Tensor, list[str]]] = []  # the tensors are kept alive, so that no two are at one address

    def watch(name: str) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))  # of a Conv1D it is called x
            for tensor, names in calls:
                if tensor is x:
                    names.append(name)
                    return
            calls.append((x, [name]))

        return see

    hooks = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    device = next(iter(layers.values())).weight.device
    modes = {module: module.training for module in model.modules()}
    model.eval()  # draws nothing, and changes no statistics
    try:
        with torch.no_grad():
            model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()})
    except Exception as error:
        raise SettingError(
            f"share: the model does not run on the inputs {sorted(inputs)}: {named(error)}; mend the model, or give "
            "share=dict(inputs that it takes), lists of names, or 'none'"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return [names for _, names in calls]


def _of_one_input(layers: Mapping[str, Any], met: Sequence[list[str]]) -> list[list[str]]:
    group_of: dict[str, int] = {}
    for number, names in enumerate(met):
        for name in names:
            if name in group_of:  # called with two tensors: others in its group would wait for it
                group_of[name] = -1
            else:
                group_of[name] = number
    found: dict[Any, list[str]] = {}
    for name in layers:
        number = group_of.get(name, -1)
        found.setdefault(name if number < 0 else number, []).append(name)
    return list(found.values())


def _named(layers: Mapping[str, Any], share: Sequence[Sequence[str]]) -> list[list[str]]:
    """Group layers of one parent module whose own names are listed together."""
    found: dict[Any, list[str]] = {}
    used: set[str] = set()
    for name in layers:
        parent, _, own = name.rpartition(".")
        number = next((n for n, names in enumerate(share) if own in names or name in names), None)
        used |= {own, name}
        # A full name is one layer; an own name, such as "q_proj", is one layer in each parent.
        place = name if number is None else (number, "" if name in share[number] and name != own else parent)
        found.setdefault(place, []).append(name)
    for names in share:
        for name in names:
            if name not in used:
                raise SettingError(
                    f"share: {name!r} is no backward-side layer; they are {', '.join(map(repr, layers))}"[:400]
                )
    for names in found.values():
        sizes = {inputs_of(layers[name]) for name in names}
        if len(sizes) > 1:
            raise SettingError(
                f"share: {', '.join(names)} have inputs of {sorted(sizes)} features; layers that share have one input"
            )
    return list(found.values())
