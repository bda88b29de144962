"""The runs of a study that are still missing, given the records of those that are done."""

from collections.abc import Iterator, Mapping

from subspan.study.choice import choose
from subspan.study.records import Record
from subspan.study.study_file import Cell, Study


def cells_of(study: Study, records: Mapping[str, Record]) -> Iterator[Cell]:
    """Yield the runs of the study, as far as they are known.

    The sweeps come first. Then every row gets one seed before any row gets the next.
    """
    choices = [(row, choose(study, row, records)) for row in study.rows]
    for _, choice in choices:
        yield from choice.cells
    for seed in study.seeds:
        for row, choice in choices:
            if choice.config is not None:
                yield row.cell(choice.config, seed)


def total(study: Study, records: Mapping[str, Record]) -> int:
    """Return how many runs the study has, as far as can be known before its sweeps are done."""
    return len(study.rows) * len(study.seeds) + sum(len(choose(study, row, records).cells) for row in study.rows)
