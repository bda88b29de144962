"""Rules: which step inside the subspace? A new one is one file here and one line in ``RULES``."""

from collections.abc import Callable

from subspan.parts import Rule
from subspan.rules.adamw import AdamW
from subspan.rules.sgd import SGD

RULES: dict[str, Callable[[], Rule]] = {"adamw": AdamW, "sgd": SGD}
"""By name, with their papers' settings."""

__all__ = ["RULES", "SGD", "AdamW"]
