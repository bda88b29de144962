"""The papers' names for a choice of parts. A paper that recombines known parts is one more row of ``RECIPES``."""

import fnmatch
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from subspan.names import look_up, near_names
from subspan.optimizer import SubspaceOptimizer
from subspan.param_groups import EXCLUDED, split_parameters
from subspan.parts import Residual, Rule, Selector, Transfer
from subspan.residuals import RESIDUALS, Discard, Fira
from subspan.rules import AdamW
from subspan.selectors import SELECTORS, Dominant, Importance, Random, Switch

logger = logging.getLogger(__name__)
Part = TypeVar("Part")


@dataclass(frozen=True)
class Recipe:
    """A method: its parts and default settings.

    ``lr`` and ``scale`` are GaLore's, which SARA's and Fira's runs share. GoLore's scripts train at scale 1 (at 60M with
    lr 1e-3); its default here is the step of the others, 0.01 * 0.25.
    """

    summary: str
    source: str
    selector: Selector
    transfer: Transfer = "keep"
    rule: Rule = AdamW()
    residual: Residual = Discard()
    lr: float = 1e-2
    scale: float = 0.25


_GALORE = "Zhao et al. 2024, arXiv 2403.03507"
_SARA = "Zhang et al. 2025, arXiv 2502.05790"
_FIRA = "Chen et al. 2024, arXiv 2410.01623"
_GOLORE = "He et al. 2024, arXiv 2410.11289"

RECIPES: dict[str, Recipe] = {
    "galore_adamw": Recipe("GaLore: the dominant subspace", _GALORE, Dominant()),
    "sara_adamw": Recipe("SARA: an importance-sampled subspace", _SARA, Importance()),
    "golore_adamw": Recipe("GoLore: a random subspace", _GOLORE, Random(), "rotate", lr=2.5e-3, scale=1.0),
    "golore_hybrid_adamw": Recipe(
        "GoLore@20%: dominant, then random for the last fifth", _GOLORE, Switch(Dominant(), Random(), at=0.8), "rotate",
        lr=2.5e-3, scale=1.0,
    ),
    "fira_adamw": Recipe("Fira: GaLore and the scaled residual", _FIRA, Dominant(), residual=Fira()),
    "fira_sara_adamw": Recipe("Fira with SARA's subspace", f"{_FIRA}; {_SARA}", Importance(), residual=Fira()),
}  # fmt: skip
"""By name. Full-rank ``adamw`` is torch's own, the baseline."""

_BASELINES = {"adamw": "full-rank AdamW (torch.optim.AdamW)"}
_BASELINE_LR = 1e-3


def list_optimizers(pattern: str = "*") -> dict[str, str]:
    """Names that ``create`` knows and a line on each; ``pattern`` is a part of a name, or holds wildcards."""
    rows = _BASELINES | {name: f"{recipe.summary} ({recipe.source})" for name, recipe in RECIPES.items()}
    wanted = pattern.casefold() if set(pattern) & set("*?[") else f"*{pattern.casefold()}*"
    return {name: line for name, line in rows.items() if fnmatch.fnmatch(name, wanted)}


class Defaults(NamedTuple):
    """What ``create`` uses where nothing is given; ``None`` for what the method does not have."""

    lr: float
    scale: float | None
    transfer: Transfer | None


def defaults_of(name: str) -> Defaults:
    """The default settings of a method, by name."""
    _check_name(name)
    if name in _BASELINES:
        return Defaults(_BASELINE_LR, None, None)
    recipe = RECIPES[name]
    return Defaults(recipe.lr, recipe.scale, recipe.transfer)


