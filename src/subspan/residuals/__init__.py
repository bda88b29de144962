"""Residuals answer the question "what becomes of the gradient outside the subspace?".

A new one is one file here and one line in ``RESIDUALS``.
"""

from collections.abc import Callable

from subspan.parts import Residual
from subspan.residuals.discard import Discard
from subspan.residuals.error_feedback import ErrorFeedback
from subspan.residuals.fira import Fira
from subspan.residuals.sketch import Sketch

RESIDUALS: dict[str, Callable[[], Residual]] = {
    "discard": Discard,
    "fira": Fira,
    "sketch": Sketch,
    "error_feedback": ErrorFeedback,
}
"""Residuals by name, with the settings of their papers."""

__all__ = ["RESIDUALS", "Discard", "ErrorFeedback", "Fira", "Sketch"]
