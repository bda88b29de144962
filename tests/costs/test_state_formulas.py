"""The formulas of state: those that were recorded, and their value against what the parts allocate."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import EVERY_RULE, EVERY_SELECTOR, RANK

from subspan.costs.describe import describe
from subspan.costs.state_costs import StateCosts
from subspan.parts import Residual, Rule, Selector
from subspan.recipes import RECIPES
from subspan.residuals import RESIDUALS, Discard, Fira
from subspan.rules import SGD, Adafactor, AdamW
from subspan.selectors import Dominant, Gaussian
from subspan.storage.allocation import State, allocate, tensor_bytes

EVERY_RESIDUAL = [*(residual() for residual in RESIDUALS.values()), Fira(limiter=None)]


def value(formula: str, **sizes: int) -> int:
    return int(eval(formula, {}, sizes))


def test_formulas_are_those_recorded() -> None:
    """Every listed optimizer prints the formulas that were recorded, character for character and in this order."""
    recorded = json.loads((Path(__file__).parent / "state_formulas.json").read_text())
    assert json.dumps({name: describe(name)["state_formula"] for name in RECIPES}) == json.dumps(recorded)


@pytest.mark.parametrize("shape", [(48, 20), (20, 48)], ids=str)
@pytest.mark.parametrize("rule", [*EVERY_RULE, SGD(0.0), Adafactor(beta1=0.0)], ids=repr)
def test_rules(rule: Rule, shape: tuple[int, int]) -> None:
    """A formula names every tensor of ``init``: of a projected matrix, of another one, and of a vector."""
    formulas = StateCosts(Gaussian(), rule, Discard()).formulas()  # holds no tensor itself
    (rows, columns), p = shape, torch.zeros(shape)
    inside = rule.init(p, (max(shape), RANK), -2 if rows >= columns else -1)
    sizes = {"m": max(shape), "n": min(shape), "r": RANK, "rows": rows, "columns": columns}
    assert value(formulas["projected"], **sizes) == tensor_bytes(inside)
    assert value(formulas["matrix"], a=rows, b=columns) == tensor_bytes(rule.init(p, shape, -2))
    assert value(formulas["vector"], k=17) == tensor_bytes(rule.init(p, (17,), -2))


@pytest.mark.parametrize("residual", EVERY_RESIDUAL, ids=repr)
@pytest.mark.parametrize("selector", EVERY_SELECTOR, ids=repr)
def test_selectors_and_residuals(selector: Selector, residual: Residual) -> None:
    """A formula adds up what all parts hold."""
    formulas = StateCosts(selector, SGD(0.0), residual).formulas()
    G = torch.zeros(48, 20)
    basis, rest = tensor_bytes(selector.init(G, RANK)), tensor_bytes(residual.init(G))
    assert value(formulas["basis"], rows=48, columns=20, r=RANK) == basis
    assert value(formulas["projected"], m=48, n=20, r=RANK) == basis + rest + 4  # and a count of steps


@dataclass(frozen=True)
class Blocked(AdamW):
    """A user's rule: AdamW with two further numbers for each row, or with one for each three rows."""

    third: bool = False

    def init(self, like: torch.Tensor, shape: tuple[int, ...], row_dim: int) -> State:
        blocks = allocate(like, (-(-shape[0] // 3) if self.third else 2 * shape[0], 1))
        return super().init(like, shape, row_dim) | {"blocks": blocks.to(torch.float64), "clock": 0}


def test_a_part_that_a_user_wrote() -> None:
    """It gets its formula and its bytes from its ``init``; without a formula it still has its bytes."""
    formulas = StateCosts(Dominant(), Blocked(), Discard(), "int8").formulas()
    assert formulas == {
        "projected": "2*q(m, r) + 16*m + 4*n*r + 4",
        "matrix": "2*q(a, b) + 16*a + 4",
        "vector": "24*k + 4",
        "carrier": "2*q(rows, r) + 16*rows + 4",
        "basis": "4*columns*r",
    }
    groups: list[dict[str, Any]] = [{"params": [torch.empty(48, 20)], "rank": RANK}]
    held = StateCosts(Dominant(), Blocked(third=True), Discard()).bytes_held(groups)
    assert (held["states"], held["bases"]) == (2 * 4 * 48 * RANK + 8 * 16 + 4, 4 * 20 * RANK)
    with pytest.raises(ValueError, match=r"no product of a, b, .* with StateCosts\.bytes_held"):
        StateCosts(Dominant(), Blocked(third=True), Discard()).formulas()
