"""A comparison drawn as bars."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subspan.planning.report import name_of, parts_of
from subspan.utils.figures import COLOURS, GREY, style


def draw(found: Mapping[str, Any], out: Path) -> None:
    """Draw the peaks as stacked bars, one for each method, in the format that the ending of ``out`` names."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = found["rows"]
    largest = max(row["bytes"]["total"] for row in rows)
    with matplotlib.rc_context(style(GREY)):
        figure = Figure(figsize=(9, 0.4 * len(rows) + 1.5), layout="constrained")
        axes = figure.add_subplot()
        left = [0.0] * len(rows)
        for kind, colour in zip(parts_of(rows[0]), COLOURS, strict=False):
            sizes = [parts_of(row)[kind] / 2**30 for row in rows]
            if max(sizes) * 2**30 < largest / 1000:  # too small to be seen
                continue
            label = "gradients, activations, temporaries" if kind == "passing" else kind
            axes.barh([name_of(row) for row in rows], sizes, left=left, label=label, color=colour)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        if found["gpu_bytes"]:
            axes.axvline(found["gpu_bytes"] / 2**30, color=GREY, linestyle="--", linewidth=1)
        axes.invert_yaxis()
        axes.set_xlabel(
            f"GiB at the peak of a step, computed: {found['model']}, rank {found['rank']}, {found['dtype']}"
        )
        axes.legend(loc="lower right", fontsize="small")
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
