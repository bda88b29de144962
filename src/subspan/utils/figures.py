"""The look of figures that stand on light pages and on dark ones: they have no background of their own."""

from typing import Any

COLOURS = (
    "#3b82c4",
    "#d9772b",
    "#3f9b5f",
    "#b0508e",
    "#8a7a2f",
    "#6f62c9",
    "#c24b4b",
    "#3a9aa5",
    "#7d7d7d",
    "#a06a3c",
    "#5b8f2a",
)
"""Colours of curves and bars, in the order in which they are used."""

GREY = "#808080"
"""A colour of text and axes that can be read on a light page and on a dark one."""


def style(ink: str) -> dict[Any, Any]:
    """Return settings of matplotlib for an SVG whose words and axes have the colour ``ink``.

    A figure that is drawn again gives the same file.
    """
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "subspan",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "legend.frameon": False,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), ink),
    }
