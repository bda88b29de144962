"""``subspan COMMAND``: each command is a module of this package."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import cast

from subspan import __version__
from subspan.cli import bench, finetune, inspect, listing, plan, pretrain, report, study, theory
from subspan.cli.parsing import Command, Parser, fail, spelled

COMMANDS = {
    "plan": plan,
    "pretrain": pretrain,
    "finetune": finetune,
    "study": study,
    "inspect": inspect,
    "report": report,
    "theory": theory,
    "bench": bench,
    "list": listing,
}


def _parser() -> Parser:
    parser = Parser(prog="subspan", description="Train large language models inside moving subspaces.", version=__version__)
    commands = parser.add_subcommands(required=True, dest="command")
    for name, command in COMMANDS.items():
        command.add_to(commands, name)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return _piped(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    try:
        given = _parser().parse_args(spelled(argv))
    except (TypeError, ValueError) as error:  # a config file that is no text
        fail(f"the settings cannot be read: {error}")
    return cast(Command, COMMANDS[given.command]).run(given[given.command])


def _piped(run: Callable[[], int]) -> int:
    """The status of ``run``; where the reader of its output has gone, as ``| head`` does, that of a process it has ended."""
    try:
        status = run()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status
