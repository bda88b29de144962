"""Pages show what their commands print now, from committed results."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("fill_docs", ROOT / "tools" / "fill_docs.py")
assert spec
assert spec.loader
fill_docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fill_docs)


@pytest.mark.parametrize(
    ("page", "least"), [("docs/evidence.md", 1), ("docs/best.md", 0), ("docs/finetune.md", 1), ("README.md", 0)]
)
def test_a_page_is_what_the_studies_say(page, least, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / page).read_text()
    assert len(fill_docs.BLOCK.findall(page)) == page.count("<!-- subspan ") >= least  # none that would go unchecked
    assert fill_docs.filled(page) == page


def test_a_stale_block_is_filled_anew(tmp_path, monkeypatch):
    page = "before\n<!-- subspan theory rso-unbiased --steps 0 -->\n```text\nold\n```\nafter"
    with pytest.raises(SystemExit):
        fill_docs.filled(page)  # a command that fails leaves no page
    monkeypatch.setattr(fill_docs, "subspan", lambda words: print(words[0], " ") or 0)
    assert fill_docs.filled(page) == page.replace("old\n", "theory\n")
