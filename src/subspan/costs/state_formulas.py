"""What a method holds, in bytes, as expressions that can be read and evaluated.

Sizes: a projected matrix is ``m x n`` with ``m >= n`` (under ``proj_type="std"``) at rank ``r``; any other matrix ``a x
    b``; a
vector ``k``. ``q(a, b)`` is a moment of ``a x b`` entries in 8 bits. Weights of fp32 or less.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from subspan.parts import Residual, Rule, Selector
from subspan.step.carriers import layer_of
from subspan.step.layout import PROJ_TYPES, layout_of
from subspan.storage.eight_bit import SMALLEST
from subspan.utils.errors import SettingError

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


def formulas(
    selector: Selector | None, rule: Rule, residual: Residual, state_dtype: str, width: int = 4
) -> dict[str, str]:
    """Bytes of state of one parameter: ``projected`` (not of a full-rank method), ``matrix`` and ``vector``.

    Of a method with a subspace also ``basis``, of what ``projected`` holds of it and of each basis that backward-side
    layers
    share; and where the method can make its gradient in the backward pass ``carrier``, of a weight of ``rows x
    columns``.
    ``width``: bytes of a number of a moment that is not in 8 bits; torch's own AdamW has that of the weights.
    """

    def total(*parts: Mapping[str, str]) -> str:
        return _sum([entry for part in parts for entry in part.values()], state_dtype, width)

    found = {"matrix": total(rule.memory(("a", "b"), -2)), "vector": total(rule.memory(("k",), -2))}
    if selector is None:
        return found
    others = (selector.memory("n", "r"), residual.memory("m", "n"))
    tall, wide = (total(rule.memory(("m", "r"), rows), *others) for rows in (-2, -1))
    projected = {"projected": tall if tall == wide else f"{tall} if rows >= columns else {wide}"}
    basis = {"basis": total(selector.memory("columns", "r")) or "0"}
    if selector.tracks or residual.needs_gradient:
        return projected | found | basis
    return projected | found | {"carrier": total(rule.memory(("rows", "r"), -2))} | basis


Parallel = Literal["ddp", "fsdp"]
"""Whether each rank holds everything, or ``fully_shard`` has spread the rows of every parameter."""


def evaluate_groups(
    formula: Mapping[str, str],
    groups: Iterable[Mapping[str, Any]],
    *,
    parallel: Parallel = "ddp",
    world: int = 1,
    index: int = 0,
) -> dict[str, int]:
    """Bytes that one rank holds of the parameters in these groups, from their shapes alone: tensors on ``meta`` will
    do.

    Under ``fsdp`` the rank has ``torch.chunk``'s part of the rows of each parameter, gradient and moment,
    ``ceil(rows / world)`` of them; the last ranks have fewer or none. The bases are whole on every rank.

    Args:
        formula: of the method (``formulas``).
        groups: of an optimizer, or alike: ``params``, ``rank``, ``proj_type``. The parameters may be sharded already.
        parallel, world: how many ranks, and what each holds.
        index: of the rank.

    Returns:
        ``weights`` (those of backward-side layers included), ``carriers``, ``gradients``, ``states`` and ``bases``.
        What
        ``fully_shard`` fills its last shards up with, and the blocks it gathers for a moment, are not counted.

    Raises:
        ValueError: a world, rank or way to share out of range; or a basis of the rows, which sharded rows do not have.
    """
    if parallel not in ("ddp", "fsdp"):
        raise SettingError(f"parallel={parallel!r}: expected 'ddp' or 'fsdp'")
    if world < 1:
        raise SettingError(f"world={world}: expected a number of ranks >= 1")
    if not 0 <= index < world:
        raise SettingError(f"index={index}: expected a rank from 0 to {world - 1}, below world={world}")
    held = dict.fromkeys(("weights", "carriers", "gradients", "states", "bases"), 0)
    sharded = parallel == "fsdp"
    for group in groups:
        if sharded and PROJ_TYPES[group.get("proj_type", "std")] == "left":
            raise SettingError(
                f"proj_type={group['proj_type']!r}: a basis of rows that fsdp spreads over ranks; use 'std' or 'right'"
            )
        for p in group["params"]:
            layer, shape = layer_of(p), tuple(p.shape)
            rows = _rows_here(shape, world if sharded else 1, index if sharded else 0)
            size = p.element_size() * _numel(shape, rows)
            held["gradients"] += size
            if layer is None:
                held["weights"] += size
                state, basis = _state(formula, shape, rows, sharded, group)
            else:
                held["carriers"] += size
                held["weights"] += layer.weight.element_size() * _numel(tuple(layer.weight.shape), rows)
                smallest, (whole, r) = group.get("min_8bit_size", SMALLEST), shape
                state = _value(formula["carrier"], smallest, whole, rows=rows, r=r)
                basis = (
                    _value(formula["basis"], smallest, columns=layer.weight.shape[1], r=r) if layer.number == 0 else 0
                )
            held["states"] += state
            held["bases"] += basis
    return held


def _rows_here(shape: tuple[int, ...], world: int, index: int) -> int:
    rows = shape[0] if shape else 1
    chunk = -(-rows // world)
    return min(max(rows - index * chunk, 0), chunk)


def _numel(shape: tuple[int, ...], rows: int) -> int:
    return rows * math.prod(shape[1:])


def _state(
    formula: Mapping[str, str],
    shape: tuple[int, ...],
    rows: int,
    sharded: bool,
    group: Mapping[str, Any],
) -> tuple[int, int]:
    """Bytes of the state of an ordinary parameter of which ``rows`` are here: all but its basis, and the basis."""
    smallest, rank = group.get("min_8bit_size", SMALLEST), group.get("rank")
    if len(shape) < 2:
        return _value(formula["vector"], smallest, k=rows), 0
    layout = layout_of(shape, rank, group.get("proj_type", "std"), group.get("flatten", False))
    if len(layout.shape) == 3:  # a stack, of which ``rows`` matrices are here: each has moments and a basis of its own
        stack, (whole, columns) = shape[0], layout.shape[1:]
        number, rows = rows, whole
    else:
        stack, number, (whole, columns) = 1, 1, layout.shape
    if layout.side is None or rank is None:
        sizes, kind = {"a": rows, "b": columns}, "matrix"
    # "rows >= columns" in a formula says that the columns are compressed, as those of a tall matrix are.
    elif sharded or layout.side == "right":
        sizes, kind = {"m": rows, "n": columns, "r": rank, "rows": 1, "columns": 0}, "projected"
    else:
        sizes, kind = {"m": columns, "n": rows, "r": rank, "rows": 0, "columns": 1}, "projected"
        whole = columns
    counters = _value(formula[kind], smallest, **dict.fromkeys(sizes, 0))  # one for the whole stack
    state = (_value(formula[kind], smallest, whole * stack, **sizes) - counters) * number + counters
    if kind == "matrix":
        return state, 0
    basis = _value(formula["basis"], smallest, columns=sizes["n"], r=sizes["r"]) * number
    return state - basis, basis


def _value(expression: str, smallest: int, whole: int | None = None, **sizes: int) -> int:
    """``whole``: rows of a moment on all ranks, which decide whether it is large enough for 8 bits."""

    def quantised(a: int, b: int) -> int:
        return 4 * a * b if (whole or a) * b < smallest else a * b + 4 * a * -(-b // 256)

    names: dict[str, int | Callable[[int, int], int]] = {**sizes, "q": quantised}
    return int(eval(expression, {"__builtins__": {}}, names))  # written by the parts, never read from outside


def _sum(terms: Iterable[str], state_dtype: str, width: int) -> str:
    """``["4", "M(m*r)", "M(m*r)", "4*n*r"]`` as ``8*m*r + 4*n*r + 4``."""
    factors: dict[str, int] = {}
    for term in terms:
        if moment := re.fullmatch(r"M\((.*)\)", term):
            packed = state_dtype == "int8" and "*" in moment[1]  # vectors are not
            term = f"q({moment[1].replace('*', ', ')})" if packed else f"{width}*{moment[1]}"
        number, _, rest = term.partition("*") if term[0].isdigit() else ("1", "", term)
        factors[rest] = factors.get(rest, 0) + int(number)
    ordered = sorted(factors.items(), key=lambda item: item[0] == "")  # the constant last
    return " + ".join(
        str(factor) if not rest else rest if factor == 1 else f"{factor}*{rest}" for rest, factor in ordered
    )
