"""Names of parameters that do not depend on what wraps the model."""

import functools
from collections import Counter
from collections.abc import Iterable

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What wrappers put into a name: data parallelism, ``torch.compile``, FSDP1 and activation checkpointing."""


@functools.cache
def canonical_name(name: str) -> str:
    """Return ``name`` without the components that a wrapper adds, at any depth.

    A name that has no other component is returned as it is.

    >>> canonical_name("module.layers.0._checkpoint_wrapped_module.weight")
    'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS) or name


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Return the canonical name of each of ``names``. Those that would share one keep their own.

    >>> canonical_names(["module.up.weight", "module.weight", "weight"])
    {'module.up.weight': 'up.weight', 'module.weight': 'module.weight', 'weight': 'weight'}
    """
    canonical = {name: canonical_name(name) for name in names}
    count = Counter(canonical.values())
    return {name: short if count[short] == 1 else name for name, short in canonical.items()}
