"""Tables for a terminal."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """Align rows of equal length in columns, the first one to the left.

    Args:
        numbers: align the other columns to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if numbers:
        lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    else:
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)
