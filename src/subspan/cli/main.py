"""``subspan COMMAND``: each command is a module of this package."""

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from subspan import __version__
from subspan._interrupt import begun
from subspan.cli.completion import SHELLS, script
from subspan.cli.help_text import overview
from subspan.cli.parser import Command, Parser, fail, say
from subspan.utils.errors import UserError, unexpected


class Entry(NamedTuple):
    """What the list of commands says about a command."""

    group: str
    about: str


COMMANDS = {
    "plan": Entry("before training", "compute whether a model fits in memory"),
    "list": Entry("before training", "list the optimizers or the models"),
    "pretrain": Entry("train", "pretrain a language model"),
    "finetune": Entry("train", "fine-tune a model on a task"),
    "inspect": Entry("look and compare", "look at the subspaces of a run"),
    "study": Entry("look and compare", "run many runs and compare them with paired tests"),
    "report": Entry("look and compare", "write a page of studies, runs and measurements"),
    "bench": Entry("measure and test", "measure memory, time and traffic of training steps"),
    "theory": Entry("measure and test", "put a theoretical claim to the test"),
}
_ABOUT = "Train large language models with the optimizer's state in a small, moving subspace of every weight matrix."
_OPTIONS = {
    "-h, --help": "show this message and exit",
    "--version": "print the version and exit",
    "--debug": "show tracebacks; so does SUBSPAN_DEBUG=1",
    "--print-completion SHELL": "print a script for bash, zsh or tcsh",
}
_EXAMPLES = (
    "subspan pretrain --model llama-nano --optimizer sara_adamw --steps 300 --out runs/first",
    "subspan plan --model llama-7b --rank 1024 --compare",
    'eval "$(subspan --print-completion bash)"',
)


class Top(Parser):
    """The parser of ``subspan`` itself."""

    def format_help(self, formatter: Any = None) -> str:
        groups: dict[str, dict[str, str]] = {}
        for name, entry in COMMANDS.items():
            groups.setdefault(entry.group, {})[name] = entry.about
        return overview(_ABOUT, groups, _OPTIONS, _EXAMPLES)


def command(name: str) -> Command:
    """The module of a command. Some import torch, which takes seconds."""
    return cast(Command, importlib.import_module(f"subspan.cli.{name}"))


def make_parser(only: str | None = None) -> Parser:
    """The parser of every command, or one in which no command but ``only`` knows its settings."""
    parser = Top(prog="subspan", description=_ABOUT, version=__version__, allow_abbrev=False)
    parser.add_argument("--print_completion", choices=SHELLS, help="Print a completion script.")
    parser.add_argument("--debug", action="store_true", help="Show tracebacks.")
    commands = parser.add_subcommands(required=True, dest="command")
    for name, entry in COMMANDS.items():
        if only in (None, name):
            command(name).add_to(commands, name, entry.about)
        else:
            commands.add_subcommand(name, Parser(), help=entry.about)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, or raises ``SystemExit``."""
    return _ended(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(words: list[str]) -> int:
    if "--debug" in words:
        words = [word for word in words if word != "--debug"]
        os.environ["SUBSPAN_DEBUG"] = "1"  # which the processes of a study see too
    if not words:
        fail(f"expected a command: {', '.join(COMMANDS)}; see subspan --help")
    if words[0].partition("=")[0] in ("--print-completion", "--print_completion"):
        shell = (words[0].partition("=")[2] or " ".join(words[1:])).strip()
        if shell not in SHELLS:
            fail(f"print_completion={shell!r}: expected {', '.join(SHELLS)}")
        print(script(make_parser(), shell))
        return 0
    parser = make_parser(words[0])
    try:
        given = parser.parse_args(words)
    except UnicodeDecodeError as error:
        fail(f"a file of settings cannot be read as text: {error}; save it in UTF-8")
    importlib.import_module("torch")  # while Ctrl-C still ends the process, since every command needs it
    begun()
    try:
        return command(given.command).run(given[given.command])
    except UserError as error:  # every other error is a fault of the program
        fail(str(error))


def _ended(run: Callable[[], int]) -> int:
    """The exit status of ``run``, however it ends."""
    try:
        status = run()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output has gone, as ``| head`` does. The status is that of a process that such a pipe ends.
        # Python flushes once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        say("stopped")
        return 128 + signal.SIGINT
    except Exception as error:
        say(f"error: {unexpected(error)}")
        return 1
    return status
