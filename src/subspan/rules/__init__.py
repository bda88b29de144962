"""Rules answer the question "which step inside the subspace?". A new one is one file here and one line in ``RULES``."""

from collections.abc import Callable

from subspan.parts import Rule
from subspan.rules.adafactor import Adafactor
from subspan.rules.adam_mini import AdamMini
from subspan.rules.adamw import AdamW
from subspan.rules.lion import Lion
from subspan.rules.sgd import MSGD, SGD

RULES: dict[str, Callable[[], Rule]] = {
    "adamw": AdamW,
    "adafactor": Adafactor,
    "adam_mini": AdamMini,
    "sgd": SGD,
    "msgd": MSGD,
    "lion": Lion,
}
"""Rules by name, with the settings of their papers."""

__all__ = ["MSGD", "RULES", "SGD", "Adafactor", "AdamMini", "AdamW", "Lion"]
