"""Parsers of the command line: every flag in either spelling, every boolean setting a switch, errors in one line."""

import difflib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol, get_args, get_origin

try:
    import jsonargparse
    import yaml
    from jsonargparse import ArgumentParser
    from jsonargparse import Namespace as Namespace
except ImportError as error:  # the library was installed without the harness
    raise SystemExit(
        f"subspan: error: {error}; the command line comes with an extra: pip install 'subspan[train]'"
    ) from error

from subspan.cli.help_text import Formatter, framed, plain
from subspan.training.config.parsing import plain_refusal
from subspan.utils.errors import debugging, user_error

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
_read_yaml = jsonargparse.get_loader("yaml")


def _load_yaml(text: str) -> Any:
    """Read YAML. What its tags announce, PyYAML converts without a check, and a failure has a class of its own.

    Settings that hold themselves, through an anchor (``&``) and an alias (``*``) within it, are refused.
    """
    try:
        found = _read_yaml(text)
    except (ValueError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error
    if _holds_itself(found):
        raise yaml.YAMLError("settings hold themselves, by an alias (*) within its own anchor (&)")
    return found


def _holds_itself(value: Any, around: tuple[int, ...] = ()) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return id(value) in around or any(_holds_itself(item, (*around, id(value))) for item in inner)


jsonargparse.set_loader("yaml", _load_yaml, exceptions=(yaml.YAMLError,))


class Command(Protocol):
    """A module of this package that is a command. Importing one is cheap; what takes seconds is imported in ``run``."""

    def add_to(self, commands: Any, name: str, about: str) -> None:
        """Add a parser of its arguments to ``commands``. Parsers below it are added after it, as jsonargparse needs."""

    def run(self, settings: Namespace) -> int:
        """Carry out the command; returns the exit status."""


class Parser(ArgumentParser):
    """A parser that exits with 2 after one line, which names known names near a mistyped one.

    A flag may have hyphens or underscores. A boolean setting may stand without a value, which is then true.

    Args:
        description: what the command does; the help begins with it.
        examples: commands; the help ends with them.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*args, **{"formatter_class": Formatter, "allow_abbrev": False, **settings})
        self.examples = examples

    def add_class_arguments(self, *args: Any, **settings: Any) -> list[str]:
        added: list[str] = super().add_class_arguments(*args, **settings)
        for action in self._actions:
            kind = getattr(action, "_typehint", None)
            if kind is bool or bool in get_args(kind):
                action.nargs, action.const = "?", "true"
            elif any(get_origin(option) is Literal for option in get_args(kind)):  # shown as if it could not be null
                action.metavar = "{" + ",".join([*_choices(kind), "null"]) + "}"
            elif action.help == "Path to a configuration file.":
                action.help = "A YAML file with the settings of this group."
        return added

    def instantiate(self, *args: Any, **settings: Any) -> Any:
        try:
            return super().instantiate(*args, **settings)
        except (TypeError, ValueError) as error:  # jsonargparse wraps what a class of settings raises
            cause = user_error(error)
            if cause is None:
                raise
            raise cause from error

    def format_help(self, formatter: Any = None) -> str:
        about, self.description = self.description or "", None
        for group in self._action_groups:
            title = " ".join((group.title or "").split())
            if title and about.startswith(title.rstrip(".")):  # jsonargparse takes the docstring of the class for it
                group.title = "settings"
        try:
            body = super().format_help()
        finally:
            self.description = about
        return framed(about, body, self.examples)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        cause = user_error(ex) if ex else None
        if cause:
            fail(str(cause))
        command = plain(self.prog)
        if refusal := plain_refusal(message, self._actions):
            fail(f"{refusal}; see {command} --help")
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

    def _parse_optional(self, arg_string: str) -> Any:
        # Only what argparse takes for a flag comes out of here changed: values and positional arguments do not.
        name, equals, value = arg_string.partition("=")
        if name.startswith("--"):
            arg_string = "--" + name[2:].replace("-", "_") + equals + value
        return super()._parse_optional(arg_string)

    def _names(self) -> list[str]:
        """The flags, and the words that choose a command or a thing, of this parser and of those below it."""
        found = []
        for action in self._actions:
            choices = list(action.choices or ())
            found += [action.dest, *(choice for choice in choices if isinstance(choice, str))]
            below = action.choices.values() if isinstance(action.choices, dict) else ()
            found += [name for parser in below if isinstance(parser, Parser) for name in parser._names()]
        return found


def _choices(kind: Any) -> list[str]:
    """The values of the literals in a union."""
    return [str(value) for option in get_args(kind) if get_origin(option) is Literal for value in get_args(option)]


def fail(message: str) -> NoReturn:
    """Write one line to stderr, and exit with status 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of many processes with the same settings, one says what is wrong
        trace()
        say(f"error: {' '.join(message.split())}")
    raise SystemExit(2)


def require(extra: str, *packages: str) -> None:
    """End unless ``packages`` are installed, which come with the ``extra`` of this package."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        fail(f"{' and '.join(missing)} is not installed; it comes with an extra: pip install 'subspan[{extra}]'")


def trace() -> None:
    """Show where an error comes from, if tracebacks are wanted."""
    if debugging():
        print(traceback.format_exc() if sys.exc_info()[0] else "".join(traceback.format_stack()), file=sys.stderr)


def path_of(name: str, given: str) -> Path:
    """The path in the argument ``name``. A blank one is refused, since it would be the working directory."""
    if not given.strip():
        fail(f"{name}={given!r}: is blank; expected a path")
    return Path(given)


def say(message: str) -> None:
    """Write a line to stderr."""
    print(f"subspan: {message}", file=sys.stderr, flush=True)
