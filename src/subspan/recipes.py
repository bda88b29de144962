"""The papers' names for a choice of parts: a method, a rule, and how the moments are stored.

A paper that recombines known parts is one more row of ``_METHODS``; a rule to train it with, one more word of
``_RULES_OF``.
"""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from subspan.parts import Residual, Rule, Selector, Transfer
from subspan.residuals import Discard, ErrorFeedback, Fira
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
class Method:
    """How the subspace is chosen and left, whatever the rule inside it."""

    summary: str
    source: str
    selector: Selector | None
    """``None`` for full rank."""
    transfer: Transfer = "keep"
    residual: Residual = Discard()
    scale: float = 0.25
    rule: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the rule that the paper sets otherwise than the rule's own."""
    backward_side: bool = False
    """Whether ``subspan pretrain`` lets the backward pass make the low-rank gradient unless told otherwise."""


_GALORE = "Zhao et al. 2024, arXiv 2403.03507"
_SARA = "Zhang et al. 2025, arXiv 2502.05790"
_FIRA = "Chen et al. 2024, arXiv 2410.01623"
_GOLORE = "He et al. 2024, arXiv 2410.11289"

_METHODS: dict[str, Method] = {
    "": Method("full rank", "", None, scale=1.0),
    "galore": Method("GaLore: the dominant subspace", _GALORE, Dominant()),
    "galore_lazy": Method(
        "GaLore, refreshed less often where the subspace stands still", f"{_GALORE}; Zhang et al. 2024, arXiv 2407.08296",
        Lazy(Dominant()),
    ),
    "sara": Method("SARA: an importance-sampled subspace", _SARA, Importance()),
    "golore": Method("GoLore: a random subspace", _GOLORE, Random(), "rotate", scale=1.0),
    "golore_hybrid": Method(
        "GoLore@20%: dominant, then random for the last fifth", _GOLORE, Switch(Dominant(), Random(), at=0.8), "rotate",
        scale=1.0,
    ),
    "fira": Method("Fira: GaLore and the scaled residual", _FIRA, Dominant(), residual=Fira()),
    "fira_sara": Method("Fira with SARA's subspace", f"{_FIRA}; {_SARA}", Importance(), residual=Fira()),
    "online_pca": Method(
        "Online Subspace Descent: the basis follows every gradient", "Liang et al. 2024, arXiv 2408.12857", OnlinePCA()
    ),
    "flora": Method(
        "FLora: a Gaussian subspace, its seed stored", "Hao et al. 2024, arXiv 2402.03293", Gaussian(), "rotate", scale=1.0
    ),
    "rso": Method(
        "RSO: a random subspace, entered anew each time, in the backward pass", "Chen et al. 2025, arXiv 2502.07222",
        Random(scaled=True), "reset", scale=1.0, backward_side=True,
    ),
    "grass": Method(
        "GRASS: the columns of largest norm", "Muhamed et al. 2024, arXiv 2406.17660", Coordinates("top"), "reset", scale=1.0
    ),
    "gasare": Method("GaSare: the columns of largest norm", _GOLORE, Coordinates("top"), "rotate", scale=1.0),
    "gosare": Method("GoSare: random columns", _GOLORE, Coordinates("uniform"), "rotate", scale=1.0),
    "ldadam": Method(
        "LDAdam: one power iteration a step, both moments transported, the error fed back",
        "Robert et al. 2024, arXiv 2410.16103", PowerIteration(), "moments", ErrorFeedback(), scale=1.0,
        rule={"betas": (0.908, 0.99)},
    ),
}  # fmt: skip

_RULES_OF = {
    "": "adamw adafactor adam_mini sgd lion adamw_8bit",
    "galore": "adamw adafactor adam_mini sgd lion adamw_8bit",
    "sara": "adamw adafactor adam_mini sgd lion adamw_8bit",
    "golore": "adamw sgd adamw_8bit",
    "golore_hybrid": "adamw sgd adamw_8bit",
    "fira": "adamw adamw_8bit",
    "fira_sara": "adamw adamw_8bit",
    "galore_lazy": "adamw",
    "online_pca": "adamw",
    "flora": "adamw adafactor sgd",
    "rso": "adamw sgd adamw_8bit",
    "grass": "adamw",
    "gasare": "adamw sgd",
    "gosare": "adamw sgd",
    "ldadam": "adamw",
}

_RULES = {
    # title, source, lr * scale
    "adamw": ("AdamW", "Loshchilov & Hutter 2019, arXiv 1711.05101", 2.5e-3),
    "adafactor": ("Adafactor", "Shazeer & Stern 2018, arXiv 1804.04235", 2.5e-3),
    "adam_mini": ("Adam-mini", "Zhang et al. 2024, arXiv 2406.16793", 2.5e-3),
    "sgd": ("SGD with momentum", "", 0.5),
    "lion": ("Lion", "Chen et al. 2023, arXiv 2302.06675", 1e-3),
}
"""``lr * scale`` by default: GaLore's 0.01 * 0.25 for the relatives of Adam. GoLore's scripts train at scale 1; at the
same ``lr * scale`` the methods with orthonormal bases take steps of one size, and FLora, with ``E[Q Qᵀ] = I``, that of
full rank."""
_EIGHT_BIT = "Dettmers et al. 2022, arXiv 2110.02861"


class Recipe(NamedTuple):
    """A name that ``create`` knows: its parts and default settings."""

    name: str
    summary: str
    source: str
    selector: Selector | None
    transfer: Transfer
    rule: Rule
    residual: Residual
    lr: float
    scale: float
    state_dtype: StateDtype
    backward_side: bool


def _recipe(method: str, rule: str) -> Recipe:
    parts, kind = _METHODS[method], rule.removesuffix("_8bit")
    title, rule_source, step = _RULES[kind]
    eight_bit = kind != rule
    sources = (parts.source, rule_source if kind != "adamw" or not method else "", _EIGHT_BIT if eight_bit else "")
    return Recipe(
        name=f"{method}_{rule}".removeprefix("_"),
        summary=f"{parts.summary}; {title}" + (" in 8 bits" if eight_bit else ""),
        source="; ".join(source for source in sources if source),
        selector=parts.selector,
        transfer=parts.transfer,
        rule=replace(RULES[kind](), **parts.rule),
        residual=parts.residual,
        lr=step / parts.scale,
        scale=parts.scale,
        state_dtype="int8" if eight_bit else "float32",
        backward_side=parts.backward_side,
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for method, rules in _RULES_OF.items()
    for recipe in (_recipe(method, rule) for rule in rules.split())
}
"""By name. Full-rank ``adamw`` is torch's own, the baseline."""


def list_optimizers(pattern: str = "*") -> dict[str, str]:
    """Names that ``create`` knows and a line on each; ``pattern`` is a part of a name, or holds wildcards."""
    wanted = pattern.casefold() if set(pattern) & set("*?[") else f"*{pattern.casefold()}*"
    return {
        name: recipe.summary + (f" ({recipe.source})" if recipe.source else "")
        for name, recipe in RECIPES.items()
        if fnmatch.fnmatch(name, wanted)
    }


def find(name: str) -> Recipe:
    """The recipe of this name; an unknown one is a ``ValueError`` that lists near ones."""
    if name not in RECIPES:
        raise SettingError(
            f"optimizer {name!r} is unknown; {near_names(name, RECIPES)} (subspan list optimizers shows all)"
        )
    return RECIPES[name]
