"""``subspan bench``: memory, time and traffic of training steps."""

import json
import logging
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from subspan.bench.comm import CommSetting
from subspan.bench.grow import GrowSetting
from subspan.bench.refresh import RefreshSetting
from subspan.bench.setting import Setting
from subspan.bench.step import StepSetting
from subspan.bench.together import PAIRS, QUICK, QUICK_PAIRS, AllSetting
from subspan.cli.parser import Namespace, Parser, fail, say
from subspan.planning.many_machines import Machines

_WHAT: dict[str, tuple[type, str]] = {
    "memory": (Setting, "measure the bytes of a training step, by kind, and compare them with closed forms"),
    "train": (Setting, "measure the time of a training step as a multiple of that with fused AdamW"),
    "refresh": (RefreshSetting, "measure the time and the accuracy of choosing a basis, compared with an SVD"),
    "step": (StepSetting, "measure time and memory of an optimizer's step, compared with other packages"),
    "grow": (GrowSetting, "measure how the costs of a step and a refresh grow with width and rank"),
    "all": (AllSetting, "measure train, refresh, step and grow, and show the ratios that matter"),
    "comm": (CommSetting, "count the bytes that a step sends between processes, and compare them with closed forms"),
    "scale": (Machines, "compute memory, traffic and time of a step of 7B and 70B models on many machines"),
}


def add_to(commands: Any, name: str, about: str) -> None:
    bench = Parser(
        description="Measure memory, time and traffic of training steps.",
        examples=["subspan bench memory --model llama-60m --tokens 4096", "subspan bench all --quick"],
    )
    commands.add_subcommand(name, bench, help=about)
    benches = bench.add_subcommands(required=True, dest="what", title="measurements", description=None)
    for what, (setting, measures) in _WHAT.items():
        measured = Parser(
            description=f"{measures[0].upper()}{measures[1:]}.", examples=[f"subspan bench {what} --json"]
        )
        measured.add_argument("--json", action="store_true", help="Print JSON.")
        measured.add_argument("--out", type=str, default=None, help="File to which the JSON is written too.")
        measured.add_class_arguments(setting)
        if setting in QUICK or what == "all":
            measured.add_argument(
                "--quick", action="store_true", help="Do less work. Settings that are given stay as they are."
            )
        if what == "train":
            measured.add_argument("--pairs", type=int, default=PAIRS, help="Number of pairs of steps.")
        if what in ("grow", "all"):
            measured.add_argument(
                "--plot", type=str, default=None, help="File (.svg) to draw the growth of the costs into."
            )
        benches.add_subcommand(what, measured, help=measures)


def run(settings: Namespace) -> int:
    from subspan.bench import comm, grow, memory, plot, refresh, report, speed, step, together, train
    from subspan.planning import many_machines as scale
    from subspan.training.monitor.provenance import stamp
    from subspan.utils.atomic_files import write_text

    logging.getLogger("subspan").setLevel(logging.WARNING)
    what = settings.what
    chosen = settings[what]
    as_json, quick = chosen.pop("json"), chosen.pop("quick", False)
    pairs = chosen.pop("pairs", PAIRS) if what == "train" else 0
    out, drawing = _file("out", chosen.pop("out")), _file("plot", chosen.pop("plot", None))
    if drawing and what == "all" and quick:
        fail(
            "quick=true: measures nothing on growth to plot; leave out --quick or --plot, or use "
            "subspan bench grow --quick"
        )
    measures: dict[str, tuple[Callable[[Any], dict[str, Any]], Callable[[Any], str]]] = {
        "memory": (memory.measure, report.text),
        "train": (
            lambda setting: train.measure(setting, QUICK_PAIRS if quick and pairs == PAIRS else pairs),
            report.text,
        ),
        "refresh": (refresh.measure, speed.refresh),
        "step": (step.measure, speed.step),
        "grow": (grow.measure, speed.grow),
        "all": (lambda setting: together.measure(setting, quick, say), speed.together),
        "comm": (comm.measure, report.text),
        "scale": (scale.compute, scale.tables),
    }
    measure, write = measures[what]
    setting: Any = _WHAT[what][0](**vars(chosen))
    if drawing:
        plot.check()
    made_by = stamp()  # first, since the code may be changed meanwhile
    found = measure(together.quickened(setting) if quick else setting)
    found |= {"command": _command(what, setting, quick, pairs), "made_by": made_by}
    # Printed before any file is written: writing may fail, and to measure again takes minutes.
    print(json.dumps(found) if as_json else write(found))
    if out:
        write_text(out, json.dumps(found, indent=1) + "\n")
    if drawing:
        write_text(drawing, plot.growth(found["grow"] if what == "all" else found))
    return 0


def _command(what: str, setting: Any, quick: bool, pairs: int) -> str:
    """The command that measures the same."""
    changed = {
        field.name: value for field in fields(setting) if (value := getattr(setting, field.name)) != field.default
    }
    words = [f"--{name}={_word(value)}" for name, value in changed.items()]
    words += ["--quick"] * quick + [f"--pairs={pairs}"] * (what == "train" and pairs != PAIRS)
    return shlex.join(["subspan", "bench", what, *words, "--json"])


def _word(value: Any) -> str:
    """A value as a flag takes it."""
    return json.dumps(value) if isinstance(value, dict | tuple) else str(value)


def _file(name: str, value: str | None) -> Path | None:
    """The file to write, checked before minutes are spent on measuring."""
    if value is None:
        return None
    path = Path(value)
    if path.is_dir() or not path.parent.is_dir():
        wrong = f"{path} is a directory" if path.is_dir() else f"{path.parent} is no directory"
        fail(f"{name}={value!r}: {wrong}; give the path of a file in a directory that is there")
    return path
