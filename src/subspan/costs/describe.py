"""What a recipe is made of, and what it holds, in primitives."""

from typing import Any

from subspan.costs.state_costs import StateCosts
from subspan.recipes import find


def describe(name: str) -> dict[str, Any]:
    """Describe a recipe in primitives: its parts, paper and defaults, and the bytes of state that it holds.

    The formulas are in the names of ``state_formulas.VARIABLES``.
    """
    recipe = find(name)
    parts = {"rule": repr(recipe.rule)}
    if recipe.selector is not None:
        parts = {"selector": repr(recipe.selector)} | parts
        parts |= {"residual": repr(recipe.residual), "transfer": recipe.transfer}
    return {
        "name": name,
        "summary": recipe.summary,
        "paper": recipe.source or None,
        "parts": parts | {"state_dtype": recipe.state_dtype},
        "backward_side": recipe.backward_side,
        "lr": recipe.lr,
        "scale": recipe.scale if recipe.selector is not None else None,
        "state_formula": StateCosts.of_recipe(name).formulas(),
    }
