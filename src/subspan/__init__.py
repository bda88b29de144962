"""Train large language models with the optimizer's state in a small, moving subspace of every weight matrix."""

# Before torch: it minds Ctrl-C while the command starts.
from subspan import starting as _starting  # noqa: F401

# isort: split
from subspan import comm, residuals, rules, selectors
from subspan.adamw import SubspaceAdamW
from subspan.backward import project_backward
from subspan.factory import create
from subspan.groups import param_groups
from subspan.optimizer import SubspaceOptimizer
from subspan.recipes import list_optimizers
from subspan.state import state_bytes
from subspan.subspaces import subspaces

__version__ = "0.1.0"

__all__ = [
    "SubspaceAdamW",
    "SubspaceOptimizer",
    "comm",
    "create",
    "list_optimizers",
    "param_groups",
    "project_backward",
    "residuals",
    "rules",
    "selectors",
    "state_bytes",
    "subspaces",
]
