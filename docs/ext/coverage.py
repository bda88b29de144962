"""Finds public names that have no docstring. It needs no Sphinx, because tests call it too.

What a module lists in ``__all__`` is public. Where it has no ``__all__``, every name without an underscore that it
defines is public. The methods and properties of a public class count too, those of its bases included as far as these
are ours. A method may inherit the docstring of the protocol or base that it fulfils: one text, one place.
"""

import ast
import importlib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

PACKAGE = "subspan"
PUBLIC = (
    "subspan",
    "subspan.selectors",
    "subspan.selectors.base",
    "subspan.rules",
    "subspan.rules.base",
    "subspan.residuals",
    "subspan.residuals.base",
    "subspan.residuals.draws",
    "subspan.parts",
    "subspan.step.plain",
    "subspan.step.method",
    "subspan.backward",
    "subspan.ddp",
    "subspan.distributed",
    "subspan.linalg",
    "subspan.inspection",
    "subspan.integrations.accelerate",
    "subspan.integrations.lightning",
    "subspan.integrations.transformers",
    "subspan.checkpoints.sharded",
    "subspan.checkpoints.writer",
)


def names_of(module: ModuleType) -> list[str]:
    """Return the public names of ``module``, in order."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
        if value.__module__ == module.__name__
    ]


def missing(modules: Iterable[ModuleType | str] = PUBLIC) -> list[str]:
    """Return the dotted names of all that is public in ``modules`` and has no docstring."""
    found: list[str] = []
    for given in modules:
        module = importlib.import_module(given) if isinstance(given, str) else given
        if not module.__doc__:
            found.append(module.__name__)
        for name in names_of(module):
            found += _missing_of(module, name)
    return list(dict.fromkeys(found))


def _missing_of(module: ModuleType, name: str) -> Iterator[str]:
    value, path = getattr(module, name), f"{module.__name__}.{name}"
    if inspect.ismodule(value):
        if not value.__doc__:
            yield path
    elif inspect.isclass(value):
        if not _has_own_text(value):
            yield path
        yield from (f"{path}.{member}" for member, held in _members(value) if not inspect.getdoc(held(value)))
    elif inspect.isfunction(value):
        if not inspect.getdoc(value):
            yield path
    elif name not in _described(module):  # a table or a constant: its text stands below it
        yield path


def _has_own_text(kind: type) -> bool:
    """Tell whether a class has a docstring of its own. A dataclass without one is given its signature."""
    text = kind.__doc__ or ""
    return bool(text.strip()) and not (is_dataclass(kind) and text.startswith(f"{kind.__name__}("))


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield methods and properties by name, each with a way to take it from the class.

    Taken from the class, ``getdoc`` also finds a docstring that is inherited.
    """
    seen: set[str] = set()
    for base in kind.__mro__:
        if not base.__module__.startswith(PACKAGE) and base is not kind:
            continue
        for name, held in vars(base).items():
            callable_ = inspect.isfunction(held) or isinstance(held, (property, classmethod, staticmethod))
            if name.startswith("_") or name in seen or not callable_:
                continue
            seen.add(name)
            yield name, (lambda owner, name=name: getattr(owner, name))


def _described(module: ModuleType) -> set[str]:
    """Return the names that are followed by a string where they are set."""
    body = ast.parse(inspect.getsource(module)).body
    described: set[str] = set()
    for statement, following in pairwise(body):
        text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if text and isinstance(following.value.value, str):  # type: ignore[attr-defined]
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            described |= {target.id for target in targets if isinstance(target, ast.Name)}
    return described
