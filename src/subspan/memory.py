"""What a method holds, in bytes, as expressions that can be read and evaluated.

Sizes: a projected matrix is ``m x n`` with ``m >= n`` (under ``proj_type="std"``) at rank ``r``; any other matrix ``a x b``; a
vector ``k``. ``q(a, b)`` is a moment of ``a x b`` entries in 8 bits. Weights of fp32 or less.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from subspan.carriers import layer_of
from subspan.parts import Residual, Rule, Selector
from subspan.quantization import SMALLEST
from subspan.shapes import layout_of

VARIABLES = {
    "m": "longer side of a projected matrix",
    "n": "its shorter side",
    "r": "rank",
    "rows": "rows of a projected matrix",
    "columns": "its columns, which are the inputs of its layer",
    "a": "rows of a matrix that is not projected",
    "b": "its columns",
    "k": "length of a vector",
    "q(a, b)": "bytes of a moment of a x b entries in 8 bits: 4*a*b if a*b < min_8bit_size (4096), else a*b + 4*a*ceil(b/256)",
}


def formulas(selector: Selector | None, rule: Rule, residual: Residual, state_dtype: str) -> dict[str, str]:
    """Bytes of state of one parameter: ``projected`` (not of a full-rank method), ``matrix`` and ``vector``.

    Where the method can make its gradient in the backward pass also ``carrier``, of a weight of ``rows x columns``, and
    ``basis``, of each basis that layers share.
    """

    def total(*parts: Mapping[str, str]) -> str:
        return _sum([entry for part in parts for entry in part.values()], state_dtype)

    found = {"matrix": total(rule.memory(("a", "b"), -2)), "vector": total(rule.memory(("k",), -2))}
    if selector is None:
        return found
    others = (selector.memory("n", "r"), residual.memory("m", "n"))
    tall, wide = (total(rule.memory(("m", "r"), rows), *others) for rows in (-2, -1))
    projected = {"projected": tall if tall == wide else f"{tall} if rows >= columns else {wide}"}
    if selector.tracks or residual.needs_gradient:
        return projected | found
    backward = {"carrier": total(rule.memory(("rows", "r"), -2)), "basis": total(selector.memory("columns", "r")) or "0"}
    return projected | found | backward


def evaluate_groups(formula: Mapping[str, str], groups: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Bytes of state of an optimizer with these parameter groups: ``states``, and ``bases`` of backward-side layers."""
    states = bases = 0
    for group in groups:
        smallest = group.get("min_8bit_size", SMALLEST)
        for p in group["params"]:
            layer = layer_of(p)
            if layer is None:
                states += _bytes(formula, tuple(p.shape), group.get("rank"), smallest)
                continue
            states += _value(formula["carrier"], smallest, rows=p.shape[0], r=p.shape[1])
            if layer.number == 0:
                bases += _value(formula["basis"], smallest, columns=layer.weight.shape[1], r=p.shape[1])
    return {"states": states, "bases": bases}


def _bytes(formula: Mapping[str, str], shape: tuple[int, ...], rank: int | None, smallest: int) -> int:
    if len(shape) < 2:
        return _value(formula["vector"], smallest, k=shape[0] if shape else 1)
    rows, columns = shape
    if layout_of(shape, rank, "std").side is None or rank is None:
        return _value(formula["matrix"], smallest, a=rows, b=columns)
    return _value(formula["projected"], smallest, m=max(shape), n=min(shape), r=rank, rows=rows, columns=columns)


def _value(expression: str, smallest: int, **sizes: int) -> int:
    def quantised(a: int, b: int) -> int:
        return 4 * a * b if a * b < smallest else a * b + 4 * a * -(-b // 256)

    names: dict[str, int | Callable[[int, int], int]] = {**sizes, "q": quantised}
    return int(eval(expression, {"__builtins__": {}}, names))  # written by the parts, never read from outside


def _sum(terms: Iterable[str], state_dtype: str) -> str:
    """``["4", "M(m*r)", "M(m*r)", "4*n*r"]`` as ``8*m*r + 4*n*r + 4``."""
    factors: dict[str, int] = {}
    for term in terms:
        if moment := re.fullmatch(r"M\((.*)\)", term):
            packed = state_dtype == "int8" and "*" in moment[1]  # vectors are not
            term = f"q({moment[1].replace('*', ', ')})" if packed else f"4*{moment[1]}"
        number, _, rest = term.partition("*") if term[0].isdigit() else ("1", "", term)
        factors[rest] = factors.get(rest, 0) + int(number)
    ordered = sorted(factors.items(), key=lambda item: item[0] == "")  # the constant last
    return " + ".join(str(factor) if not rest else rest if factor == 1 else f"{factor}*{rest}" for rest, factor in ordered)
