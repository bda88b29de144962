"""Selectors: which subspace? A new one is one file here and one line in ``SELECTORS``."""

from collections.abc import Callable

from subspan.parts import Selector
from subspan.selectors.dominant import Dominant
from subspan.selectors.importance import Importance
from subspan.selectors.random import Random
from subspan.selectors.switch import Switch

SELECTORS: dict[str, Callable[[], Selector]] = {
    "dominant": Dominant,
    "importance": Importance,
    "random": Random,
}
"""By name, with their papers' settings. ``Switch`` is made of two of them."""

__all__ = ["SELECTORS", "Dominant", "Importance", "Random", "Switch"]
