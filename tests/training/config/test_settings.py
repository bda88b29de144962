"""Which settings change nothing that is computed: what may differ on resume, and what keys a result."""

from pathlib import Path

import pytest

from subspan.study.missing_runs import cells_of
from subspan.study.records import read_records
from subspan.study.study_file import load_study
from subspan.training.config.settings import names_without_effect

STUDIES = sorted((Path(__file__).parents[3] / "studies").glob("*.yaml"))
_FINISHED = {"finetune_minilm"}
"""Studies of which every run is recorded."""
INCIDENTAL = {
    "out", "resume", "device", "threads", "micro_batch_size", "gradient_checkpointing", "checkpoint", "log_every",
    "tensorboard", "parallel", "probes",
}  # fmt: skip


def test_settings_without_effect() -> None:
    """Written out once more: a setting that joins them forgivingly joins runs that differ."""
    assert names_without_effect() == INCIDENTAL
    assert names_without_effect(with_measurements=True) == INCIDENTAL | {"evaluation"}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_committed_results_keep_their_keys(path: Path) -> None:
    """Every record of a committed study is that of one of its runs; a study may not be run yet."""
    study = load_study(path)
    records = read_records(study.results)
    cells, _ = cells_of(study, records)
    assert cells
    assert set(records) <= cells.keys()
    if path.stem in _FINISHED:
        assert set(records) == cells.keys()
