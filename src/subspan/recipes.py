"""The names that ``create`` knows, such as ``sara_adamw_8bit``: a family, a rule, and how moments are stored.

A paper that recombines known parts is one more row of ``_FAMILIES``. The rules that can train it are a field of that
row.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from subspan.parts import Residual, Rule, Selector, Transfer
from subspan.residuals import Discard, ErrorFeedback, Fira, Sketch
from subspan.rules import RULES
from subspan.selectors import (
    Coordinates,
    Dominant,
    Gaussian,
    Importance,
    Lazy,
    OnlinePCA,
    PowerIteration,
    Random,
    Switch,
)
from subspan.storage.allocation import StateDtype
from subspan.utils.errors import SettingError
from subspan.utils.suggestions import near_names


@dataclass(frozen=True)
class Family:
    """How a method chooses its subspace and what it does with the rest of the gradient, for any rule inside."""

    summary: str
    """One line about the method."""
    source: str
    """The paper."""
    selector: Selector | None
    """What chooses the subspace; ``None`` for full rank."""
    transfer: Transfer = "keep"
    """What becomes of the moments when the basis changes."""
    residual: Residual = Discard()
    """What becomes of the gradient outside the subspace."""
    scale: float = 0.25
    """Default factor on updates of projected matrices."""
    rules: str = "adamw"
    """The rules that it is trained with, which are the second part of the names; ``_8bit`` keeps moments in 8 bits."""
    rule_settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the rule for which the paper has other values than the rule's own defaults."""
    backward_side: bool = False
    """Whether ``subspan pretrain`` uses backward-side layers unless told otherwise."""
    step: float | None = None
    """Default ``lr * scale``, where it is another than that of the rule."""


_GALORE = "Zhao et al. 2024, arXiv 2403.03507"
_SARA = "Zhang et al. 2025, arXiv 2502.05790"
_FIRA = "Chen et al. 2024, arXiv 2410.01623"
_GOLORE = "He et al. 2024, arXiv 2410.11289"

_SKETCHED = 5e-3
"""Twice GaLore's: of 2.5e-3, 5e-3 and 1e-2 the best in the backward pass (llama-nano, 1,000 steps, seed 0)."""
_SIX = "adamw adafactor adam_mini sgd lion adamw_8bit"
_FAMILIES: dict[str, Family] = {
    "": Family("full rank", "", None, scale=1.0, rules=_SIX),
    "galore": Family("GaLore: the dominant subspace", _GALORE, Dominant(), rules=_SIX),
    "sara": Family("SARA: an importance-sampled subspace", _SARA, Importance(), rules=_SIX),
    "golore": Family(
        "GoLore: a random subspace", _GOLORE, Random(), "rotate", scale=1.0, rules="adamw sgd adamw_8bit"
    ),
    "golore_hybrid": Family(
        "GoLore@20%: dominant, then random for the last fifth", _GOLORE, Switch(Dominant(), Random(), at=0.8), "rotate",
        scale=1.0, rules="adamw sgd adamw_8bit",
    ),
    "fira": Family(
        "Fira: GaLore and the scaled residual", _FIRA, Dominant(), residual=Fira(), rules="adamw adamw_8bit"
    ),
    "fira_sara": Family(
        "Fira with SARA's subspace", f"{_FIRA}; {_SARA}", Importance(), residual=Fira(), rules="adamw adamw_8bit"
    ),
    "sara_sketch": Family(
        "SARA's subspace, and Fira's residual in directions drawn at every step", f"{_SARA}; {_FIRA}", Importance(),
        residual=Sketch(), rules="adamw adamw_8bit", step=_SKETCHED,
    ),
    "golore_sketch": Family(
        "A random subspace, and Fira's residual in directions drawn at every step", f"{_GOLORE}; {_FIRA}", Random(),
        "rotate", Sketch(), scale=1.0, rules="adamw adamw_8bit", step=_SKETCHED,
    ),
    "galore_lazy": Family(
        "GaLore, refreshed less often where the subspace stands still", f"{_GALORE}; Zhang et al. 2024, arXiv 2407.08296",
        Lazy(Dominant()),
    ),
    "online_pca": Family(
        "Online Subspace Descent: the basis follows every gradient", "Liang et al. 2024, arXiv 2408.12857", OnlinePCA()
    ),
    "flora": Family(
        "FLora: a Gaussian subspace, stored as a seed", "Hao et al. 2024, arXiv 2402.03293", Gaussian(), "rotate",
        scale=1.0, rules="adamw adafactor sgd",
    ),
    "rso": Family(
        "RSO: a new random subspace at each refresh, in the backward pass", "Chen et al. 2025, arXiv 2502.07222",
        Random(scaled=True), "reset", scale=1.0, rules="adamw sgd adamw_8bit", backward_side=True,
    ),
    "grass": Family(
        "GRASS: the columns of largest norm", "Muhamed et al. 2024, arXiv 2406.17660", Coordinates("top"), "reset", scale=1.0
    ),
    "gasare": Family(
        "GaSare: the columns of largest norm", _GOLORE, Coordinates("top"), "rotate", scale=1.0, rules="adamw sgd"
    ),
    "gosare": Family("GoSare: random columns", _GOLORE, Coordinates("uniform"), "rotate", scale=1.0, rules="adamw sgd"),
    "ldadam": Family(
        "LDAdam: one power iteration a step, both moments transported, the error fed back",
        "Robert et al. 2024, arXiv 2410.16103", PowerIteration(), "moments", ErrorFeedback(), scale=1.0,
        rule_settings={"betas": (0.908, 0.99)},
    ),
}  # fmt: skip
"""Families by the first part of their names. The order is that of ``list_optimizers``."""

