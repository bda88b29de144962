"""Every dotted name of ours that pages and docstrings mention can be reached as a reader would type it."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from support.pages import ROOT

NAME = re.compile(r"(?<![\w./~-])subspan(?!\.md\b)(?:\.[A-Za-z_]\w*)+(?![\w/-])")
"""A name with its dots. A path such as ``runs/subspan.yaml`` is none, and neither is the page ``subspan.md``."""

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
PAGES += [path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.parts]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def resolve(name: str) -> object:
    """Return what ``name`` is. A function hides a module of its name, as it does for a reader."""
    first, *parts = name.split(".")
    found: object = importlib.import_module(first)
    for depth, part in enumerate(parts, 1):
        if not hasattr(found, part) and isinstance(found, ModuleType):
            found = importlib.import_module(".".join([first, *parts[:depth]]))
        else:
            found = getattr(found, part)
    return found


def lost(text: str) -> Iterator[str]:
    """Yield the names in ``text`` that are nothing."""
    for name in sorted(set(NAME.findall(text))):
        try:
            resolve(name)
        except (ImportError, AttributeError):
            yield name


def docstrings(source: str) -> str:
    """Return all docstrings of a module, those below a field or a constant too."""
    found = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr)]
    return "\n".join(node.value for node in found if isinstance(node, ast.Constant) and isinstance(node.value, str))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_on_pages(page: Path) -> None:
    assert list(lost(page.read_text())) == []


def test_names_in_docstrings() -> None:
    found = {str(path.relative_to(ROOT)): list(lost(docstrings(path.read_text()))) for path in SOURCES}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("`subspan.subspaces.overlap`", ["subspan.subspaces.overlap"]),  # the function of this name is no module
        ("`subspan.inspection.overlap`, subspan.SubspaceAdamW.step.", []),
        ("see src/subspan/nowhere.py, runs/subspan.nowhere, [page](subspan.md) and `subspan pretrain`", []),
        (":func:`subspan.no_such_thing`", ["subspan.no_such_thing"]),
        ("from subspan.nowhere import thing", ["subspan.nowhere"]),
    ],
)
def test_what_counts_as_a_name(text: str, names: list[str]) -> None:
    assert list(lost(text)) == names


def test_there_are_names() -> None:
    assert sum(len(NAME.findall(page.read_text())) for page in PAGES) > 50
    assert sum(len(NAME.findall(docstrings(path.read_text()))) for path in SOURCES) > 0
