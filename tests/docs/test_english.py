"""Docstrings open with a sentence that stands alone."""

import ast
import re
from collections.abc import Iterator
from itertools import pairwise

import pytest
from support.pages import ROOT

FOLDERS = ("src", "tests", "docs/ext", "tools", "examples")
OPENERS = re.compile(r"(Of|Likewise|The same)\b")
CAPITAL = re.compile(r"[^\W\d_a-zß-öø-ÿα-ω]|`")  # a letter that is not small, or a code literal
ENDS = re.compile(r"[.?:][\"')\]`*_]*$")


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """The line and the text of each docstring, those that stand below a field or a constant included."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        described = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        found = body[:1] if described else []
        found += [after for before, after in pairwise(body) if isinstance(before, ast.Assign | ast.AnnAssign)]
        for statement in found:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value


def fault(text: str) -> str | None:
    """What is wrong with the opening of a docstring."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    if OPENERS.match(paragraph):
        return "opens with what needs a sentence before it"
    if not CAPITAL.match(paragraph):
        return "opens with no capital and no code literal"
    if not ENDS.search(paragraph):
        return "ends its first paragraph with no period, question mark or colon"
    return None


def offenders(folder: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {wrong}: {text.strip().splitlines()[0][:80] if text.strip() else ''}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in docstrings(path.read_text())
        if (wrong := fault(text))
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_openings(folder: str) -> None:
    found = offenders(folder)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("Returns a number.", True),
        ("``rank`` is a number:\n\n    1", True),
        ("Is it due?", True),
        ("Often so.\n\nand more", True),
        ("The sameness of two.", True),
        ("Of the weights.", False),
        ("Likewise for two.", False),
        ("The same for two.", False),
        ("returns a number.", False),
        ("", False),
        ("A number", False),
    ],
)
def test_what_is_wrong_is_seen(text: str, is_right: bool) -> None:
    assert (fault(text) is None) is is_right
