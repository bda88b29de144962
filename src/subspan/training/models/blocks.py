"""The transformer blocks of a model."""

from collections.abc import Sequence

from torch import nn


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks of ``model``.

    They are the modules that a transformers model says must not be split, or else its longest list of modules.
    """
    names = getattr(model, "_no_split_modules", None) or ()
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    lists: Sequence[nn.ModuleList] = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return blocks or list(max(lists, key=len, default=[]))
