"""The choice of the settings of a row, from the runs of its sweep; see ``subspan.study.sweep``.

``cost`` is what the choice may have cost. In a stage, let ``d`` be the mean and ``s`` the standard error of the loss of
the runner-up minus that of the winner, over the seeds of the sweep. If the true difference is normal around ``d`` with
standard deviation ``s``, the runner-up is in truth better by

    E[max(0, -difference)] = s phi(d / s) - d Phi(-d / s)

on average, where ``phi`` and ``Phi`` are density and distribution of the standard normal law. ``cost`` is the sum over
the stages. A row could end lower by about as much if its settings were known without error. Values that the first seed
has left more than ``within`` behind count as worse.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean, stdev

from subspan.study.records import Record
from subspan.study.study_file import Cell, Row, Study
from subspan.study.sweep import Stage
from subspan.training.config.settings import FinetuneConfig, PretrainConfig


@dataclass(frozen=True)
class Choice:
    """The settings of a row, and the runs that choose them."""

    config: PretrainConfig | FinetuneConfig | None
    """The settings that were chosen; ``None`` as long as some of the runs are missing."""
    cells: tuple[Cell, ...] = ()
    """The runs that choose them, as far as they are known."""
    at_edge: tuple[str, ...] = ()
    """Settings whose best value is the first or the last of three or more, so that a better one may lie beyond."""
    cost: float | None = None
    """What the choice may have cost, in the validation loss; ``None`` where one seed chose, which cannot tell."""


@dataclass(frozen=True)
class _Race:
    """A stage that was run, as far as its runs are known."""

    config: PretrainConfig | FinetuneConfig | None
    cells: tuple[Cell, ...]
    at_edge: bool = False
    cost: float = 0.0


def choose(study: Study, row: Row, records: Mapping[str, Record]) -> Choice:
    """Choose the settings of a row, stage by stage. A run that diverged has lost."""
    config: PretrainConfig | FinetuneConfig = replace(row.config, lr=row.lr)
    cells: dict[str, Cell] = {}
    edges: list[str] = []
    cost = 0.0
    for stage in row.stages:
        race = _race(study, row, config, stage, records)
        cells |= {cell.key: cell for cell in race.cells}
        if race.config is None:
            return Choice(None, tuple(cells.values()))
        config, cost = race.config, cost + race.cost
        if race.at_edge:
            edges.append(stage.setting)
    known = study.sweep is not None and len(study.sweep.seeds) > 1
    return Choice(config, tuple(cells.values()), tuple(edges), cost if row.stages and known else None)


def _race(
    study: Study,
    row: Row,
    config: PretrainConfig | FinetuneConfig,
    stage: Stage,
    records: Mapping[str, Record],
) -> _Race:
    assert study.sweep is not None  # without one no row has a stage
    seeds, values = study.sweep.seeds, list(stage.values)
    tried: dict[str, Cell] = {}

    def losses_of(candidate: PretrainConfig | FinetuneConfig, own: Sequence[int]) -> list[float] | None:
        cells = [row.cell(candidate, seed) for seed in own]
        tried.update((cell.key, cell) for cell in cells)
        found = [records.get(cell.key) for cell in cells]
        return None if None in found else [_loss(record) for record in found if record is not None]

    for left in reversed(range(stage.extend + 1)):
        candidates = [stage.apply(config, value) for value in values]
        firsts = [losses_of(candidate, seeds[:1]) for candidate in candidates]
        if any(losses is None for losses in firsts):
            return _Race(None, tuple(tried.values()))
        losses = [loss for own in firsts for loss in own or ()]
        winner, cost = losses.index(min(losses)), 0.0
        grows = bool(left) and _is_at_end(winner, values)
        if not grows:
            near = [i for i, loss in enumerate(losses) if loss <= losses[winner] + study.sweep.within]
            found = {i: own for i in near if (own := losses_of(candidates[i], seeds)) is not None}
            if len(found) < len(near):
                return _Race(None, tuple(tried.values()))
            winner = min(near, key=lambda i: fmean(found[i]))
            cost = max((_cost(found[winner], found[i]) for i in near if i != winner), default=0.0)
            grows = bool(left) and _is_at_end(winner, values)
        if not grows:
            break
        values = [values[0] ** 2 / values[1], *values] if winner == 0 else [*values, values[-1] ** 2 / values[-2]]
    return _Race(candidates[winner], tuple(tried.values()), len(values) > 2 and _is_at_end(winner, values), cost)


def _is_at_end(place: int, values: Sequence[object]) -> bool:
    return place in (0, len(values) - 1)


def _loss(record: Record) -> float:
    loss = record["val_loss"]
    return math.inf if loss is None else float(loss)


def _cost(winner: Sequence[float], other: Sequence[float]) -> float:
    """Return the expected loss by which ``other`` is in truth better; none where one has diverged."""
    differences = [b - a for a, b in zip(winner, other, strict=True)]
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return 0.0
    mean, error = fmean(differences), stdev(differences) / math.sqrt(len(differences))
    if error == 0:
        return 0.0
    normal = NormalDist()
    return error * normal.pdf(mean / error) - mean * normal.cdf(-mean / error)
