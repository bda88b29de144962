"""What is left to run, given what has been."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from subspan.study.records import Record
from subspan.study.study_file import Cell, Row, Study


@dataclass(frozen=True)
class Choice:
    """The learning rate of a row, and the runs that choose it."""

    lr: float | None
    """``None`` as long as some are missing."""
    at_edge: bool = False
    """It is the largest or smallest that was tried: a better one may lie beyond."""
    cells: tuple[Cell, ...] = ()


def choose_lr(study: Study, row: Row, records: Mapping[str, Record]) -> Choice:
    """The learning rate of the lowest loss on the sweep's seed; a run that diverged has lost."""
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
    """The runs of the study, as far as they are known: of sweeps first, then a seed of every row before the next of
    any.
    """
    choices = [(row, choose_lr(study, row, records)) for row in study.rows]
    for _, choice in choices:
        yield from choice.cells
    for seed in study.seeds:
        for row, choice in choices:
            if choice.lr is not None:
                yield row.cell(choice.lr, seed)


def total(study: Study, records: Mapping[str, Record]) -> int:
    """How many runs the study has, as far as can be known before its sweeps are done."""
    return len(study.rows) * len(study.seeds) + sum(len(choose_lr(study, row, records).cells) for row in study.rows)
