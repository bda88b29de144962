"""Theoretical claims of the papers, as experiments that can refute them."""

from subspan.theory.experiment import Experiment
from subspan.theory.momentum import Momentum
from subspan.theory.nonconvergence import Nonconvergence
from subspan.theory.projection_error import ProjectionError
from subspan.theory.rso import RsoUnbiased

EXPERIMENTS: dict[str, type[Experiment]] = {
    "nonconvergence": Nonconvergence,
    "projection-error": ProjectionError,
    "momentum": Momentum,
    "rso-unbiased": RsoUnbiased,
}
"""The experiments by the name of their command."""

__all__ = ["EXPERIMENTS", "Experiment"]
