"""Ctrl-C while the command starts: importing torch takes seconds, and an exception in the middle would be a riddle.

This module is imported before torch, and acts at once. In a program that uses the library it does nothing.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import PurePath
from types import FrameType


def stop(signum: int, frame: FrameType | None) -> None:
    """Handle SIGINT by ending the process at once, with one line and status 130, while no work is under way."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, b"subspan: stopped before anything was done\n")
    os._exit(128 + signum)


def is_program(words: Sequence[str] | None = None) -> bool:
    """Whether the words that started Python are those of the command ``subspan``, as a script or by ``-m``."""
    words = (sys.orig_argv if words is None else words)[1:]
    if "-m" in words:
        return words[words.index("-m") + 1 :][:1] in (["subspan"], ["subspan.cli"])
    script = next((word for word in words if not word.startswith("-")), "")
    return PurePath(script).stem == "subspan"


def watch() -> None:
    """Let Ctrl-C ``stop`` the command until it begins its work."""
    if is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)


def begun() -> None:
    """Let Ctrl-C be a ``KeyboardInterrupt`` again, since the work begins."""
    if signal.getsignal(signal.SIGINT) is stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


watch()
