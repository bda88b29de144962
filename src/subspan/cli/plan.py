"""``subspan plan``: whether a model fits, before anything is trained."""

import json
import logging
from pathlib import Path
from typing import Any

from subspan.cli.parser import Namespace, Parser, fail, say
from subspan.planning.setting import PlanSetting


def add_to(commands: Any, name: str, about: str) -> None:
    parser = Parser(
        description="The memory of a training step, computed on shapes alone: no weights, no device.",
        examples=[
            "subspan plan --model llama-7b --optimizer sara_adamw --rank 1024 --backward_side --gpu 24GiB",
            "subspan plan --model llama-7b --rank 1024 --compare",
        ],
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--compare", action="store_true", help="a table over methods, beside what papers report")
    parser.add_argument(
        "--out", type=str, default=None, help="with --compare: draw the bars into this file, such as memory.svg"
    )
    parser.add_class_arguments(PlanSetting)
    commands.add_subcommand(name, parser, help=about)


def run(settings: Namespace) -> int:
    logging.getLogger("subspan").setLevel(logging.WARNING)
    as_json, comparing, out = settings.pop("json"), settings.pop("compare"), settings.pop("out")
    if out is not None and not comparing:
        fail(f"out={out!r}: the bars are those of a comparison; add --compare")
    if out is not None and not Path(out).absolute().parent.is_dir():
        fail(f"out={out!r}: {Path(out).parent} is no directory; make it, or give another --out")
    try:
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

            figure.draw(found, Path(out))
            say(f"wrote {out}")
    except ImportError as error:
        fail(f"{error}; the picture comes with an extra: pip install 'subspan[study]'")
    except ValueError as error:
        fail(str(error))
    print(json.dumps(found) if as_json else report.comparison(found))
    return 0
