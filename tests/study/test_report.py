"""The report: what stands in it, that it needs nothing beside it, and that a browser shows it as meant."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from support.studies import cell_of, make, record

from subspan.cli import main
from subspan.study.records import append_records
from subspan.study.report import figures
from subspan.study.report.gather import gather
from subspan.utils.errors import InputError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROWS = {
    "full": {"optimizer": "adamw"},
    "galore": {"optimizer": "galore_adamw"},
    "sara": {"optimizer": "sara_adamw", "versus": "galore"},
}
LOSSES = {"full": [1.0, 1.1, 1.2], "galore": [2.0, 2.2, 2.1], "sara": [1.7, 2.0, None]}
MEMORY = {"command": "subspan bench memory", "rows": [
    {"name": name, "weight_bytes": 10, "carrier_bytes": 0, "gradient_bytes": 10, "state_bytes": 20, "basis_bytes": 1,
     "saved_activation_bytes": 30} for name in ("adamw", "sara_adamw")]}  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on a study with a diverged run, a run with probes and two checkpoints, and measured memory."""
    folder = tmp_path_factory.mktemp("report")
    study = make(folder, rows=ROWS, seeds=[0, 1, 2], about="A <small> study")
    for row in study.rows:
        for seed, loss in enumerate(LOSSES[row.name]):
            curve = [[2, 5.0], [4, loss]] if loss else []
            append_records(
                study.results, [record(cell_of(row, row.lr, seed), loss) | {"curve": curve, "commit": "abc"}]
            )
    (folder / "memory.json").write_text(json.dumps(MEMORY))
    run = ["--model=llama-nano", "--steps=8", "--batch_size=2", "--sequence_length=16", "--rank=4", "--update_proj_gap=3",
           "--threads=1", "--device=cpu", "--evaluation.tokens=64", "--checkpoint.every=4", "--log_every=2"]  # fmt: skip
    assert main(["pretrain", *run, "--probes.subspace=true", f"--out={folder / 'runs/one'}"]) == 0
    out = folder / "report.html"
    sources = [str(folder / "studies"), str(folder / "runs"), str(folder / "memory.json")]
    assert main(["report", *sources, "--out", str(out), "--title", "A report"]) == 0
    return out


