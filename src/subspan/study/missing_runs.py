"""The runs of a study that are still missing, given the records of those that are done."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from subspan.study.records import Record
from subspan.study.study_file import Cell, Row, Study


@dataclass(frozen=True)
class Choice:
    """The learning rate of a row, and the runs that choose it."""

    lr: float | None
    """The learning rate that was chosen; ``None`` as long as some of the runs are missing."""
    at_edge: bool = False
    """Whether it is the largest or smallest that was tried, so that a better one may lie beyond."""
    cells: tuple[Cell, ...] = ()
    """The runs that choose it."""


def choose_lr(study: Study, row: Row, records: Mapping[str, Record]) -> Choice:
    """Choose the learning rate with the lowest loss on the sweep's seed; a run that diverged has lost."""
    if study.sweep is None:
        return Choice(row.lr)
    factors = list(study.sweep.factors)
    for left in reversed(range(study.sweep.extend + 1)):
        cells = tuple(row.cell(row.lr * factor, study.sweep.seed) for factor in factors)
        if any(cell.key not in records for cell in cells):
            return Choice(None, cells=cells)
        losses = [records[cell.key]["val_loss"] for cell in cells]
        best = min(range(len(factors)), key=lambda i: math.inf if losses[i] is None else losses[i])
        at_edge = best in (0, len(factors) - 1)
        if not at_edge or not left:
            break
        factors = [factors[0] ** 2 / factors[1], *factors] if best == 0 else [*factors, factors[-1] ** 2 / factors[-2]]
    return Choice(row.lr * factors[best], at_edge, cells)


def cells_of(study: Study, records: Mapping[str, Record]) -> Iterator[Cell]:
    """Yield the runs of the study, as far as they are known.

    The sweeps come first. Then every row gets one seed before any row gets the next.
    """
    choices = [(row, choose_lr(study, row, records)) for row in study.rows]
    for _, choice in choices:
        yield from choice.cells
    for seed in study.seeds:
        for row, choice in choices:
            if choice.lr is not None:
                yield row.cell(choice.lr, seed)


def total(study: Study, records: Mapping[str, Record]) -> int:
    """Return how many runs the study has, as far as can be known before its sweeps are done."""
    return len(study.rows) * len(study.seeds) + sum(len(choose_lr(study, row, records).cells) for row in study.rows)
