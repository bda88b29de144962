"""Train large language models with the optimizer's state in a small, moving subspace of every weight matrix."""

import importlib
from typing import TYPE_CHECKING

# Before torch: it minds Ctrl-C while the command starts.
from subspan import _interrupt  # noqa: F401

if TYPE_CHECKING:
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

_HOMES = {
    "SubspaceAdamW": "adamw",
    "SubspaceOptimizer": "optimizer",
    "create": "factory",
    "list_optimizers": "recipes",
    "param_groups": "groups",
    "project_backward": "backward",
    "state_bytes": "storage.allocation",
    "subspaces": "inspection",
}


if not TYPE_CHECKING:  # for a type checker, a name that is not above is wrong

    def __getattr__(name: str) -> object:
        """Import what is asked for, so that a command line that needs no torch does not wait for it."""
        if name not in __all__:
            raise AttributeError(f"module 'subspan' has no attribute {name!r}")
        module = importlib.import_module(f"subspan.{_HOMES.get(name, name)}")
        found = globals()[name] = getattr(module, name) if name in _HOMES else module
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
