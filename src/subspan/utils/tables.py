"""Tables for a terminal."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """Rows of as many cells each, in columns: the first to the left, and the others to the right if they are
    ``numbers``.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if numbers:
        lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    else:
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)
