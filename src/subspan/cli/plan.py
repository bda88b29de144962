"""``subspan plan``: whether a model fits, before anything is trained."""

import json
import logging
from pathlib import Path
from typing import Any

from subspan.cli.parser import Namespace, Parser, fail, require, say
from subspan.planning.setting import PlanSetting


def add_to(commands: Any, name: str, about: str) -> None:
    parser = Parser(
        description="Compute the memory of a training step from the shapes of a model, without its weights and without a GPU.",
        examples=[
            "subspan plan --model llama-7b --optimizer sara_adamw --rank 1024 --backward_side --gpu 24GiB",
            "subspan plan --model llama-7b --rank 1024 --compare",
        ],
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    parser.add_argument("--compare", action="store_true", help="Print a table of all methods, with what papers report.")
    parser.add_argument(
        "--out",
        type=str,
        default=None,
        help="File to draw the memory of each method into, such as memory.svg. It needs --compare.",
    )
    parser.add_class_arguments(PlanSetting)
    commands.add_subcommand(name, parser, help=about)


def run(settings: Namespace) -> int:
    logging.getLogger("subspan").setLevel(logging.WARNING)
    as_json, comparing, out = settings.pop("json"), settings.pop("compare"), settings.pop("out")
    if out is not None:
        _check_picture(out, comparing)
    setting = PlanSetting(**vars(settings))
    if not comparing:
        from subspan.planning import plan, report

        found = plan.plan(setting)
        print(json.dumps(found) if as_json else report.text(found))
        return 0
    from subspan.planning import compare, report

    found = compare.compare(setting)
    if out is not None:
        from subspan.planning import figure

        try:
            figure.draw(found, Path(out))
        except OSError as error:
            if error.errno is None:  # not from the system
                raise
            fail(f"out={out!r}: cannot be written: {error.strerror}; give another --out")
        say(f"wrote {out}")
    print(json.dumps(found) if as_json else report.comparison(found))
    return 0


def _check_picture(out: str, comparing: bool) -> None:
    """End unless the picture ``out`` can be drawn, before anything is computed."""
    if not comparing:
        fail(f"out={out!r}: the picture compares methods; add --compare")
    if not Path(out).absolute().parent.is_dir():
        fail(f"out={out!r}: {Path(out).parent} is no directory; make it, or give another --out")
    require("study", "matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if Path(out).suffix.lstrip(".").lower() not in formats:
        fail(f"out={out!r}: no picture has this ending; expected one of .{', .'.join(sorted(formats))}")