def create(
    name: str,
    model: nn.Module,
    *,
    lr: float | Tensor | None = None,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float | None = None,
    proj_type: str = "std",
    transfer: Transfer | None = None,
    selector: str | Selector | Mapping[str, Any] | None = None,
    residual: str | Residual | Mapping[str, Any] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    stagger: bool = False,
    seed: int = 0,
    total_steps: int | None = None,
    targets: str | list[str] = "all-linear",
    exclude: tuple[str, ...] = EXCLUDED,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> torch.optim.Optimizer:
    """An optimizer by its paper's name, for all trainable parameters of ``model``.

    Args:
        name: one of ``list_optimizers()``. ``adamw`` ignores what concerns subspaces.
        model: its ``nn.Linear`` weights are projected, except those that ``exclude`` names.
        lr: learning rate; ``None`` is the recipe's own, as is ``None`` for scale and transfer.
        selector: another selector, its name, or settings for the recipe's own such as ``{"power": 2.0, "floor": 0.1}``.
        residual: likewise, such as ``{"mode": "official"}``.
        weight_decay: decoupled; parameters of one dimension (biases, norms) are never decayed.
        total_steps: length of the run; the hybrid needs it.
        targets, exclude, overrides: see ``subspan.split_parameters``.

    The other arguments are those of ``SubspaceOptimizer``.

    Raises:
        ValueError: an unknown name (near ones are listed), or a setting out of range.
    """
    _check_name(name)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: got a {type(model).__name__}; expected a torch.nn.Module, not its parameters")
    if rank is None and name not in _BASELINES:
        raise ValueError(f"rank=None: {name} needs a whole number >= 1; the full-rank baseline is 'adamw'")
    groups = split_parameters(
        model,
        rank=None if name in _BASELINES else rank,
        targets=targets,
        exclude=exclude,
        overrides=overrides,
        decay_vectors=False,
    )
    lr = defaults_of(name).lr if lr is None else lr
    if name in _BASELINES:
        for group in groups:
            del group["rank"]  # ours; torch's groups do without
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    recipe = RECIPES[name]
    chosen = _with(recipe.selector, selector, SELECTORS, "selector")
    if isinstance(chosen, Switch) and chosen.total_steps is None:
        chosen = replace(chosen, total_steps=total_steps)
    if isinstance(chosen, Switch) and not chosen.switches_within(update_proj_gap):
        logger.warning("%s never switches: no refresh falls after %s of %s steps", name, chosen.at, chosen.total_steps)
    optimizer = SubspaceOptimizer(
        groups,
        lr,
        rank,
        selector=chosen,
        rule=AdamW(betas, eps),
        residual=_with(recipe.residual, residual, RESIDUALS, "residual"),
        transfer=transfer or recipe.transfer,
        update_proj_gap=update_proj_gap,
        scale=recipe.scale if scale is None else scale,
        proj_type=proj_type,
        weight_decay=weight_decay,
        stagger=stagger,
        seed=seed,
    )
    for pattern, settings in (overrides or {}).items():
        for key in settings:
            if key not in optimizer.defaults:
                raise ValueError(f"overrides[{pattern!r}]: {key!r} is no setting; {near_names(key, optimizer.defaults)}")
    return optimizer


def _check_name(name: str) -> None:
    known = list_optimizers()
    if name not in known:
        raise ValueError(f"optimizer {name!r} is unknown; {near_names(name, known)} (subspan list optimizers shows all)")


def _with(
    part: Part, change: str | Part | Mapping[str, Any] | None, table: Mapping[str, Callable[[], Part]], what: str
) -> Part:
    """``part`` itself, with settings changed, or replaced."""
    if change is None:
        return part
    if not isinstance(change, Mapping):
        return look_up(change, table, what)
    allowed = [field.name for field in fields(part)]  # type: ignore[arg-type]  # every part is a dataclass
    for key, value in change.items():
        if key not in allowed:
            raise ValueError(f"{what} setting {key!r}: {type(part).__name__} has {', '.join(allowed) or 'no settings'}")
        if is_dataclass(getattr(part, key)) and not is_dataclass(value):
            raise ValueError(
                f"{what} setting {key!r}={value!r}: expected a part, as an object; build the {what} itself instead"
            )
    try:
        return replace(part, **change)  # type: ignore[type-var]
    except TypeError as error:  # a setting that does not compare with a number
        raise ValueError(f"{what}={dict(change)}: {error}; {type(part).__name__} is by default {part}") from error
