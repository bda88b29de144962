"""Train large language models with the optimizer's state in a small, moving subspace of every weight matrix."""

# Before torch: it minds Ctrl-C while the command starts.
from subspan import _interrupt  # noqa: F401

# isort: split
from subspan import ddp, residuals, rules, selectors
from subspan.adamw import SubspaceAdamW
from subspan.backward import project_backward
from subspan.factory import create
from subspan.groups import param_groups
from subspan.inspection import subspaces
from subspan.optimizer import SubspaceOptimizer
from subspan.recipes import list_optimizers
from subspan.storage.allocation import state_bytes

__version__ = "0.1.0"

__all__ = [
    "SubspaceAdamW",
    "SubspaceOptimizer",
    "create",
    "ddp",
    "list_optimizers",
    "param_groups",
    "project_backward",
    "residuals",
    "rules",
    "selectors",
    "state_bytes",
    "subspaces",
]
