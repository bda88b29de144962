"""The site builds without a warning. It does not build where a docstring is missing or a link leads nowhere."""

import importlib.util
import io
import re
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.pages import ROOT

sys.path.insert(0, str(ROOT / "docs"))
from ext import coverage, docstrings, links, mathml
from sphinx.cmd.build import build_main
from sphinx.errors import ExtensionError


def build(folder: Path) -> None:
    """Build the pages into ``html``, and run the examples with a report in ``doctest``, in a process of its own.

    autodoc leaves signatures on what it has described, with defaults as they are written. Whoever reads these later in
    the same process, as LightningCLI does, takes them for the real defaults.
    """
    common = ["-q", "-n", "-W", "--keep-going", "-d", str(folder / "trees"), str(ROOT / "docs")]
    builds = [[*common, "-b", builder, str(folder / builder)] for builder in ("html", "doctest")]
    program = f"from sphinx.cmd.build import build_main; exit(any([build_main(words) for words in {builds}]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_builds(tmp_path: Path) -> None:
    """A warning is an error: a name that cannot be found, a page in no table of contents, markup that cannot be read.

    The examples in docstrings are run.
    """
    build(tmp_path)
    method = (tmp_path / "html/methods/selectors.html").read_text()
    assert "<math" in method
    assert not [
        page
        for page in (tmp_path / "html").rglob("*.html")
        if re.search(r'(src|href)="https?://[^"]*\.(js|css)', page.read_text())
    ]
    api = (tmp_path / "html/api/selectors.html").read_text()
    assert 'id="subspan.selectors.importance.Importance"' in api
    assert "the result depends on" in api, "a method without a docstring of its own shows that of its protocol"
    assert "w_i = (1 - floor) * sigma_i^power / sum_j sigma_j^power + floor / k" in api, "an equation keeps its line"
    signatures = re.sub("<[^>]+>", "", (tmp_path / "html/api/subspan.html").read_text())
    assert "exclude: tuple[str, ...] = EXCLUDED, update_proj_gap: int = 200" in signatures, "as written, and as a value"
    ran = (tmp_path / "doctest/output.txt").read_text()
    assert "1 items passed all tests" in ran
    assert "0 failures in tests" in ran


def test_equations() -> None:
    """Aligned lines become the rows of a table. What the converter does not know is refused."""
    two = mathml.mathml(r"\begin{aligned} a &= b \\ c &= d \end{aligned}", "block")
    assert two.count("<mtr>") == 2
    with pytest.raises(ExtensionError, match="unheardof"):
        mathml.mathml(r"\unheardof{a}")


@pytest.mark.parametrize("check", [(coverage, "missing"), (links, "broken")], ids=["docstring", "link"])
def test_it_does_not_build(check: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a check finds something, the build ends with it before a page is read."""
    monkeypatch.setattr(*check, lambda *_: ["subspan.create"])
    errors = io.StringIO()
    with redirect_stderr(errors):
        assert build_main(["-b", "html", "-q", str(ROOT / "docs"), str(tmp_path)]) == 2
    assert "subspan.create" in errors.getvalue()
    assert not (tmp_path / "index.html").exists()


def load(path: Path, source: str) -> ModuleType:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("sample", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["sample"] = module
    spec.loader.exec_module(module)
    return module


SAMPLE = '''
"""A module."""
from dataclasses import dataclass

__all__ = ["Bare", "Good", "Heir", "TABLE", "TOLD", "bare", "good"]
TABLE = {}
TOLD = {}
"""By name."""


def bare(): ...


def good():
    """Good."""


@dataclass
class Bare:
    x: int = 0


class Good:
    """Good."""

    def told(self):
        """Good."""

    def silent(self): ...

    @property
    def quiet(self): ...

    def _private(self): ...


class Heir(Good):
    """Good."""

    def told(self): ...
'''


def test_a_missing_docstring_is_found(tmp_path: Path) -> None:
    """Functions, classes, methods, properties, tables and modules need one; what is inherited or private does not."""
    module = load(tmp_path / "sample.py", SAMPLE)
    bare = {"Bare", "Good.silent", "Good.quiet", "TABLE", "bare"}
    assert set(coverage.missing([module])) == {f"sample.{name}" for name in bare}
    assert coverage.missing([load(tmp_path / "sample.py", "x = 1")]) == ["sample"]


def test_every_public_name_has_one() -> None:
    assert coverage.missing() == []
    parts = {"subspan.selectors", "subspan.rules", "subspan.residuals"}
    assert {"subspan.backward", *parts, *(f"{part}.base" for part in parts)} <= set(coverage.PUBLIC)


def test_every_link_leads_somewhere() -> None:
    """All Markdown files of the repository are checked, the README included."""
    assert links.broken(ROOT) == []
    assert {ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs/tutorial.md"} <= set(links.pages(ROOT))


BAD = ["nowhere.md", "b.md#three", "#four", "../../outside.md", "missing.png"]
FINE = ["b.md", "b.md#one-two", "b.md#one-two-1", "#here", "folder/", "https://example.org/x", "mailto:a@b.c"]


@pytest.mark.parametrize("link", BAD + FINE)
def test_a_broken_link_is_found(link: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "b.md").write_text("# One *two*\n\n## One `two`\n\n```md\n[shown](not-a-link.md)\n```\n")
    picture = "!" if link.endswith(".png") else ""
    (tmp_path / "a.md").write_text(f"# Here\n\n| a |\n|---|\n| {picture}[text]({link}) |\n")
    links._tokens.cache_clear()
    links._anchors.cache_clear()
    found = links.broken(tmp_path)
    assert [line.split(": ")[:2] for line in found] == ([["a.md", link]] if link in BAD else [])


def test_equations_keep_their_lines() -> None:
    """What four spaces set apart is taken as it stands, except arguments, examples and lists."""
    text = ["Say it:", "", "    Q = V", "    R = G Q", "", "Args:", "    x: one", "        more", "", "    >>> 1"]
    expected: list[Any] = ["Say it:", "", "::", "", "    Q = V", "    R = G Q", "", *text[5:]]
    assert docstrings.literal_blocks(text) == expected
    assert docstrings.literal_blocks(["Say it::", "", "    Q"]) == ["Say it::", "", "    Q"]