_RULES = {
    # title, source, lr * scale
    "adamw": ("AdamW", "Loshchilov & Hutter 2019, arXiv 1711.05101", 2.5e-3),
    "adafactor": ("Adafactor", "Shazeer & Stern 2018, arXiv 1804.04235", 2.5e-3),
    "adam_mini": ("Adam-mini", "Zhang et al. 2024, arXiv 2406.16793", 2.5e-3),
    "sgd": ("SGD with momentum", "", 0.5),
    "lion": ("Lion", "Chen et al. 2023, arXiv 2302.06675", 1e-3),
}
"""Default ``lr * scale`` of each rule.

For the relatives of Adam it is GaLore's 0.01 * 0.25. GoLore's scripts train at scale 1. At one ``lr * scale``, methods
with orthonormal bases take steps of one size; FLora, with ``E[Q Qᵀ] = I``, takes steps of full rank's size.
"""
_EIGHT_BIT = "Dettmers et al. 2022, arXiv 2110.02861"


class Recipe(NamedTuple):
    """A name that ``create`` knows, with its parts and default settings."""

    name: str
    """The name, such as ``sara_adamw``."""
    summary: str
    """One line about it, as ``subspan list`` prints it."""
    source: str
    """The papers of its parts; empty if there is none to name."""
    selector: Selector | None
    """What chooses the subspace; ``None`` for full rank."""
    transfer: Transfer
    """What becomes of the moments when the basis changes."""
    rule: Rule
    """What takes the step inside the subspace."""
    residual: Residual
    """What becomes of the gradient outside the subspace."""
    lr: float
    """Default learning rate."""
    scale: float
    """Default factor on updates of projected matrices."""
    state_dtype: StateDtype
    """How moments are kept."""
    backward_side: bool
    """Whether ``subspan pretrain`` uses backward-side layers unless told otherwise."""


def _recipe(prefix: str, rule: str) -> Recipe:
    family, kind = _FAMILIES[prefix], rule.removesuffix("_8bit")
    title, rule_source, step = _RULES[kind]
    eight_bit = kind != rule
    sources = (family.source, rule_source if kind != "adamw" or not prefix else "", _EIGHT_BIT if eight_bit else "")
    return Recipe(
        name=f"{prefix}_{rule}".removeprefix("_"),
        summary=f"{family.summary}; {title}" + (" in 8 bits" if eight_bit else ""),
        source="; ".join(source for source in sources if source),
        selector=family.selector,
        transfer=family.transfer,
        rule=replace(RULES[kind](), **family.rule_settings),
        residual=family.residual,
        lr=(family.step or step) / family.scale,
        scale=family.scale,
        state_dtype="int8" if eight_bit else "float32",
        backward_side=family.backward_side,
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for prefix, family in _FAMILIES.items()
    for recipe in (_recipe(prefix, rule) for rule in family.rules.split())
}
"""Recipes by name. ``adamw``, at full rank, is torch's own: the baseline."""


def list_optimizers(pattern: str = "*") -> dict[str, str]:
    """Return the names that ``create`` knows, with one line about each.

    Args:
        pattern: part of a name, or an expression with the wildcards ``*``, ``?`` and ``[...]`` for a whole name.
    """
    wanted = pattern.casefold() if set(pattern) & set("*?[") else f"*{pattern.casefold()}*"
    return {
        name: recipe.summary + (f" ({recipe.source})" if recipe.source else "")
        for name, recipe in RECIPES.items()
        if fnmatch.fnmatch(name, wanted)
    }


def find(name: str) -> Recipe:
    """Return the recipe of this name. For an unknown name, raise a ``ValueError`` that lists similar names."""
    if name not in RECIPES:
        raise SettingError(
            f"optimizer {name!r} is unknown; {near_names(name, RECIPES)} (subspan list optimizers shows all)"
        )
    return RECIPES[name]
