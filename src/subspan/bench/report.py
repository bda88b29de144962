"""Measurements as text."""

from collections.abc import Mapping
from typing import Any


def text(found: Mapping[str, Any]) -> str:
    """A table of memory, or lines on time."""
    return _memory(found["rows"]) if "rows" in found else _time(found)


def _memory(rows: list[dict[str, Any]]) -> str:
    columns = [key for key in rows[0] if key.endswith("_bytes")]
    cells = [["MB", *(key.removesuffix("_bytes").replace("_", " ") for key in columns)]]
    for row in rows:
        cells.append([row["name"], *(f"{row[key] / 1e6:.1f}" for key in columns)])
        # Only where it says something else.
        formula = row["formula"]
        if any(formula[key] != row[key] for key in columns if key in formula):
            cells.append(["  formula", *(f"{formula[key] / 1e6:.1f}" if key in formula else "" for key in columns)])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def _time(found: Mapping[str, Any]) -> str:
    ratio, shapes = found["ratio_vs_adamw_fused"], found["shapes"]
    return (
        f"{shapes['model']}, {shapes['tokens']} tokens, rank {shapes['rank']} of {shapes['hidden']}: a step takes "
        f"{ratio['median']:.3f} of fused AdamW's time ({ratio['low']:.3f} to {ratio['high']:.3f}, {found['pairs']} pairs, "
        f"{found['threads']} threads) and {found['flops_ratio']:.3f} of its matmul FLOPs"
    )
