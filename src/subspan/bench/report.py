"""Measurements of memory, traffic and training time as text."""

from collections.abc import Mapping
from typing import Any

from subspan.utils.tables import aligned


def text(found: Mapping[str, Any]) -> str:
    """Write a table of memory or of what is sent, or a line on time."""
    if "world" in found:
        return _sent(found)
    return _memory(found["rows"]) if "rows" in found else _time(found)


def _memory(rows: list[dict[str, Any]]) -> str:
    columns = [key for key in rows[0] if key.endswith("_bytes")]
    cells = [["MB", *(key.removesuffix("_bytes").replace("_", " ") for key in columns)]]
    for row in rows:
        cells.append([row["name"], *(f"{row[key] / 1e6:.1f}" for key in columns)])
        # The formula has a line only where it differs.
        formula = row["formula"]
        if any(formula[key] != row[key] for key in columns if key in formula):
            cells.append(["  formula", *(f"{formula[key] / 1e6:.1f}" if key in formula else "" for key in columns)])
    return aligned(cells)


def _sent(found: Mapping[str, Any]) -> str:
    """Write the bytes that a rank sends, and below a row its closed form where that differs."""
    cells = [["MB that each rank sends", "step", "refresh", "mean", "collectives of a step", "more in a refresh"]]
    for row in found["rows"]:
        step, refresh = (row[kind]["collectives"] for kind in ("step", "refresh"))
        more = {
            operation: [calls - step.get(operation, [0, 0])[0], size - step.get(operation, [0, 0])[1]]
            for operation, (calls, size) in refresh.items()
        }
        wires = (row["step"]["wire_bytes"], row["refresh"]["wire_bytes"], row["amortised_wire_bytes"])
        cells.append([row["name"], *(f"{size / 1e6:.1f}" for size in wires), _collectives(step), _collectives(more)])
        if any(row["formula"][kind] != sizes_of(row[kind]) for kind in ("step", "refresh")):
            cells.append(["  formula", "", "", "", *(str(row["formula"][kind]) for kind in ("step", "refresh"))])
    above = (
        f"{found['model']} in fp32, world {found['world']}, rank {found['rank']}, a refresh in {found['period']} steps"
    )
    return f"{above}\n{aligned(cells)}"


def sizes_of(sent: Mapping[str, Any]) -> dict[str, int]:
    """Payloads in bytes, by operation."""
    return {operation: size for operation, (_, size) in sent["collectives"].items()}


def _collectives(counted: Mapping[str, Any]) -> str:
    words = (
        f"{calls or 'larger'} {operation} {size / 1e6:.1f}" for operation, (calls, size) in counted.items() if size
    )
    return ", ".join(words) or "-"


def _time(found: Mapping[str, Any]) -> str:
    ratio, shapes = found["ratio_vs_adamw_fused"], found["shapes"]
    return (
        f"{shapes['model']}, {shapes['tokens']} tokens, rank {shapes['rank']} of {shapes['hidden']}: a step takes "
        f"{ratio['median']:.3f} of fused AdamW's time ({ratio['low']:.3f} to {ratio['high']:.3f}, {found['pairs']} "
        f"pairs, {found['threads']} threads) and {found['flops_ratio']:.3f} of its matmul FLOPs"
    )
