"""Parsers that say which names are near an unknown one, in one line, and exit with 2."""

import difflib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

try:
    import jsonargparse
    from jsonargparse import ArgumentParser
    from jsonargparse import Namespace as Namespace
except ImportError as error:  # the library was installed without the harness
    raise SystemExit(
        f"subspan: error: {error}; the command line comes with an extra: pip install 'subspan[train]'"
    ) from error

from subspan.cli.help_text import Formatter, framed, plain
from subspan.utils.errors import debugging

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


class Command(Protocol):
    """A module of this package that is a command. Importing one is cheap; what takes seconds is imported in ``run``."""

    def add_to(self, commands: Any, name: str, about: str) -> None:
        """Add a parser of its arguments, known as ``about``; nested ones after it, as jsonargparse wants."""

    def run(self, settings: Namespace) -> int:
        """Do it; returns the exit status."""


class Parser(ArgumentParser):
    """Exits with 2 after one line; where a name is unknown the line holds those near it.

    Args:
        description: what the command does, with which its help begins.
        examples: commands, with which it ends.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*args, **{"formatter_class": Formatter, **settings})
        self.examples = examples

    def format_help(self, formatter: Any = None) -> str:
        about, self.description = self.description or "", None
        for group in self._action_groups:
            if group.title and about.rstrip(".") == group.title.rstrip("."):  # jsonargparse names it after the class
                group.title = "settings"
        try:
            body = super().format_help()
        finally:
            self.description = about
        return framed(about, body, self.examples)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        command = plain(self.prog)
        wrong = re.search(
            r'Parser key "([^"]+)":(.*?)(?:Given value type: \S+ \S+ )?(?:Given|Got) value: (.*)',
            " ".join(message.split()),
        )
        if wrong:
            kinds = re.findall(r"<class '(\w+)'>|Literal\[(.*?)\]", wrong[2])
            allowed = dict.fromkeys("null" if kind == "NoneType" else kind or choices for kind, choices in kinds)
            fail(f"{wrong[1]}={wrong[3]}: expected {' or '.join(allowed)}; see {command} --help")
        names = self._names()
        # The last part of a name counts too: --warmup_steps for --schedule.warmup_steps.
        known = {name: name for name in names} | {name.rpartition(".")[2]: name for name in names}
        words = re.findall(r"--([\w.-]+)", message) or re.findall(r"'([\w.-]+)'", message)
        near = {
            known[hit]
            for word in (word.replace("-", "_") for word in words)
            if word not in names or "unrecognized" in message
            for hit in difflib.get_close_matches(word, known, n=2, cutoff=0.75)
        }
        hint = f" (did you mean {' or '.join(sorted(near))}?)" if near else ""
        fail(message + hint)

    def _names(self) -> list[str]:
        """Flags, and the words that choose a command or a thing, of this parser and those below it."""
        found = []
        for action in self._actions:
            choices = list(action.choices or ())
            found += [action.dest, *(choice for choice in choices if isinstance(choice, str))]
            below = action.choices.values() if isinstance(action.choices, dict) else ()
            found += [name for parser in below if isinstance(parser, Parser) for name in parser._names()]
        return found


def fail(message: str) -> NoReturn:
    """End with status 2 and one line on stderr."""
    if (
        os.environ.get("LOCAL_RANK", "0") == "0"
    ):  # of many processes that read the same settings, one says what is wrong
        trace()
        say(f"error: {' '.join(message.split())}")
    raise SystemExit(2)


def trace() -> None:
    """When debugging, show where an error comes from."""
    if debugging():
        print(traceback.format_exc() if sys.exc_info()[0] else "".join(traceback.format_stack()), file=sys.stderr)


def path_of(name: str, given: str) -> Path:
    """The path in the argument ``name``. A blank one is refused: it would be the working directory."""
    if not given.strip():
        fail(f"{name}={given!r}: is blank; expected a path")
    return Path(given)


def say(message: str) -> None:
    """A line on stderr."""
    print(f"subspan: {message}", file=sys.stderr, flush=True)


_SWITCHES = ("--backward_side", "--checkpointing", "--step_in_backward")


def spelled(argv: Sequence[str]) -> list[str]:
    """Flags as jsonargparse has them: with underscores, and a switch such as ``--backward_side`` without a value is
    true.
    """
    words = []
    for position, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            word = name.replace("-", "_").replace("_", "-", 2) + equals + value
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        words.append(f"{word}=true" if word in _SWITCHES and following.startswith("--") else word)
    return words
