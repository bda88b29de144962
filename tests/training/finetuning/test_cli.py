"""The command as a user runs it: it prints one line of JSON, and one line for what is wrong."""

import json
from pathlib import Path

import pytest
import torch

from subspan.cli import main

pytestmark = pytest.mark.usefixtures("one_parser")

KEYS = {
    "task",
    "model",
    "optimizer",
    "metric",
    "accuracy",
    "majority",
    "state_bytes",
    "state_bytes_formula",
    "seconds",
    "best_step",
}


def flags(model: Path, data: tuple[Path, Path], out: Path, /, **extra: object) -> list[str]:
    settings = {"model": model, "task": "classification", "data": data[0], "validation_data": data[1], "out": out, "steps": 4,
                "batch_size": 8, "rank": 4, "max_length": 24, "threads": 1, "device": "cpu"} | extra  # fmt: skip
    return ["finetune", *(f"--{key}={value}" for key, value in settings.items() if value is not None)]


def test_json_is_one_last_line(
    bert: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags(bert, data, tmp_path / "run"), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found.keys() >= KEYS
    kept = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert kept.pop("made_by")["torch"] == torch.__version__
    assert kept == found
    assert "48 training and 18 validation examples, 2 labels" in err


def test_a_run_goes_on_with_its_own_settings(
    bert: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``config.yaml`` holds all resolved settings, and a run with other settings is refused."""
    out = tmp_path / "run"
    assert main(flags(bert, data, out)) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["finetune", f"--config={out}/config.yaml", f"--out={out}", "--resume=auto"]) == 0
    assert "already complete at step 4" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(flags(bert, data, out, resume="auto", seed=3))
    assert caught.value.code == 2
    assert "seed was 0, is 3" in capsys.readouterr().err


def test_print_config_is_a_config(
    bert: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed settings, given back as a file, start a run. A later flag overrides the file."""
    with pytest.raises(SystemExit) as caught:
        main([*flags(bert, data, tmp_path / "run"), "--print_config"])
    assert caught.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert main(["finetune", f"--config={tmp_path / 'printed.yaml'}", "--steps=2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best_step"] <= 2
    assert "batch_size: 8" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"model": "no-such-model"}, ["model 'no-such-model' is unknown"]),
        ({"model": "nobody/nothing"}, ["model 'nobody/nothing' cannot be loaded"]),
        ({"data": "gone.csv"}, ["data='", "gone.csv", "no such file"]),
        ({"data": None}, ["data=None", "--data FILE.jsonl"]),
        ({"task": "bundled"}, ["the bundled task has its own"]),
        ({"task": "bundled", "data": None}, ["validation_data=", "--data"]),
        ({"task": "sts2"}, ["task='sts2'", "sst2"]),
        ({"task": "sst2"}, ["line 1: has no column 'sentence'", "--text_column"]),
        ({"label_column": "lable"}, ["no column 'lable'", "label"]),
        ({"pair_column": "other"}, ["no column 'other'", "--pair_column"]),
        ({"max_length": 100}, ["max_length=100", "40 positions"]),
        ({"max_length": 0}, ["max_length=0", ">= 1"]),
        ({"epochs": 0, "steps": None}, ["epochs=0", ">= 1"]),
        ({"steps": 0}, ["steps=0", ">= 1"]),
        ({"evaluation.patience": 0}, ["evaluation.patience=0", ">= 1"]),
        ({"schedule.warmup_steps": 9}, ["schedule.warmup_steps=9", "steps=4"]),
        (
            {"schedule.warmup_steps": 4, "steps": None, "epochs": 1, "batch_size": 16},
            ["schedule.warmup_steps=4", "steps=3"],
        ),
        ({"schedule.warmup_steps": -1, "steps": None}, ["schedule.warmup_steps=-1", ">= 0"]),
        ({"schedule.shape": "square"}, ["schedule.shape", "square", "linear"]),
        ({"task": "regression"}, ["'label' is 'neg'", "expected a number"]),
        ({"task": "lm"}, ["end-of-text"]),
        ({"lora.rank": 4}, ["lora.rank=4", "--optimizer adamw"]),
        ({"lora.dropout": 1.0}, ["lora.dropout=1.0"]),
        ({"batch_sise": 3}, ["batch_sise", "batch_size"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    extra: dict[str, object],
    words: list[str],
    bert: Path,
    data: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(flags(bert, data, tmp_path / "run", **extra))
    assert caught.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("subspan: error")]
    assert len(said) == 1
    assert all(word in said[0] for word in words), said
    assert not (tmp_path / "run").exists()


def test_a_label_unseen_in_training(
    bert: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(data[1], "a") as file:
        file.write('{"text": "so", "label": "mid"}\n')
    with pytest.raises(SystemExit):
        main(flags(bert, data, tmp_path / "run"))
    assert "held.jsonl, line 19: the label 'mid' is not one of training (neg, pos)" in capsys.readouterr().err


def test_glue_without_a_hub_says_what_to_do(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["finetune", f"--model={bert}", "--task=rte", f"--out={tmp_path / 'run'}"])
    assert "task: GLUE's rte cannot be loaded" in (err := capsys.readouterr().err)
    assert "give --data and --validation_data" in err
