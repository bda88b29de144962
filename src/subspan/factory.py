"""``create`` builds an optimizer by its paper's name."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from subspan.groups import EXCLUDED, param_groups
from subspan.optimizer import SubspaceOptimizer
from subspan.parts import Residual, Rule, Selector, Transfer
from subspan.recipes import find
from subspan.residuals import RESIDUALS
from subspan.rules import RULES, AdamW
from subspan.selectors import SELECTORS, Dominant, Switch
from subspan.step.carriers import layer_of
from subspan.step.settings import StepOptions, StepSettings, check_names, spelled_out
from subspan.storage.allocation import StateDtype
from subspan.utils.errors import SettingError
from subspan.utils.ranks import RANKS, Rank
from subspan.utils.suggestions import look_up, near_names

logger = logging.getLogger(__name__)
Part = TypeVar("Part")


class _Default(int):
    """A number that nobody has given."""


_RANK = _Default(128)


@spelled_out(StepOptions)
def create(
    name: str,
    model: nn.Module,
    *,
    lr: float | Tensor | None = None,
    rank: Rank = _RANK,
    rank_pattern: Mapping[str, Rank] | None = None,
    scale: float | None = None,
    transfer: Transfer | None = None,
    selector: str | Selector | Mapping[str, Any] | None = None,
    rule: str | Rule | Mapping[str, Any] | None = None,
    residual: str | Residual | Mapping[str, Any] | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    stagger: bool | None = None,
    state_dtype: StateDtype | None = None,
    seed: int = 0,
    total_steps: int | None = None,
    lr_full: float | Tensor | None = None,
    targets: str | list[str] = "all-linear",
    exclude: tuple[str, ...] = EXCLUDED,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    decayed: Collection[str] | None = None,
    **settings: Unpack[StepOptions],
) -> torch.optim.Optimizer:
    """Build an optimizer by its paper's name, for all trainable parameters of ``model``.

    Args:
        name: one of ``list_optimizers()``. Full-rank ones ignore what concerns subspaces; ``adamw`` is torch's.
        model: the weights of its linear layers are projected, except those that ``exclude`` names.
        lr: learning rate; ``None`` stands for the recipe's own, also for scale, transfer, betas, eps and state_dtype.
        rank: dimension of the subspace, >= 1, or its share of each compressed side, such as 0.25. The default is 128,
            or that of the model's backward-side layers where nothing else is projected.
        rank_pattern: other ranks by regular expression, such as ``{"q_proj": 32, "mlp": 0.5}``; see
            ``subspan.param_groups``.
        selector: another selector, its name, or settings for the recipe's own, such as ``{"power": 2.0}``. With a
            ``"name"`` among them, they are for the selector of that name.
        rule: another rule, its name, or settings such as ``{"momentum": 0.95}``.
        residual: another residual, its name, or settings such as ``{"mode": "official"}``.
        betas, eps: those of the rule, short for ``rule={"betas": ..., "eps": ...}``.
        total_steps: length of the run in steps; the hybrid methods need it.
        lr_full: learning rate of what is not projected; ``None`` stands for ``lr``.
        targets, exclude, overrides, decayed: see ``subspan.param_groups``.

    ``weight_decay`` does not decay parameters of one dimension (biases, norms).

    The other arguments are those of ``SubspaceOptimizer``. Backward-side layers keep the rank and the side they were
    made with.

    Raises:
        SettingError: the name is unknown (near ones are listed), or a setting is out of range. Or the ``rank`` or the
            ``proj_type`` is not that of the backward-side layers, and nothing else is projected.
    """
    check_names(settings, create, "create")
    own = StepSettings(**settings)
    recipe = find(name)
    if not isinstance(model, nn.Module):
        raise SettingError(f"model: got a {type(model).__name__}; expected a torch.nn.Module, not its parameters")
    full_rank = recipe.selector is None
    if full_rank and any(layer_of(p) is not None for p in model.parameters()):
        raise SettingError(
            f"optimizer {name!r} is full rank, and this model's backward-side layers make no full gradient; use a method "
            "with a subspace, such as 'sara_adamw', or leave project_backward out"
        )
    if rank is None and not full_rank:
        raise SettingError(f"rank=None: {name} needs {RANKS}; the full-rank baseline is 'adamw'")
    weight_decay = own.weight_decay
    is_given = rank is not _RANK
    rank = rank if is_given else int(_RANK)  # a group holds primitives (contract R1)
    groups = param_groups(
        model,
        rank=None if full_rank else rank,
        rank_pattern=None if full_rank else rank_pattern,
        targets=targets,
        exclude=exclude,
        overrides=overrides,
        lr_full=lr_full,
        weight_decay=weight_decay,
        decayed=decayed,
    )
    if not is_given:
        rank = _rank_of_carriers(groups) or rank
    short = {key: value for key, value in (("betas", betas), ("eps", eps)) if value is not None}
    chosen_rule = _with(_with(recipe.rule, rule, RULES, "rule"), short or None, RULES, "rule")
    lr = recipe.lr if lr is None else lr
    is_plain = (state_dtype or "float32") == "float32" and not own.bf16_stochastic_round
    if name == "adamw" and isinstance(chosen_rule, AdamW) and is_plain:
        for group in groups:
            del group["rank"]  # ours; torch's groups do without
        adamw = torch.optim.AdamW(
            groups, lr=lr, betas=chosen_rule.betas, eps=chosen_rule.eps, weight_decay=weight_decay
        )
        return _with_known_overrides(adamw, overrides)
    chosen = _with(recipe.selector or Dominant(), selector, SELECTORS, "selector")
    chosen = _timed(chosen, total_steps)
    gap, switch = own.update_proj_gap, _switch_in(chosen)
    if switch is not None and not switch.switches_within(gap):
        logger.warning("%s never switches: no refresh falls after %s of %s steps", name, switch.at, switch.total_steps)
    optimizer = SubspaceOptimizer(
        groups,
        lr,
        None if full_rank else rank,
        selector=chosen,
        rule=chosen_rule,
        residual=residual_of(name, residual),
        transfer=transfer or recipe.transfer,
        stagger=stagger,
        seed=seed,
        scale=recipe.scale if scale is None else scale,
        state_dtype=state_dtype or recipe.state_dtype,
        **settings,
    )
    if isinstance(model, nn.Module):
        optimizer.following.watch(model)
    return _with_known_overrides(optimizer, overrides)


def residual_of(name: str, residual: str | Residual | Mapping[str, Any] | None = None) -> Residual:
    """Return the residual of the optimizer of this name, which ``project_backward`` takes.

    Args:
        name, residual: as in ``create``.
    """
    return _with(find(name).residual, residual, RESIDUALS, "residual")


def _rank_of_carriers(groups: list[dict[str, Any]]) -> Rank | None:
    """Return the rank of the backward-side layers, where nothing else is projected."""
    layers = [layer_of(p) for group in groups if group["rank"] is not None for _, p in group["params"]]
    made = [layer.projection for layer in layers if layer is not None]
    if not made or len(made) < len(layers):
        return None
    return next((own.asked for own in made if not own.by_pattern), made[0].asked)


def _timed(selector: Selector, total_steps: int | None) -> Selector:
    """Return ``selector`` with the length of the run, where a switch in it needs to know it."""
    if isinstance(selector, Switch):
        return selector if selector.total_steps is not None else replace(selector, total_steps=total_steps)
    inner = {name: _timed(part, total_steps) for name, part in _inner(selector).items()}
    return replace(selector, **inner) if inner else selector  # type: ignore[type-var]  # every part is a dataclass


def _switch_in(selector: Selector) -> Switch | None:
    """Return the switch in ``selector``, if there is one. There is at most one, because a switch holds no other."""
    if isinstance(selector, Switch):
        return selector
    inner = (_switch_in(part) for part in _inner(selector).values())
    return next((switch for switch in inner if switch is not None), None)


def _inner(selector: Selector) -> dict[str, Selector]:
    """Return the selectors that a selector is made of, by name."""
    parts: dict[str, Any] = vars(selector)
    return {name: part for name, part in parts.items() if hasattr(part, "refresh_")}


def _with_known_overrides(
    optimizer: torch.optim.Optimizer, overrides: Mapping[str, Mapping[str, Any]] | None
) -> torch.optim.Optimizer:
    """Return ``optimizer``. Raises unless its groups know every setting of ``overrides``."""
    for pattern, settings in (overrides or {}).items():
        for key in settings:
            if key not in optimizer.defaults or key in ("method", "clock"):
                raise SettingError(
                    f"overrides[{pattern!r}]: {key!r} is no setting; {near_names(key, optimizer.defaults)}"
                )
    return optimizer


def _with(
    part: Part, change: str | Part | Mapping[str, Any] | None, table: Mapping[str, Callable[[], Part]], what: str
) -> Part:
    """Return ``part``, or ``part`` with other settings, or the part that stands in its place."""
    if change is None:
        return part
    if not isinstance(change, Mapping):
        return look_up(change, table, what)
    if "name" in change:
        part = look_up(str(change["name"]), table, what)
        change = {key: value for key, value in change.items() if key != "name"}
    allowed = [field.name for field in fields(part)]  # type: ignore[arg-type]  # every part is a dataclass
    for key, value in change.items():
        if key not in allowed:
            raise SettingError(
                f"{what} setting {key!r}={value!r}: {type(part).__name__} has {', '.join(allowed) or 'no settings'}; "
                f"leave it out, or give another {what}"
            )
        if is_dataclass(getattr(part, key)) and not is_dataclass(value):
            raise SettingError(
                f"{what} setting {key!r}={value!r}: expected a part, as an object; build the {what} itself instead"
            )
    return replace(part, **change)  # type: ignore[type-var]
