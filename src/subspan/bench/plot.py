"""The growth of costs drawn as an SVG, whose greys can be read on a light page and on a dark one."""

import io
from collections.abc import Mapping
from typing import Any

from subspan.bench.grow import share_name
from subspan.utils.errors import SettingError
from subspan.utils.figures import COLOURS, GREY, style

_STYLE = style(GREY) | {"grid.color": GREY}


def check() -> None:
    """Make sure that matplotlib is there, before anything is measured.

    Raises:
        SettingError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401  # only to see whether it can be imported
    except ImportError as error:
        raise SettingError(
            f"plot: {error}; matplotlib comes with an extra: pip install 'subspan[study]', or leave out --plot"
        ) from error


def growth(found: Mapping[str, Any]) -> str:
    """Draw what ``grow.measure`` found: times over the width, a line for each share of the rank, floors dashed."""
    import matplotlib
    from matplotlib.figure import Figure

    shares = sorted({row["share"] for row in found["rows"]})
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 3.8), layout="constrained")
        for place, kind in enumerate(("step", "refresh")):
            axes = figure.add_subplot(1, 2, place + 1)
            for number, share in enumerate(shares):
                rows = [row for row in found["rows"] if row["share"] == share]
                widths, colour = [row["width"] for row in rows], COLOURS[number % len(COLOURS)]
                axes.plot(widths, [1e3 * row[f"{kind}_seconds"] for row in rows], "o-", ms=4, color=colour,
                          label=f"r/d = {share_name(share)}")  # fmt: skip
                axes.plot(widths, [1e3 * row[f"{kind}_floor_seconds"] for row in rows], "--", lw=1, color=colour)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", nonpositive="mask")
            axes.set_xticks(widths, [str(width) for width in widths])
            axes.set_title({"step": "ordinary step", "refresh": "choosing a basis"}[kind], fontsize=10)
            axes.set_xlabel("width d")
            axes.set_ylabel("milliseconds (dashed: floor)")
            axes.legend(fontsize=8)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
