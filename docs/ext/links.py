"""Checks that every relative link of every Markdown file of the repository leads to a file, and to a heading of it.

Sphinx sees only the pages of the site, and does not see where these lead outside of it. Nothing is fetched: a link with
a scheme is not checked.
"""

import os
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token
from myst_parser.mdit_to_docutils.base import default_slugify
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

SKIPPED = {"_build", "data", "dist", "node_modules", "runs"}
"""Folders whose files are made by a program and not written. Folders whose name begins with a dot are skipped too."""


def broken(root: Path) -> list[str]:
    """Return ``FILE: LINK: why`` for each link under ``root`` that leads nowhere."""
    return [f"{page.relative_to(root)}: {link}: {why}" for page in pages(root) for link, why in _broken_of(page, root)]


def pages(root: Path) -> list[Path]:
    """Return the Markdown files under ``root``."""
    found: list[Path] = []
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if name not in SKIPPED and not name.startswith("."))
        found += [Path(folder, name) for name in sorted(files) if name.endswith(".md")]
    return found


def _broken_of(page: Path, root: Path) -> Iterator[tuple[str, str]]:
    for link in _links(page):
        path, _, anchor = unquote(link).partition("#")
        if ":" in path.split("/")[0]:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(root.resolve()):
            yield link, "outside of the repository"
        elif not target.exists():
            yield link, "no such file"
        elif anchor and target.suffix == ".md" and anchor not in _anchors(target):
            yield link, f"no such heading; there are {', '.join(sorted(_anchors(target))) or 'none'}"


@cache
def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def _links(page: Path) -> Iterator[str]:
    for token in _tokens(page):
        for child in token.children or ():
            link = child.attrGet("href") if child.type == "link_open" else child.attrGet("src")
            if link:
                yield str(link)


@cache
def _anchors(page: Path) -> set[str]:
    """Return the headings of a page as links name them. The second of a name ends with ``-1``."""
    tokens, found = _tokens(page), set[str]()
    for token, inline in pairwise(tokens):
        if token.type == "heading_open":
            text = "".join(child.content for child in inline.children or () if child.type in ("text", "code_inline"))
            slug, number = default_slugify(text), 0
            while (name := f"{slug}-{number}" if number else slug) in found:
                number += 1
            found.add(name)
    return found


def _check(app: Sphinx) -> None:
    if found := broken(Path(app.srcdir).parent):
        raise ExtensionError("links that lead nowhere:\n" + "\n".join(found))


def _outside(app: Sphinx, page: str, source: list[str]) -> None:
    """Let a link to a file outside of the site offer that file. In the repository the same link opens it."""
    here, root = Path(app.env.doc2path(page)).parent, Path(app.srcdir).resolve()

    def offered(match: re.Match[str]) -> str:
        path = match[1].partition("#")[0]
        if ":" in path.split("/")[0] or (here / path).resolve().is_relative_to(root):
            return match[0]
        return f"](path:{path})"

    source[0] = re.sub(r"\]\(([^()\s]+)\)", offered, source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", _check)
    app.connect("source-read", _outside)
    return {"parallel_read_safe": True}
