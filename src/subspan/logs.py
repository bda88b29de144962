"""The library's log: what is projected is shown at the start, also where nobody has set up logging."""

import logging
import sys


def announce(text: str) -> None:
    """Log ``text``; where no program has set up logging, which would drop it, write it to stderr.

    ``logging.getLogger("subspan").setLevel("WARNING")`` quiets it.
    """
    logger = logging.getLogger("subspan")
    if logging.getLogger().handlers or logger.handlers or logger.level != logging.NOTSET:
        logger.info("%s", text)
    else:
        print(text, file=sys.stderr)
