"""Very long texts in pieces, so that no more than a few megabytes of one are in memory, and where a text is cut."""

import io
import re
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

LONGEST = 2**23
"""Number of characters up to which a text stays whole. A longer one is tokenised in pieces."""
PIECE = 2**20
"""Number of characters of a piece at most."""
_UNITS = {
    "paragraph": (re.compile(r"\n[^\S\n]*\n\s*"), 200),
    "line": (re.compile(r"\n+"), 200),
    "word": (re.compile(r"\s+"), 10_000),
}
"""What a text may be cut between, and the number of characters from which on it is."""
_SHARES = (0.01, 0.2)
"""Share of a text that may stand behind a cut."""


class Cut(NamedTuple):
    """Where a text is cut."""

    place: int
    """Number of characters before it."""
    unit: str
    """What begins there: a paragraph, a line or a word."""


def pieces_of(file: IO[str]) -> Iterator[Iterable[str]]:
    """Yield the text of a file, once, as its pieces, which are read when they are asked for; nothing if it is blank.

    A piece ends with a paragraph if there is one in it, else with a line, else before a space.
    """
    text = file.read(LONGEST + 1)
    if len(text) > LONGEST:
        yield _long(text, file)
    elif text.strip():
        yield [text]


def whole_or_pieces(text: str) -> Iterable[str]:
    """Return the pieces of a text that is there already."""
    return [text] if len(text) <= LONGEST else _long(text, io.StringIO())


def cut_near_end(texts: Iterable[str], length: int, share: float) -> Cut | None:
    """Return the place nearest to the last ``share`` of a text where a paragraph begins.

    Where none begins in the last fifth, it is that of a line, and in a long text then that of a word.

    Args:
        texts: the pieces of the text.
        length: its number of characters.
        share: of the text behind the cut.
    """
    first, last, wanted = length * (1 - _SHARES[1]), length * (1 - _SHARES[0]), length * (1 - share)
    nearest: dict[str, int] = {}
    begin = 0
    for text in texts:
        if begin + len(text) >= first:
            for unit, (pattern, least) in _UNITS.items():
                if length < least:
                    continue
                for match in pattern.finditer(text, max(0, int(first - begin))):
                    place = begin + match.end()
                    if place > last:
                        break
                    if place >= first and abs(place - wanted) < abs(nearest.get(unit, 0) - wanted):
                        nearest[unit] = place
        begin += len(text)
    return next((Cut(nearest[unit], unit) for unit in _UNITS if unit in nearest), None)


def _long(text: str, file: IO[str]) -> Iterator[str]:
    while text:
        if len(text) <= PIECE:
            text += file.read(PIECE)
        if len(text) <= PIECE:
            yield text
            return
        end = _end(text)
        yield text[:end]
        text = text[end:]


def _end(text: str) -> int:
    for mark, behind in (("\n\n", 2), ("\n", 1), (" ", 0)):
        if (place := text.rfind(mark, 1, PIECE)) > 0:
            return place + behind
    return PIECE
