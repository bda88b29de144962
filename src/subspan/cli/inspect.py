"""``subspan inspect``: what the subspaces of a run did."""

import json
from typing import Any

from subspan.cli.parser import Namespace, Parser, path_of


def add_to(commands: Any, name: str, about: str) -> None:
    parser = Parser(
        description="Overlap of the subspaces of a run, what they held of the gradient, and the rank of its updates.",
        examples=["subspan inspect runs/probed", "subspan inspect runs/probed --begin 100 --end 300 --json"],
    )
    parser.add_argument("run", type=str, help="the directory of a run")
    parser.add_argument(
        "--begin", type=int, default=None, help="step of a checkpoint from which the update is taken; the first"
    )
    parser.add_argument("--end", type=int, default=None, help="step of the checkpoint up to which; the last")
    parser.add_argument("--json", action="store_true", help="print JSON")
    commands.add_subcommand(name, parser, help=about)


def run(settings: Namespace) -> int:
    from subspan.study.inspect import as_text, inspect

    found = inspect(path_of("run", settings.run), settings.begin, settings.end)
    print(json.dumps(found) if settings.json else as_text(found))
    return 0
