"""The library's log: what is projected is shown at the start, also where nobody has set up logging."""

import logging


class _Fallback(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to stderr unless the program has handlers of its own, which then decide."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


def show_by_default() -> None:
    """Let ``subspan``'s messages be seen. ``logging.getLogger("subspan").setLevel("WARNING")`` quiets them."""
    logger = logging.getLogger("subspan")
    if not logger.handlers:
        logger.addHandler(_Fallback())
        logger.setLevel(logging.INFO)
