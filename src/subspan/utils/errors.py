"""Errors a user can mend, and what is shown of those that nobody expected."""

import os
import tempfile
import traceback


class UserError(ValueError):
    """An error that the user can mend: it names what is wrong, its value, what is allowed and the next step.

    The command line shows its message without a traceback and exits with 2. Any other error is a fault of the program.
    """


class SettingError(UserError):
    """An argument or a setting that cannot be used, or that does not go with another one."""


class InputError(UserError):
    """A file, a directory, a model or a disk that cannot be used as it is."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def debugging() -> bool:
    """Whether tracebacks are shown: ``--debug``, or SUBSPAN_DEBUG in the environment."""
    return os.environ.get("SUBSPAN_DEBUG", "0") not in ("", "0")


def unexpected(error: BaseException) -> str:
    """One line on an error that is no user's. Its traceback is shown when ``debugging``, else kept in a file that is
    named.
    """
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
