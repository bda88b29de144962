"""When a new basis is chosen, decided on integers of the host, so that no device is waited for."""

_GOLDEN = 0.6180339887498949  # multiples of it, modulo one, fill the unit interval evenly however many there are


def refresh_due(last: int, clock: int, period: int | None, offset: int = 0) -> bool:
    """Whether the last refresh lies before the latest one of the schedule. A skipped one stays due until it succeeds.

    Args:
        last: the clock at the last refresh; -1 before the first, which is always due.
        clock: the number of steps so far.
        period: the steps between refreshes; ``None`` means that the first is the only one.
        offset: the step of the period at which a refresh falls.
    """
    if last < 0 or period is None:
        return last < 0
    return last < clock - (clock - offset) % period


def offset_of(order: int, period: int) -> int:
    """Return the offset of the matrix with this number, so that the refreshes of a period are spread evenly."""
    return int(order * _GOLDEN % 1 * period)
