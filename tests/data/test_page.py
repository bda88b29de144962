"""The table of the page about data names tests that are there."""

import re

from support.pages import ROOT

LINK = re.compile(r'\]\((\.\./tests/[\w/]+\.py) "(test_\w+)"\)')


def test_every_cell_leads_to_a_test() -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    table = page[page.index("| files |") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) > 10
    for row in table:
        cells = [cell.strip() for cell in row.strip("| ").split(" | ")][1:]
        assert len(cells) == 3, row
        for cell in cells:
            links = LINK.findall(cell)
            assert cell == "-" or len(links) == 1, cell
            for path, name in links:
                assert f"\ndef {name}(" in (ROOT / "docs" / path).read_text(), (path, name)
