"""When a new basis is chosen, decided on integers of the host, so that no device is waited for."""

_GOLDEN = 0.6180339887498949  # multiples of it, modulo one, fill the unit interval evenly however many there are


def refresh_due(last: int, clock: int, period: int | None, offset: int = 0) -> bool:
    """Whether the last refresh lies before the latest step of the schedule; a skipped one stays due until it succeeds.

    Args:
        last: the clock at the last refresh; -1 before the first, which is always due.
        period: ``None`` for no other refresh after the first.
        offset: of the schedule against the clock.
    """
    if last < 0 or period is None:
        return last < 0
    return last < clock - (clock - offset) % period


def offset_of(order: int, period: int) -> int:
    """The offset of the matrix of this number among all, so that a period's refreshes are spread evenly."""
    return int(order * _GOLDEN % 1 * period)
