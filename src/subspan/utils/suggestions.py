"""Suggestions for a name that is not known, and tables that are looked up by name."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from subspan.utils.errors import SettingError

Thing = TypeVar("Thing")


def near_names(name: str, known: Iterable[str]) -> str:
    """``did you mean ...?`` with the known names near ``name``, or all that are known."""
    known, name = list(known), name.casefold()
    near = [candidate for candidate in known if len(name) > 2 and name in candidate][:3]
    near = near or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"


def look_up(given: Thing | str, table: Mapping[str, Callable[[], Thing]], what: str) -> Thing:
    """Return ``given`` itself, or what ``table`` makes if it is a name."""
    if not isinstance(given, str):
        return given
    if given not in table:
        raise SettingError(
            f"{what}={given!r}: {near_names(given, table)} (or give a {what} object with settings of its own)"
        )
    return table[given]()
