"""The figures of a report, as SVG that takes its colour and its fonts from the page, be it light or dark."""

import io
import itertools
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure

from subspan.study.report.gather import KINDS, Curve, MemoryPart, RunPart
from subspan.utils.figures import COLOURS, style

_INK = "#010203"  # replaced by the page's own colour
_STYLE = style(_INK) | {  # all colours are used with one line style before the next
    "axes.prop_cycle": cycler(linestyle=["-", "--", ":"]) * cycler(color=COLOURS)
}


def _draw(draw: Callable[[Figure], None], title: str, size: tuple[float, float] = (7.2, 4.0)) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # The page decides the size. Identifiers get a number, since many figures stand on one page.
    svg = re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', rf'<svg role="img" aria-label="{title}" \1', svg, count=1
    )
    svg = re.sub(r'height="[\d.]+pt" (?=version)', "", svg, count=1)
    svg = re.sub(r'width="[\d.]+pt" ', "", svg, count=1)
    number = next(_NUMBER)
    svg = re.sub(r'id="([^"]+)"', rf'id="f{number}-\1"', svg)
    return re.sub(r"(url\(#|xlink:href=\"#)", rf"\g<1>f{number}-", svg)


_NUMBER = itertools.count(1)


def loss_bands(curves: Mapping[str, Sequence[Curve]], title: str) -> str:
    """Draw the validation loss over tokens by row: the mean over seeds, and from the lowest to the highest."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row, seeds in curves.items():
            places = sorted({tokens for curve in seeds for tokens, _ in curve})
            losses = [[loss for curve in seeds for at, loss in curve if at == tokens] for tokens in places]
            (line,) = axes.plot(places, [*map(statistics.fmean, losses)], marker="o", ms=3, label=row)
            axes.fill_between(
                places, [*map(min, losses)], [*map(max, losses)], color=line.get_color(), alpha=0.15, lw=0
            )
        axes.set_xlabel("tokens")
        axes.set_ylabel("validation loss")
        axes.legend(fontsize=8, ncols=2)

    return _draw(draw, title)


def differences(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Draw the mean difference of each row to the one it is paired with, and the 95 % interval."""
    shown = [row for row in rows if row["difference"] is not None]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for place, row in enumerate(shown):
            colour = COLOURS[2] if row["difference"] < 0 else COLOURS[6]
            if row["difference_low"] is not None:
                axes.plot([row["difference_low"], row["difference_high"]], [place, place], color=colour, lw=2)
            axes.plot([row["difference"]], [place], "o", color=colour)
        axes.axvline(0, color=_INK, lw=0.8)
        axes.set_yticks(range(len(shown)), [f"{row['name']} - {row['versus']}" for row in shown], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("difference of the loss over seeds, mean and 95 % interval")

    return _draw(draw, title, (7.2, 0.9 + 0.32 * len(shown)))


def run_losses(runs: Sequence[RunPart], title: str) -> str:
    """Draw the training loss (thin) and the validation loss (dots) of runs."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for run in runs:
            (line,) = axes.plot([step for step, _ in run.loss], [loss for _, loss in run.loss], lw=0.8, alpha=0.7)
            axes.plot([s for s, _ in run.validation], [v for _, v in run.validation], "o-", ms=3, color=line.get_color(),
                      label=f"{run.path}: {run.config.get('optimizer')}")  # fmt: skip
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.legend(fontsize=8)

    return _draw(draw, title)


def overlap_map(layers: Sequence[Mapping[str, Any]], title: str) -> str:
    """Draw the overlap of adjacent bases: a line for each subspace, a column for each refresh."""
    steps = sorted({step for layer in layers for step, _ in layer["overlaps"]})

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        values = [[dict(map(tuple, layer["overlaps"])).get(step, float("nan")) for step in steps] for layer in layers]
        image = axes.imshow(values, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        names = [layer["name"].removeprefix("model.layers.").removesuffix(".weight") for layer in layers]
        axes.set_yticks(range(len(names)), names, fontsize=6)
        shown = range(0, len(steps), max(1, len(steps) // 8))
        axes.set_xticks(shown, [str(steps[i]) for i in shown])
        axes.set_xlabel("step of the refresh")
        figure.colorbar(image, label="overlap with the basis before")

    return _draw(draw, title, (7.2, 1.2 + 0.14 * len(layers)))


def spectra(update: Mapping[str, Any], title: str) -> str:
    """Draw the singular values of the change of each weight, divided by the largest, by module type."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        colours: dict[str, str] = {}
        for layer in update["layers"]:
            label = None if layer["type"] in colours else layer["type"]
            colour = colours.setdefault(layer["type"], COLOURS[len(colours) % len(COLOURS)])
            axes.plot(
                range(1, len(layer["singular_values"]) + 1), layer["singular_values"], color=colour, lw=0.9, label=label
            )
        axes.set_yscale("log")
        axes.set_ylim(1e-4, 1.3)
        axes.set_xlabel("index")
        axes.set_ylabel("singular value / largest")
        axes.legend(fontsize=8, ncols=2)

    return _draw(draw, title)


def memory_bars(part: MemoryPart, title: str) -> str:
    """Draw the memory that a step holds, stacked by kind."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        left = [0.0] * len(part.rows)
        for kind in KINDS:
            width = [row[kind] / 1e6 for row in part.rows]
            label = kind.removesuffix("_bytes").replace("_", " ")
            axes.barh(range(len(part.rows)), width, left=left, label=label)
            left = [a + b for a, b in zip(left, width, strict=True)]
        axes.set_yticks(range(len(part.rows)), [row["name"] for row in part.rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("MB")
        axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))

    return _draw(draw, title, (7.2, 1.6 + 0.4 * len(part.rows)))
