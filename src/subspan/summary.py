"""The table of what is projected and of the bytes held, with one line for each group and kind of parameter."""

import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from subspan.distributed import local
from subspan.parts import Residual
from subspan.step.carriers import layer_of
from subspan.step.work import whole_layout
from subspan.storage.allocation import State, tensor_bytes
from subspan.utils.ranks import Rank
from subspan.utils.tables import aligned


def table(groups: Iterable[Mapping[str, Any]], state: Mapping[Tensor, State], residual: Residual) -> str:
    """Return the table of groups, ranks, counts, sizes and bytes of state.

    Where the residual has a sketch, its width stands beside the rank, as in ``16 + 16``.
    Bytes are those that this rank holds, and those that it would hold with torch's AdamW.
    """
    rows: dict[tuple[str, str], list[int]] = {}
    for number, group in enumerate(groups):
        for p in group["params"]:
            layout, asked = whole_layout(p, group), group["rank"]
            held, layer = p, layer_of(p)
            if layer is not None:
                held, asked = layer.weight, layer.projection.asked
                kind = f"backward-side, refreshed every {group['update_proj_gap']} steps"
                rank = _in_words(layer.projection.rank, asked, held.shape[1], layer.projection.sketch_width)
            elif layout.rank is not None:
                kind = f"projected, refreshed every {group['update_proj_gap']} steps"
                n = layout.oriented[-1]
                rank = _in_words(layout.rank, asked, n, residual.sketch_width(n, layout.rank))
            elif len(layout.shape) < 2:
                kind, rank = "vectors", "-"
            else:  # a rank that reaches the shorter side compresses nothing
                kind = "full-rank matrices"
                rank = "full" if asked is None else f"full (side <= {asked}{' of a side' if asked < 1 else ''})"
            row = rows.setdefault((f"{number}: {kind}", rank), [0, 0, 0, 0])
            adamw = 2 * local(held).numel() * held.element_size() + 4
            for column, value in enumerate((1, held.numel(), tensor_bytes(state[p]), adamw)):
                row[column] += value
    total = [sum(column) for column in zip(*rows.values(), strict=True)] or [0, 0, 0, 0]
    cells: list[tuple[str, ...]] = [("group", "rank", "count", "parameters", "bytes held", "AdamW's bytes")]
    for (group_name, rank), numbers in [*rows.items(), (("total", ""), total)]:
        cells.append((group_name, rank, *(f"{number:,}" for number in numbers)))
    return aligned(cells)


def _in_words(rank: int, asked: Rank, side: int, sketch: int) -> str:
    """Write a rank, how it follows from a share of a side, and the width of the sketch, if there is one."""
    words = str(rank) if isinstance(asked, int) else f"{rank} ({asked:g} of {side})"
    return f"{words} + {sketch}" if sketch else words


def announce(text: str) -> None:
    """Log ``text``, or write it to stderr if no program has set up logging, which would then drop it.

    ``logging.getLogger("subspan").setLevel("WARNING")`` silences it.
    """
    logger = logging.getLogger("subspan")
    if logging.getLogger().handlers or logger.handlers or logger.level != logging.NOTSET:
        logger.info("%s", text)
    else:
        print(text, file=sys.stderr)