class Reader(HTMLParser):
    """The rows of tables, and what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.fetched: list[str] = []
        self.figures = 0
        self._cell = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.fetched += [given[key] or "" for key in ("src", "href") if given.get(key)]
        self.figures += tag == "svg"
        self._cell = tag in ("td", "th") or (tag == "button" and self._cell)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell and self.rows:
            self.rows[-1][-1] += data.strip()


def test_it_shows_what_was_measured_and_needs_nothing_else(page: Path) -> None:
    text, reader = page.read_text(), Reader()
    reader.feed(text)
    assert all(where.startswith(("#", "data:")) for where in reader.fetched)
    assert "url(http" not in text
    assert "@import" not in text
    by_name = {row[0]: row for row in reader.rows if row}
    assert by_name["galore"][2:4] == ["3", "2.1000"]
    assert by_name["sara"][2] == "2 (1 diverged)"
    assert by_name["sara"][-3:] == ["30.47", "24.21", "19.16"]  # reported, in columns of their own
    assert "reported 60M" in by_name["row"]
    assert "A &lt;small&gt; study" in text
    assert "(abc)" in text
    assert f"torch {torch.__version__}" in text  # of the run
    assert by_name["q_proj"][1] == "4"
    assert reader.figures == 6  # differences, curves, losses of runs, overlaps, spectra, memory


def test_identifiers_of_figures_do_not_clash(page: Path) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page.read_text())
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:xlink:href="|url\()#([^")]+)', page.read_text())
    assert set(used) <= set(ids)


def test_a_run_that_diverged_is_in_no_curve(tmp_path: Path) -> None:
    """It is in no mean of the table either. Runs of fine-tuning are named with their own command."""
    study = make(tmp_path, rows=ROWS, seeds=[0, 1, 2])
    for row in study.rows:
        for seed, loss in enumerate(LOSSES[row.name]):
            curve = [[2, 5.0], *([[4, loss]] if loss else [])]
            append_records(study.results, [record(cell_of(row, row.lr, seed), loss) | {"curve": curve}])
    run = tmp_path / "runs/tuned"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("task: bundled\noptimizer: adamw\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    parts = gather([str(tmp_path / "studies"), str(run)])
    assert [len(curves) for curves in parts.studies[0].curves.values()] == [3, 3, 2]
    assert parts.runs[0].command == f"subspan finetune --config {run}/config.yaml"


def test_figures_take_the_ink_of_the_page() -> None:
    svg = figures.loss_bands({"a": [[(1, 2.0), (2, 1.0)], [(1, 2.5), (2, 1.5)]]}, "loss")
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert "#000000" not in svg
    assert 'width="' not in svg[: svg.index(">")]


def test_no_two_rows_look_alike() -> None:
    svg = figures.loss_bands({str(row): [[(1, 2.0), (2, float(row))]] for row in range(13)}, "loss")
    curves = re.findall(r'clip-path="[^"]*" style="fill: none; ([^"]*)stroke-width: 1.5', svg)
    assert len(curves) == len(set(curves)) == 13


_LOOK = """<script>
addEventListener("load", () => {
  const boxes = [...document.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect());
  const sizes = boxes.map(box => [box.width, box.height]);
  const table = document.querySelector("table.sortable"), column = 3;
  const values = () => [...table.tBodies[0].rows].map(row => row.cells[column].textContent);
  const orders = [values()];
  const button = table.tHead.rows[0].cells[column].firstElementChild;
  for (let i = 0; i < 2; i++) { button.click(); orders.push(values()); }
  const found = {sizes, orders, wide: document.documentElement.scrollWidth, seen: innerWidth};
  document.body.innerHTML = "<pre id=found>" + JSON.stringify(found) + "</pre>";
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_it(width: int, page: Path, tmp_path: Path) -> None:
    looked = tmp_path / "looked.html"
    looked.write_text(page.read_text().replace("</body>", _LOOK + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--log-level=0",
             f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom"]  # fmt: skip
    shown = subprocess.run([str(CHROMIUM), *flags, looked.as_uri()], capture_output=True, text=True, check=True)
    assert ":CONSOLE" not in shown.stderr
    found = json.loads(re.search(r"<pre id=\"found\">(.*?)</pre>", shown.stdout)[1])  # type: ignore[index]
    assert len(found["sizes"]) == 6
    assert all(w > 300 and h > 50 for w, h in found["sizes"])
    assert found["orders"] == [
        ["1.1000", "2.1000", "1.8500"],
        ["1.1000", "1.8500", "2.1000"],
        ["2.1000", "1.8500", "1.1000"],
    ]
    assert found["wide"] <= found["seen"]  # what is wide scrolls by itself, not the page


@pytest.mark.parametrize("summary", [None, "{", "[]", '{"made_by": 3}'])
def test_a_run_that_cannot_say_its_versions(summary: str | None, tmp_path: Path) -> None:
    """It has not finished, its summary is damaged, or an older version wrote it: the report is made all the same."""
    (tmp_path / "config.yaml").write_text("optimizer: adamw\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    if summary is not None:
        (tmp_path / "summary.json").write_text(summary)
    (part,) = gather([str(tmp_path)]).runs
    assert part.made_by == ("" if summary else "not finished")


def test_settings_of_a_run_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match=r"config.yaml: holds no settings of a run; mend it"):
        gather([str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.yaml", None, "does not exist"),
        ("notes.txt", "x", "expected a study file"),
        ("memory.json", "{}", "holds no results of subspan bench memory"),
        ("memory.json", "{", "holds no results of subspan bench memory"),
        ("memory.json", '{"rows": [{"name": "adamw", "weight_bytes": "many"}]}', "holds no results of"),
        ("empty", "", "holds no study file (.yaml) and no run"),
    ],
)
def test_what_is_wrong_is_named(
    name: str, content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if name == "empty":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as caught:
        main(["report", str(path), "--out", str(tmp_path / "out.html")])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert words in err
    assert name in err
    assert not (tmp_path / "out.html").exists()
