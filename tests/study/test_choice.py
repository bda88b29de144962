"""How the settings of a row are chosen from the runs of its sweep."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm
from support.studies import make, record

from subspan.study.choice import Choice, choose
from subspan.study.records import Record
from subspan.study.study_file import Cell, Study

ONE = {"galore": {"optimizer": "galore_adamw", "rank": 4}}


def study_of(folder: Path, *stages: dict[str, Any], seeds: tuple[int, ...] = (9,), within: float = 0.0) -> Study:
    return make(folder, rows=ONE, sweep={"seeds": list(seeds), "stages": list(stages), "within": within})


def played(study: Study, loss: Callable[[Cell], float | None]) -> tuple[Choice, list[Cell]]:
    """Run what the choice asks for until it is made. Returns it, and the runs in their order."""
    records: dict[str, Record] = {}
    order: list[Cell] = []
    while (choice := choose(study, study.rows[0], records)).config is None:
        new = {cell.key: cell for cell in choice.cells if cell.key not in records}
        assert new, "it waits for nothing"
        order += new.values()
        records |= {key: record(cell, loss(cell)) for key, cell in new.items()}
    assert {cell.key for cell in choice.cells} == records.keys()
    return choice, order


def swept(folder: Path, losses: dict[float, float | None], extend: int = 2) -> tuple[float, bool, list[float]]:
    """The factor that was chosen, whether it is at an edge, and the factors in the order of their runs."""
    study = study_of(folder, {"lr": [1, 2, 4], "extend": extend})
    own = study.rows[0].lr

    def factor(cell: Cell) -> float:
        assert cell.config.lr is not None
        return round(cell.config.lr / own, 6)

    choice, order = played(study, lambda cell: losses[factor(cell)])
    assert choice.config is not None
    assert choice.config.lr is not None
    return round(choice.config.lr / own, 6), choice.at_edge == ("lr",), [factor(cell) for cell in order]


def test_the_lowest_loss_inside_the_range(tmp_path: Path) -> None:
    assert swept(tmp_path, {1: 3.0, 2: 2.0, 4: 2.5}) == (2, False, [1, 2, 4])
    assert swept(tmp_path, {1: 3.0, 2: 2.0, 4: None}) == (2, False, [1, 2, 4])  # it diverged


def test_the_range_grows_towards_the_best_and_ends_somewhere(tmp_path: Path) -> None:
    assert swept(tmp_path, {1: 3.0, 2: 2.0, 4: 1.0, 8: 1.5}) == (4, False, [1, 2, 4, 8])
    assert swept(tmp_path, {1: 3.0, 2: 2.0, 4: 1.0, 8: 0.9, 16: 0.8}) == (16, True, [1, 2, 4, 8, 16])
    assert swept(tmp_path, {0.5: 2.0, 1: 1.0, 2: 2.0, 4: 3.0}) == (1, False, [1, 2, 4, 0.5])
    assert swept(tmp_path, {1: 1.0, 2: 2.0, 4: 3.0}, extend=0) == (1, True, [1, 2, 4])


def test_those_that_are_near_run_on_every_seed_and_the_lowest_mean_wins(tmp_path: Path) -> None:
    losses = {1.0: [2.10], 2.0: [2.00, 2.30, 2.20], 4.0: [2.02, 2.01, 2.00]}
    study = study_of(tmp_path, {"lr": list(losses)}, seeds=(7, 8, 9), within=0.05)
    own = study.rows[0].lr
    choice, order = played(study, lambda cell: losses[round(cell.config.lr / own, 6)][cell.config.seed - 7])  # type: ignore[operator]  # lr is a number
    assert choice.config is not None
    assert choice.config.lr == 4 * own
    assert [cell.config.seed for cell in order] == [7, 7, 7, 8, 9, 8, 9]
    assert choice.at_edge == ("lr",)
    d = np.subtract(losses[2.0], losses[4.0])
    mean, error = d.mean(), d.std(ddof=1) / math.sqrt(3)
    draws = np.random.default_rng(0).normal(mean, error, 10**6)
    assert choice.cost == pytest.approx(np.maximum(0, -draws).mean(), rel=0.02)  # the definition, by chance
    assert choice.cost == pytest.approx(error * norm.pdf(mean / error) - mean * norm.cdf(-mean / error), rel=1e-9)


def test_a_winner_at_the_end_grows_the_range_though_the_first_seed_would_not(tmp_path: Path) -> None:
    """The first seed has its best inside the range, and the mean over all seeds has it at the end."""
    losses = {1.0: [2.10], 2.0: [2.00, 2.30, 2.20], 4.0: [2.02, 2.01, 2.00], 8.0: [2.09]}
    study = study_of(tmp_path, {"lr": [1, 2, 4], "extend": 2}, seeds=(7, 8, 9), within=0.05)
    own = study.rows[0].lr
    choice, order = played(study, lambda cell: losses[round(cell.config.lr / own, 6)][cell.config.seed - 7])  # type: ignore[operator]  # lr is a number
    assert choice.config is not None
    assert (choice.config.lr, choice.at_edge) == (4 * own, ())
    assert [(round(cell.config.lr / own), cell.config.seed) for cell in order][-1] == (8, 7)  # type: ignore[operator]


def test_a_stage_starts_from_the_winners_of_those_before(tmp_path: Path) -> None:
    """``optim.lr_full`` is a factor of the learning rate that was chosen, and the value of an own setting is itself."""
    stages: list[dict[str, Any]] = [
        {"lr": [1, 2, 4]},
        {"optim.lr_full": [0.5, 1, 2]},
        {"optim.betas": [[0.9, 0.95], [0.9, 0.999]]},
        {"schedule.warmup_steps": [1, 2]},
    ]
    study = study_of(tmp_path, *stages)
    own = study.rows[0].lr

    def loss(cell: Cell) -> float:
        lr, optim = cell.config.lr, cell.config.optim
        rest = lr if optim.lr_full is None else optim.lr_full
        betas = optim.betas or (0.9, 0.999)
        return (
            abs(math.log2(lr / own) - 1)  # type: ignore[operator]  # lr is a number
            + abs(math.log2(rest / own) - 2) / 8  # type: ignore[operator]
            + betas[1]
            + (cell.config.schedule.warmup_steps or 1) / 10
        )

    choice, order = played(study, loss)
    config = choice.config
    assert config is not None
    assert (config.lr, config.optim.lr_full) == (2 * own, 4 * own)
    assert list(config.optim.betas or ()) == [0.9, 0.95]
    assert config.schedule.warmup_steps == 1
    # The winner of a stage is a value of the next one; it is not run twice.
    assert len(order) == 3 + 2 + 1 + 1
    assert choice.at_edge == ("optim.lr_full",)


def test_a_row_that_diverges_everywhere_ends(tmp_path: Path) -> None:
    choice, _ = played(study_of(tmp_path, {"lr": [1, 2], "extend": 1}, seeds=(8, 9), within=1.0), lambda cell: None)
    assert choice.config is not None
    assert choice.cost == 0.0
