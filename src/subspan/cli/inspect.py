"""``subspan inspect``: what the subspaces of a run did during training."""

import json
from typing import Any

from subspan.cli.parser import Namespace, Parser, path_of


def add_to(commands: Any, name: str, about: str) -> None:
    parser = Parser(
        description="Show how the subspaces of a run moved, how much of the gradient they held, and the rank of its updates.",
        examples=["subspan inspect runs/probed", "subspan inspect runs/probed --begin 100 --end 300 --json"],
    )
    parser.add_argument("run", type=str, help="Directory of a run.")
    parser.add_argument(
        "--begin",
        type=int,
        default=None,
        help="Step of the checkpoint where the update begins. The default is the first.",
    )
    parser.add_argument(
        "--end", type=int, default=None, help="Step of the checkpoint where it ends. The default is the last."
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    commands.add_subcommand(name, parser, help=about)


def run(settings: Namespace) -> int:
    from subspan.study.inspect import as_text, inspect

    found = inspect(path_of("run", settings.run), settings.begin, settings.end)
    print(json.dumps(found) if settings.json else as_text(found))
    return 0
