"""Which runs are left: sweeps first, then one seed of every row after the other."""

from pathlib import Path

from support.studies import make, record

from subspan.study.missing_runs import cells_of
from subspan.study.records import Record

SWEEP = {"seeds": [9], "stages": [{"lr": [1, 2, 4], "extend": 2}]}
ONE = {"galore": {"optimizer": "galore_adamw", "rank": 4}}


def test_no_seed_is_run_before_the_sweep_of_its_row_and_seeds_are_filled_one_by_one(tmp_path: Path) -> None:
    rows = ONE | {"full": {"optimizer": "adamw"}}
    study = make(tmp_path, rows=rows, sweep=SWEEP, reference="full")
    known, whole = cells_of(study, {})
    assert {cell.config.seed for cell in known.values()} == {9}
    assert whole == 2 * (3 + 2)
    row = study.rows[0]
    cells = [cell for cell in known.values() if cell.row == row.name]
    found: dict[str, Record] = {cell.key: record(cell, loss) for cell, loss in zip(cells, (3.0, 2.0, 3.0), strict=True)}
    left = [cell for cell in cells_of(study, found)[0].values() if cell.key not in found]
    assert [(cell.row, cell.config.seed) for cell in left] == [("full", 9)] * 3 + [("galore", 0), ("galore", 1)]
    assert {cell.config.lr for cell in left[3:]} == {2 * row.lr}
    without = make(tmp_path, rows=rows)
    order = [(cell.row, cell.config.seed) for cell in cells_of(without, {})[0].values()]
    assert order == [("galore", 0), ("full", 0), ("galore", 1), ("full", 1)]


def test_a_row_takes_the_stages_that_it_names(tmp_path: Path) -> None:
    rows = {"fixed": ONE["galore"] | {"sweep": []}, "swept": ONE["galore"], "full": {"optimizer": "adamw"}}
    sweep = {"seeds": [9], "stages": [{"lr": [1, 2]}, {"weight_decay": [0.0, 0.1]}]}
    study = make(tmp_path, rows=rows | {"rate": ONE["galore"] | {"sweep": ["lr"]}}, sweep=sweep, reference="full")
    assert [len(row.stages) for row in study.rows] == [0, 2, 2, 1]
    known, _ = cells_of(study, {})
    first = next(iter(known.values()))
    assert first.row == "swept"
    assert [cell.row for cell in known.values() if cell.config.seed in study.seeds] == ["fixed"] * 2
