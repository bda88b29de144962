"""Which runs are left, and which learning rate is taken."""

from pathlib import Path

from support.studies import make, record

from subspan.study.missing_runs import cells_of, choose_lr, total
from subspan.study.records import Record

SWEEP = {"seed": 9, "factors": [1, 2, 4], "extend": 2}
ONE = {"galore": {"optimizer": "galore_adamw", "rank": 4}}


def swept(folder: Path, losses: dict[float, float | None]) -> tuple[float | None, bool, list[float]]:
    """The learning rate after these losses by factor, whether it is at an edge, and the factors still to be run."""
    study = make(folder, rows=ONE, sweep=SWEEP)
    row = study.rows[0]
    found = {cell.key: record(cell, loss) for f, loss in losses.items() for cell in [row.cell(row.lr * f, 9)]}
    choice = choose_lr(study, row, found)
    missing = [cell.config.lr for cell in choice.cells if cell.key not in found]
    assert all(cell.config.seed == 9 for cell in choice.cells)
    return choice.lr, choice.at_edge, [round((lr or 0) / row.lr, 6) for lr in missing]


def test_the_lowest_loss_inside_the_range(tmp_path: Path) -> None:
    assert swept(tmp_path, {}) == (None, False, [1, 2, 4])
    assert swept(tmp_path, {1: 3.0, 2: 2.0}) == (None, False, [4])
    assert swept(tmp_path, {1: 3.0, 2: 2.0, 4: 2.5}) == (0.02, False, [])
    assert swept(tmp_path, {1: 3.0, 2: 2.0, 4: None}) == (0.02, False, [])  # it diverged


def test_the_range_grows_towards_the_best_and_ends_somewhere(tmp_path: Path) -> None:
    assert swept(tmp_path, {1: 3.0, 2: 2.0, 4: 1.0}) == (None, False, [8])
    assert swept(tmp_path, {1: 3.0, 2: 2.0, 4: 1.0, 8: 1.5}) == (0.04, False, [])
    assert swept(tmp_path, {1: 3.0, 2: 2.0, 4: 1.0, 8: 0.9}) == (None, False, [16])
    assert swept(tmp_path, {1: 3.0, 2: 2.0, 4: 1.0, 8: 0.9, 16: 0.8}) == (0.16, True, [])
    assert swept(tmp_path, {1: 1.0, 2: 2.0, 4: 3.0}) == (None, False, [0.5])


def test_no_seed_is_run_before_the_sweep_of_its_row_and_seeds_are_filled_one_by_one(tmp_path: Path) -> None:
    rows = ONE | {"full": {"optimizer": "adamw"}}
    study = make(tmp_path, rows=rows, sweep=SWEEP, reference="full")
    assert {cell.config.seed for cell in cells_of(study, {})} == {9}
    assert total(study, {}) == 2 * (3 + 2)
    row = study.rows[0]
    found: dict[str, Record] = {}
    for factor, loss in ((1, 3.0), (2, 2.0), (4, 3.0)):
        cell = row.cell(row.lr * factor, 9)
        found[cell.key] = record(cell, loss)
    left = [cell for cell in cells_of(study, found) if cell.key not in found]
    assert [(cell.row, cell.config.seed) for cell in left] == [("full", 9)] * 3 + [("galore", 0), ("galore", 1)]
    without = make(tmp_path, rows=rows)
    order = [(cell.row, cell.config.seed) for cell in cells_of(without, {})]
    assert order == [("galore", 0), ("full", 0), ("galore", 1), ("full", 1)]
