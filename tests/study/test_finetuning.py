"""Studies of fine-tuning: the same file with another command, and a table in which the higher score is the better."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.studies import cell_of, record, write
from transformers import LlamaConfig

from subspan.study.records import append_records, read_records
from subspan.study.runner import Runner
from subspan.study.study_file import Study, load_study
from subspan.study.table import as_text, compare
from subspan.training.config.settings import FinetuneConfig
from subspan.training.data.tokenizer import load_tokenizer
from subspan.utils.errors import InputError

ROWS: dict[str, Any] = {
    "full": {"optimizer": "adamw"},
    "galore": {"optimizer": "galore_adamw", "lora": {"rank": None}},
    "sara": {"optimizer": "sara_adamw", "versus": "galore"},
}


def study_of(folder: Path, **changes: Any) -> Study:
    base = {"task": "classification", "data": str(folder / "data.jsonl"), "model": str(folder / "model"), "steps": 3,
            "batch_size": 4, "max_length": 16, "rank": 4, "device": "cpu", "log_every": 1} | changes  # fmt: skip
    return load_study(write(folder, command="finetune", base=base, rows=ROWS))


def prepared(folder: Path) -> Study:
    rows = [{"text": f"{word} {i}", "label": word} for i in range(12) for word in ("yes", "no")]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    config.save_pretrained(folder / "model")
    load_tokenizer("bytes").save_pretrained(folder / "model")
    return study_of(folder)


def test_settings_are_those_of_the_command(tmp_path: Path) -> None:
    study = prepared(tmp_path)
    assert all(isinstance(row.config, FinetuneConfig) for row in study.rows)
    with pytest.raises(InputError, match=r"sequence_length.*subspan finetune --help"):
        study_of(tmp_path, sequence_length=8)
    with pytest.raises(InputError, match="command='train': expected pretrain or finetune"):
        load_study(write(tmp_path, command="train"))


def test_how_often_is_evaluated_is_part_of_a_cell(tmp_path: Path) -> None:
    """It decides which checkpoint is the best; how often one is saved does not."""
    first = cell_of(prepared(tmp_path).rows[0], 1e-3, 0).key
    assert cell_of(study_of(tmp_path, checkpoint={"every": 7}).rows[0], 1e-3, 0).key == first
    assert cell_of(study_of(tmp_path, evaluation={"every": 2}).rows[0], 1e-3, 0).key != first


def test_a_higher_score_closes_the_gap(tmp_path: Path) -> None:
    study, scores = prepared(tmp_path), {"full": 0.9, "galore": 0.7, "sara": 0.8}
    for row in study.rows:
        cells = [cell_of(row, row.lr, seed) for seed in study.seeds]
        rest = {"status": "finished", "row": row.name, "val_loss": 1.0, "state_bytes": 1, "seconds": 1.0}
        append_records(
            study.results,
            [{"key": cell.key, "seed": cell.config.seed, "accuracy": scores[row.name], **rest} for cell in cells],
        )
    table = compare(study, "accuracy")
    assert [row["gap_reduction"] for row in table["rows"]] == [None, None, pytest.approx(0.5)]
    assert "saved" not in as_text(table), "nothing was counted"
    with pytest.raises(InputError, match=r"metric='f1'.*they have val_loss, accuracy"):
        compare(study, "f1")


def test_what_is_saved(tmp_path: Path) -> None:
    """A mean over seeds, whose batches differ."""
    study, size = prepared(tmp_path), {"full": 4000, "galore": 3000, "sara": 2000}
    for row in study.rows:
        for number, seed in enumerate(study.seeds):
            held = {"saved_activation_bytes": size[row.name] + 2 * number}
            append_records(study.results, [record(cell_of(row, row.lr, seed), 1.0) | held])
    assert len(study.seeds) == 2
    lines = as_text(compare(study)).splitlines()
    assert lines[1].split()[-1] == "saved"
    assert [line.split()[-1] for line in lines[2:]] == ["4,001", "3,001", "2,001"]


def test_the_runner_runs_them(tmp_path: Path) -> None:
    study = prepared(tmp_path)
    assert Runner(study, tmp_path / "runs", jobs=1).run() == 0
    records = read_records(study.results)
    assert len(records) == 6
    for found in records.values():
        assert found["metric"] == "accuracy"
        assert 0 <= found["accuracy"] <= 1
        assert found["saved_activation_bytes"] > 0
