"""The runs of a study, given the records of those that are done."""

from collections.abc import Mapping

from subspan.study.choice import choose
from subspan.study.records import Record
from subspan.study.study_file import Cell, Study


def cells_of(study: Study, records: Mapping[str, Record]) -> tuple[dict[str, Cell], int]:
    """Return the runs of a study by key, as far as they are known, and how many there will be.

    The sweeps come first. Then every row gets one seed before any row gets the next. How many runs there will be is
    counted as if the sweeps that are not done needed no more runs than they have by now.
    """
    choices = [(row, choose(study, row, records)) for row in study.rows]
    cells = [cell for _, choice in choices for cell in choice.cells]
    whole = len(cells) + len(study.rows) * len(study.seeds)
    for seed in study.seeds:
        cells += [row.cell(choice.config, seed) for row, choice in choices if choice.config is not None]
    known: dict[str, Cell] = {}
    for cell in cells:
        known.setdefault(cell.key, cell)  # rows may have runs in common
    return known, whole
