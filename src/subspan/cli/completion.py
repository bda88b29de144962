"""Completion scripts for shells, which the package shtab makes from the parser."""

import argparse
from collections.abc import Iterator

from subspan.cli.parser import Parser, require

SHELLS = ("bash", "zsh", "tcsh")
_FILES = {"config", "file", "sources", "data", "validation_data", "test_data", "plot"}
_FOLDERS = {"run", "runs", "resume"}


def script(parser: Parser, shell: str) -> str:
    """The script by which ``shell`` completes commands, flags, names of optimizers and models, and paths.

    It uses ``parser`` up.
    """
    require("train", "shtab")
    import shtab

    from subspan.recipes import list_optimizers
    from subspan.training.models.presets import PRESETS

    for action in _actions(parser):
        if action.dest == "optimizer":
            action.choices = list(list_optimizers())
        elif action.dest == "model":
            action.choices = list(PRESETS)
        elif action.dest in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab looks for this attribute
        elif action.dest in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    made: str = parser.get_completion_script(f"shtab-{shell}")
    return made


def _actions(parser: Parser) -> Iterator[argparse.Action]:
    """The actions of ``parser`` and of every parser below it."""
    for action in parser._actions:
        yield action
        for below in action.choices.values() if isinstance(action.choices, dict) else ():
            yield from _actions(below)
