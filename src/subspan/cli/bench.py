"""``subspan bench``: memory and time of training steps."""

import json
import logging
from typing import Any

from subspan.bench.setting import Setting
from subspan.cli.parsing import Namespace, Parser, fail

_WHAT = {"memory": "bytes of a step, by kind, beside closed forms", "train": "time of a step over fused AdamW's"}


def add_to(commands: Any, name: str) -> None:
    bench = Parser(description="Measure memory and time of training steps.")
    commands.add_subcommand(name, bench, help="measure memory and time of training steps")
    benches = bench.add_subcommands(required=True, dest="what")
    for what, about in _WHAT.items():
        measured = Parser(description=f"Measure {about}.")
        measured.add_argument("--json", action="store_true", help="print JSON")
        measured.add_class_arguments(Setting)
        if what == "train":
            measured.add_argument("--pairs", type=int, default=15, help="pairs of steps")
        benches.add_subcommand(what, measured, help=about)


def run(settings: Namespace) -> int:
    from subspan.bench import memory, report, train

    logging.getLogger("subspan").setLevel(logging.WARNING)
    what = settings.what
    chosen = settings[what]
    as_json, pairs = chosen.pop("json"), chosen.pop("pairs", 0)
    try:
        setting = Setting(**vars(chosen))
        found = memory.measure(setting) if what == "memory" else train.measure(setting, pairs)
    except ValueError as error:
        fail(str(error))
    print(json.dumps(found) if as_json else report.text(found))
    return 0
