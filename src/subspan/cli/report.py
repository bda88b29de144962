"""``subspan report``: one HTML page of studies, runs and measurements."""

from typing import Any

from subspan.cli.parser import Namespace, Parser, fail, path_of, require, say


def add_to(commands: Any, name: str, about: str) -> None:
    parser = Parser(
        description="Write one self-contained HTML page of studies, runs and measurements.",
        examples=["subspan report studies --out report.html", "subspan report runs/first results/memory.json"],
    )
    parser.add_argument(
        "sources",
        type=str,
        nargs="+",
        help="Study files (.yaml), directories of them or of runs, or results of bench memory (.json).",
    )
    parser.add_argument("--out", type=str, default="report.html", help="Page to write.")
    parser.add_argument("--title", type=str, default="subspan report", help="Title of the page.")
    commands.add_subcommand(name, parser, help=about)


def run(settings: Namespace) -> int:
    require("study", "jinja2", "matplotlib", "scipy")
    from subspan.study.report import gather, render
    from subspan.utils.atomic_files import write_text

    out, sources = path_of("out", settings.out), [str(path_of("source", source)) for source in settings.sources]
    if not out.parent.is_dir():
        fail(f"out={settings.out!r}: {out.parent} is no directory; make it, or give another --out")
    page = render(gather(sources), settings.title)
    write_text(out, page)
    say(f"wrote {settings.out}, {len(page.encode()) / 1e6:.1f} MB")
    return 0
