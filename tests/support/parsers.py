"""The parsers of all commands, made once."""

from collections.abc import Iterator

from subspan.cli.main import make_parser
from subspan.cli.parser import Parser


def parsers(parser: Parser, name: str = "") -> Iterator[tuple[str, Parser]]:
    """Each parser below ``parser``, by the words that choose it."""
    for action in parser._actions:
        for word, below in action.choices.items() if isinstance(action.choices, dict) else ():
            yield f"{name} {word}".strip(), below
            yield from parsers(below, f"{name} {word}".strip())


PARSER = make_parser()
PARSERS = dict(parsers(PARSER))
