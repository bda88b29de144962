"""Train large language models with the optimizer's state in a small, moving subspace of every weight matrix."""

from subspan import residuals, rules, selectors
from subspan.adamw import SubspaceAdamW
from subspan.optimizer import SubspaceOptimizer
from subspan.param_groups import split_parameters
from subspan.recipes import create, list_optimizers
from subspan.state import state_bytes

__version__ = "0.1.0"

__all__ = [
    "SubspaceAdamW",
    "SubspaceOptimizer",
    "create",
    "list_optimizers",
    "residuals",
    "rules",
    "selectors",
    "split_parameters",
    "state_bytes",
]
