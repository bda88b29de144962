"""What ``--help`` looks like: what a command does, how it is called, its settings, examples."""

import argparse
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jsonargparse import DefaultHelpFormatter

_ENDS = (
    "`subspan COMMAND --help` says more.",
    "Exit status: 0 done; 1 failed, or the run diverged; 2 a setting is wrong; 130 Ctrl-C and 143 SIGTERM, where "
    "there was a "
    "run with a checkpoint; 141 the reader of the output has gone.",
)


class Formatter(DefaultHelpFormatter):
    """A usage line of what must be given, since a list of sixty flags helps nobody."""

    def _format_usage(self, usage: Any, actions: Iterable[argparse.Action], groups: Any, prefix: str | None) -> str:
        words = [("usage: " if prefix is None else prefix) + plain(self._prog)]
        actions = list(actions)
        flags = [action for action in actions if action.option_strings]
        for action in flags:
            if action.required:
                words.append(f"{action.option_strings[-1]} {self._format_args(action, action.dest.upper())}")
        if len(flags) > 1:  # --help is one
            words.append("[options]")
        for action in actions:
            if not action.option_strings:
                words.append(self._format_args(action, self._get_default_metavar_for_positional(action)))
        return " ".join(words) + "\n\n"

    def _format_action(self, action: argparse.Action) -> str:
        if not isinstance(action, argparse._SubParsersAction):
            return super()._format_action(action)
        return "".join(map(self._format_action, action._get_subactions()))  # without a title of their own


def plain(prog: str) -> str:
    """The words of a command: jsonargparse puts "[options]" between them."""
    return " ".join(prog.replace("[options]", "").split())


def width() -> int:
    """As argparse has it."""
    return shutil.get_terminal_size().columns - 2


def filled(text: str) -> str:
    """``text`` in lines that fit."""
    return textwrap.fill(text, width())


def framed(about: str, body: str, examples: Sequence[str]) -> str:
    """The help of a command: what it does first, examples last."""
    parts = [filled(about), body.strip("\n")]
    if examples:
        parts.append("\n".join([f"example{'s' * (len(examples) > 1)}:", *(f"  {example}" for example in examples)]))
    return "\n\n".join(parts) + "\n"


def overview(
    about: str, commands: Mapping[str, Mapping[str, str]], options: Mapping[str, str], examples: Sequence[str]
) -> str:
    """The help of ``subspan`` itself: ``commands`` are grouped, a line each."""
    names = [name for group in commands.values() for name in group] + list(options)
    column = max(map(len, names)) + 2
    lines = ["usage: subspan COMMAND [options]"]
    for title, rows in {**commands, "options": options}.items():
        lines += ["", f"{title}:", *(f"  {name:{column}s}{what}" for name, what in rows.items())]
    return framed(about, "\n".join([*lines, "", *map(filled, _ENDS)]), examples)
