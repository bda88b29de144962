"""Fill in what a page shows of a command, so that no figure is typed by hand.

    python tools/fill_docs.py docs/evidence.md

The command stands in a comment before a block, and its output becomes the block::

    <!-- subspan study table studies/table1_nano.yaml -->
    ```text
    ```

``--check`` changes nothing, and fails where a block is not what its command prints now.
"""

import argparse
import contextlib
import io
import re
import shlex
from pathlib import Path

from subspan.cli import main as subspan

BLOCK = re.compile(r"(<!-- subspan (?P<command>.+?) -->\n```text\n)(?P<shown>.*?)(```)", re.DOTALL)


def filled(page: str) -> str:
    """The page, in which every block is what its command prints now."""

    def run(match: re.Match[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = subspan(shlex.split(match["command"]))
        if status:
            raise SystemExit(f"subspan {match['command']}: exit status {status}")
        lines = (line.rstrip() for line in printed.getvalue().rstrip().splitlines())
        return match[1] + "".join(f"{line}\n" for line in lines) + match[4]

    return BLOCK.sub(run, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page is out of date")
    given = parser.parse_args()
    for page in given.pages:
        old = page.read_text()
        new = filled(old)
        if given.check and new != old:
            raise SystemExit(f"{page}: out of date; run python tools/fill_docs.py {page}")
        page.write_text(new)


if __name__ == "__main__":
    main()
