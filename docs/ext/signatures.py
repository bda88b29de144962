"""Signatures on the site show each default as the source has it: ``ALL_HERE``, and not an object at an address.

Sphinx can do so (``autodoc_preserve_defaults``), except where a signature has more keywords than the source of the
function. Those of the constructors do: see ``spelled_out`` in ``subspan/step/settings.py``.
"""

import ast
import inspect
import textwrap
from typing import Any

from sphinx.application import Sphinx


class _Written:
    """A default that is shown as it is written."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __repr__(self) -> str:
        return self.source


def written_defaults(function: Any) -> dict[str, str]:
    """Return the source of each default in the definition of ``function``, by argument."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
        definition = ast.parse(source).body[0]
    except (
        OSError,
        TypeError,
        SyntaxError,
    ):  # no source, such as the __init__ of a dataclass, or only a part of a line
        return {}
    if not isinstance(definition, ast.FunctionDef):
        return {}
    own = definition.args
    positional = [*own.posonlyargs, *own.args]
    given = list(zip(positional[len(positional) - len(own.defaults) :], own.defaults, strict=True))
    given += [(arg, value) for arg, value in zip(own.kwonlyargs, own.kw_defaults, strict=True) if value is not None]
    found = {arg.arg: " ".join((ast.get_source_segment(source, value) or "").split()) for arg, value in given}
    return {
        name: text for name, text in found.items() if not text.startswith("_")
    }  # a private name tells a reader nothing


def _show_written(app: Sphinx, obj: Any, bound: bool) -> None:
    function = getattr(obj, "__func__", obj)
    if not inspect.isfunction(function) or not (written := written_defaults(function)):
        return
    signature = inspect.signature(function)
    shown = [
        p.replace(default=_Written(written[p.name])) if p.name in written else p for p in signature.parameters.values()
    ]
    function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-before-process-signature", _show_written)
    return {"parallel_read_safe": True}
