"""``subspan bench``: memory, time and traffic of training steps."""

import json
import logging
from typing import Any

from subspan.bench.comm import CommSetting
from subspan.bench.scale import Machines
from subspan.bench.setting import Setting
from subspan.cli.parsing import Namespace, Parser, fail

_WHAT: dict[str, tuple[type, str]] = {
    "memory": (Setting, "bytes of a step, by kind, beside closed forms"),
    "train": (Setting, "time of a step over fused AdamW's"),
    "comm": (CommSetting, "bytes that a step sends between ranks, beside closed forms"),
    "scale": (Machines, "memory, traffic and time of a step of 7B and 70B on many machines, computed from stated rates"),
}


def add_to(commands: Any, name: str) -> None:
    bench = Parser(description="Measure memory, time and traffic of training steps.")
    commands.add_subcommand(name, bench, help="measure memory, time and traffic of training steps")
    benches = bench.add_subcommands(required=True, dest="what")
    for what, (setting, about) in _WHAT.items():
        measured = Parser(description=f"{about[0].upper()}{about[1:]}.")
        measured.add_argument("--json", action="store_true", help="print JSON")
        measured.add_class_arguments(setting)
        if what == "train":
            measured.add_argument("--pairs", type=int, default=15, help="pairs of steps")
        benches.add_subcommand(what, measured, help=about)


def run(settings: Namespace) -> int:
    from subspan.bench import comm, memory, report, scale, train

    logging.getLogger("subspan").setLevel(logging.WARNING)
    what = settings.what
    chosen = settings[what]
    as_json, pairs = chosen.pop("json"), chosen.pop("pairs", 0)
    try:
        setting: Any = _WHAT[what][0](**vars(chosen))
        if what == "memory":
            found = memory.measure(setting)
        elif what == "train":
            found = train.measure(setting, pairs)
        elif what == "comm":
            found = comm.measure(setting)
        else:
            found = scale.compute(setting)
    except ValueError as error:
        fail(str(error))
    print(json.dumps(found) if as_json else scale.tables(found) if what == "scale" else report.text(found))
    return 0
