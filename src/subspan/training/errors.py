"""Errors a user can mend, and what is shown of those that nobody expected."""

import os
import tempfile
import traceback


class InputError(ValueError):
    """Names the argument, its value, what is allowed and the next step. Shown without a traceback; the command exits with 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def debugging() -> bool:
    """Whether tracebacks are shown: ``--debug``, or SUBSPAN_DEBUG in the environment."""
    return os.environ.get("SUBSPAN_DEBUG", "0") not in ("", "0")


def unexpected(error: BaseException) -> str:
    """One line on an error that is no user's. Its traceback is shown when ``debugging``, else kept in a file that is named."""
    kind, words = type(error).__name__, first_line(error)
    line = kind if words == kind else f"{kind}: {words}"
    if not debugging():
        try:
            with tempfile.NamedTemporaryFile("w", prefix="subspan-error-", suffix=".txt", delete=False) as file:
                traceback.print_exception(error, file=file)
            return f"{line}; the traceback is in {file.name}, and --debug shows it"
        except OSError:  # no place to keep it: it must not be lost
            pass
    traceback.print_exception(error)
    return line
