"""The error a user can mend: it names the argument, its value, what is allowed and the next step."""


class InputError(ValueError):
    """Shown without a traceback; the command exits with 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
