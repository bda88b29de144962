"""Our docstrings on the site: the build fails where one is missing or on no page, and equations keep their lines.

A docstring sets an equation or a table apart by four more spaces. That is clear to a reader of the source, but
reStructuredText takes it for a quotation. So this extension makes a literal block of it.
"""

import importlib
import re
import sys
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

from ext import coverage


def literal_blocks(lines: list[str]) -> list[str]:
    """Return ``lines`` with ``::`` before each block that a blank line and four more spaces set apart."""
    out: list[str] = []
    block: int | None = None  # the indentation of the one we are in
    before = ""  # the last line that is not blank
    for line in lines:
        if line.strip():
            if block is not None and _indent(line) < block:
                block = None
            apart = bool(out) and not out[-1].strip() and _indent(line) >= _indent(before) + 4
            if block is None and apart and not before.endswith("::") and not re.match(r"\s*(>>>|[-*] )", line):
                out += [" " * _indent(before) + "::", ""]
                block = _indent(line)
            before = line
        out.append(line)
    return out


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _tidy(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = literal_blocks(lines)
    if what in ("attribute", "data", "property"):
        # An empty comment: napoleon takes what stands before a colon in the first line for a type.
        lines[:0] = ["..", ""]


def _check(app: Sphinx) -> None:
    if found := coverage.missing():
        raise ExtensionError("public, and without a docstring: " + ", ".join(found))


def _check_pages(app: Sphinx, env: Any) -> None:
    """Raise unless every public name is on a page, under one of the modules that it can be imported from."""
    shown = env.get_domain("py").objects
    held = {id(_value(name)) for name in shown if name.rpartition(".")[0] in sys.modules}
    public = {
        f"{module}.{name}" for module in coverage.PUBLIC for name in coverage.names_of(importlib.import_module(module))
    }
    lost = [name for name in sorted(public) if name not in shown and id(_value(name)) not in held]
    if lost:
        raise ExtensionError("public, and on no page of docs/api: " + ", ".join(lost))


def _value(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", _check)
    app.connect("autodoc-process-docstring", _tidy, priority=100)  # before napoleon reads the sections
    app.connect("env-updated", _check_pages)
    return {"parallel_read_safe": True}
