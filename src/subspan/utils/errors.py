"""Errors that a user can mend, and what is shown of those that nobody expected."""

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


FAULTS = (TypeError, AttributeError, NameError, AssertionError, MemoryError)
"""Errors that no file and no server causes.

They are for calls of a library that raises errors of a dozen kinds for whatever a file or a server may cause.
"""


def user_error(error: BaseException) -> UserError | None:
    """Return ``error`` if it is a ``UserError``, or the one that it was raised from; ``None`` if there is none."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    return cause


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class where it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def named(error: BaseException) -> str:
    """The class of an error and the first line of its message, if it has one: ``KeyError: 'layer'``."""
    kind, words = type(error).__name__, first_line(error)
    return kind if words == kind else f"{kind}: {words}"


def debugging() -> bool:
    """Whether tracebacks are shown, by ``--debug`` or by SUBSPAN_DEBUG in the environment."""
    return os.environ.get("SUBSPAN_DEBUG", "0") not in ("", "0")


def unexpected(error: BaseException) -> str:
    """One line about a fault of the program. Its traceback is shown when ``debugging``, or else kept in a file.

    The line names that file.
    """
    line = named(error)
    if not debugging():
        try:
            with tempfile.NamedTemporaryFile(
                "w", prefix="subspan-error-", suffix=".txt", delete=False, encoding="utf-8"
            ) as file:
                traceback.print_exception(error, file=file)
            return f"{line}; the traceback is in {file.name}, and --debug shows it"
        except OSError:  # there is no place to keep it, and it must not be lost
            pass
    traceback.print_exception(error)
    return line
