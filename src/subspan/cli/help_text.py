"""The look of ``--help``: what a command does, how it is called, its settings, examples."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jsonargparse import DefaultHelpFormatter

_STATUS = {
    "0": "done",
    "1": "something failed, or the run diverged",
    "2": "a setting or an input is wrong",
    "130, 143": "stopped by Ctrl-C or SIGTERM, after a run was saved",
    "141": "the reader of the output has gone",
}


class Formatter(DefaultHelpFormatter):
    """A usage line that shows only what must be given, and settings with their types and defaults in plain words."""

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

    def _get_help_string(self, action: argparse.Action) -> str:
        # A flag that takes no value is off by default.
        return (
            action.help or ""
            if action.nargs == 0 and not isinstance(action, argparse._HelpAction)
            else super()._get_help_string(action)
        )

    def _get_type_str(self, action: argparse.Action) -> str | None:
        if str(action.metavar).startswith("{"):  # the choices say it
            return None
        kind = super()._get_type_str(action)
        kind = kind and re.sub(r"Annotated\[(.*?), '.*?'\]", r"\1", kind)
        return kind and re.sub(r"^Optional\[(.*)\]$", r"\1 | null", kind)

    def _expand_help(self, action: argparse.Action) -> str:
        shown = super()._expand_help(action)
        return re.sub(r"default: (True|False)\)$", lambda found: found[0].lower(), shown)


def plain(prog: str) -> str:
    """The words of a command, without the "[options]" that jsonargparse puts between them."""
    return " ".join(prog.replace("[options]", "").split())


def width() -> int:
    """The width that argparse uses."""
    return shutil.get_terminal_size().columns - 2


def filled(text: str) -> str:
    """Wrap ``text`` to lines that fit."""
    return textwrap.fill(text, width())


def framed(about: str, body: str, examples: Sequence[str]) -> str:
    """The help of a command, with what it does first and examples last."""
    parts = [filled(about), body.strip("\n")]
    if examples:
        parts.append("\n".join([f"example{'s' * (len(examples) > 1)}:", *(f"  {example}" for example in examples)]))
    return "\n\n".join(parts) + "\n"


def overview(
    about: str, commands: Mapping[str, Mapping[str, str]], options: Mapping[str, str], examples: Sequence[str]
) -> str:
    """The help of ``subspan`` itself: the ``commands`` in groups, the options and what an exit status means."""
    groups = {**commands, "options": options, "exit status": _STATUS}
    column = max(len(name) for rows in groups.values() for name in rows) + 2
    lines = ["usage: subspan COMMAND [options]", "", "`subspan COMMAND --help` shows the settings of a command."]
    for title, rows in groups.items():
        lines += ["", f"{title}:", *(f"  {name:{column}s}{what}" for name, what in rows.items())]
    return framed(about, "\n".join(lines), examples)
