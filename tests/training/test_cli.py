"""The command as a user runs it: what it prints, its exit status, and signals that stop it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.waiting import Gate, started

from subspan.cli import main
from subspan.training.config.resolve import resolve
from subspan.training.pretraining import Pretraining

pytestmark = pytest.mark.usefixtures("one_parser")

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
STUDY = Path(__file__).parents[2] / "studies" / "table1_nano.yaml"
KEYS = [
    "optimizer",
    "model",
    "steps",
    "tokens",
    "val_loss",
    "val_ppl",
    "state_bytes",
    "seconds",
    "out",
    "seed",
    "test_loss",
    "data_form",
]


def flags(corpus: Path, out: Path, **extra: object) -> list[str]:
    settings = {"data": corpus, "out": out, "batch_size": 4, "sequence_length": 16, "rank": 4, "update_proj_gap": 5,
                "steps": 12, "threads": 1, "device": "cpu", "checkpoint.every": 4, "evaluation.tokens": 64} | extra  # fmt: skip
    return ["pretrain", "--model=llama-nano", *(f"--{key}={value}" for key, value in settings.items())]


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:06d}" / "model.safetensors")


def test_json_is_one_last_line(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags(corpus, tmp_path / "run"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert list(json.loads(out)) == KEYS
    assert out.count("\n") == 1
    assert "bytes held" in err
    assert "step 12/12" in err


def test_without_json_a_person_reads_the_perplexity(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(corpus, tmp_path / "run")) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_the_unbroken_run(
    how: signal.Signals, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process is really killed in the middle, after two steps that are not saved. The run that goes on ends in the
    same weights, bit for bit.
    """
    broken, whole, gate = tmp_path / "broken", tmp_path / "whole", Gate(tmp_path / "gate", step=6)
    command = [sys.executable, "-m", "subspan.cli", *flags(corpus, broken)]
    with started(command, stdout=subprocess.DEVNULL, env=gate.environment) as process:
        gate.wait_until_reached(process)
        process.send_signal(how)
        _, err = process.communicate()
    if how == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 128 + how
        assert f"{how.name}: saved at step 7" in err
        assert f"--config {broken}/config.yaml --out {broken} --resume auto" in err
        assert "Traceback" not in err
    assert not (broken / "summary.json").exists()

    assert main([*flags(corpus, broken), "--resume=auto", "--json"]) == 0
    resumed, err = capsys.readouterr()
    assert f"continues at step {4 if how == signal.SIGKILL else 7}" in err
    assert main([*flags(corpus, whole), "--json"]) == 0
    first, second = weights(broken, 12), weights(whole, 12)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads(resumed)["val_loss"] == json.loads((whole / "summary.json").read_text())["val_loss"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optimizer=sara_adm"], ["sara_adm", "did you mean sara_adamw"]),
        (["--model=llama-nan"], ["llama-nan", "llama-nano"]),
        (["--stpes=3"], ["--stpes", "did you mean", "steps"]),
        (["--config=bad.yaml"], ["batch_sise", "did you mean batch_size"]),
        (["--config=missing.yaml"], ["missing.yaml", "does not exist"]),
        (["--steps=many"], ["steps", "many"]),
        (["--rank=0"], ["rank=0", ">= 1"]),
        (["--data=nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
        (["--data=empty"], ["empty", "no such file, and nothing to read"]),
        (["--sequence_length=1000000"], ["sequence_length=1000000", "shorter sequence"]),
        (["--config=list.yaml"], ["optim=3", "expected a mapping of settings"]),
        (["--config=latin.yaml"], ["cannot be read"]),
        (["--optim.transfer=rotat"], ["optim.transfer=rotat", "rotate"]),
        (["--device=gpu"], ["device=gpu", "'cuda'"]),
        (["--batch-sise=8"], ["did you mean batch_size"]),
        (["--warmup_steps=8"], ["did you mean schedule.warmup_steps"]),
        (["--tokenizer=byte"], ["tokenizer 'byte' is unknown", "bytes"]),
        (["--rank=abc"], ["rank=abc", "expected int or float or null"]),
        (["--out=bad.yaml/run"], ["out='bad.yaml/run'", "no directory that can be written"]),
        (["--checkpoint.evry=3"], ["checkpoint.evry", "checkpoint.every"]),
        (["--data", ""], ["data=''", "is blank; expected a name or a path"]),
        (["--data", " \t"], ["data=' \\t'", "is blank"]),
        (["--data=c4:"], ["data='c4:'", "expected a path after c4:, or only c4"]),
        (["--model", ""], ["model=''", "is blank"]),
        (["--tokenizer", ""], ["tokenizer=''", "is blank"]),
        (["--validation_data", ""], ["validation_data=''", "is blank"]),
        (["--out", ""], ["out=''", "is blank"]),
        (["--resume", ""], ["resume=''", "is blank"]),
    ],
)
def test_bad_input(
    arguments: list[str], words: list[str], corpus: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The exit status is 2, one line names what is wrong, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("batch_sise: 3\n")
    (tmp_path / "list.yaml").write_text("optim: 3\n")
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe4\n")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        main([*flags(corpus, tmp_path / "run"), *arguments])
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("subspan: error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["inspect", ""], "run"),
        (["study", "run", ""], "file"),
        (["study", "run", str(STUDY), "--runs", ""], "runs"),
        (["report", ""], "source"),
        (["report", str(STUDY), "--out", " "], "out"),
    ],
)
def test_blank_paths(
    arguments: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not stand for the working directory, although it holds runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").touch()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert re.fullmatch(rf"subspan: error: {name}='\s*': is blank; expected a path\n", capsys.readouterr().err)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_checkpoint_of_another_method(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(corpus, tmp_path / "run")) == 0
    with pytest.raises(SystemExit) as exit:
        main(flags(corpus, tmp_path / "run", resume="auto", optimizer="galore_adamw"))
    assert exit.value.code == 2
    assert "optimizer was sara_adamw, is galore_adamw" in capsys.readouterr().err


def test_print_config_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str], corpus: Path) -> None:
    """The printed settings, given back as a file, run. A later flag wins over the file."""
    with pytest.raises(SystemExit) as exit:
        main([*flags(corpus, tmp_path / "run"), "--optim.eps=1e-7", "--print_config"])
    assert exit.value.code == 0
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    assert main(["pretrain", f"--config={tmp_path / 'config.yaml'}", "--steps=3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    assert "eps: 1.0e-07" in (tmp_path / "run" / "config.yaml").read_text()


def test_the_config_of_a_run_repeats_it(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags(corpus, tmp_path / "run"), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (
        main(["pretrain", f"--config={tmp_path / 'run' / 'config.yaml'}", f"--out={tmp_path / 'again'}", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["val_loss"] == first["val_loss"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_run_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is read without an error, and its settings can be resolved."""
    seen = []
    monkeypatch.setattr(Pretraining, "__init__", lambda self, config, ranks: seen.append(resolve(config)))
    monkeypatch.setattr(Pretraining, "run", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["pretrain", f"--config={path}"]) == 130
    assert seen[0].model in path.stem or path.stem.startswith(seen[0].model)


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "optimizers"]) == 0
    assert "sara_adamw" in capsys.readouterr().out
    assert main(["list", "models"]) == 0
    assert "llama-60m" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["list", "--json"], pytest.param(["list", "models"], marks=pytest.mark.slow)])
def test_a_reader_that_goes_away(arguments: list[str]) -> None:
    """There is no traceback, as with ``| head``, and the status is that of a process ended by the closed pipe."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "subspan.cli", *arguments]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


REQUIRED = [
    *(f"{method}_adamw" for method in ("galore", "sara", "golore", "golore_hybrid", "fira", "fira_sara")),
    *(f"{method}_{rule}" for method in ("galore", "sara") for rule in ("adafactor", "adam_mini", "sgd", "lion", "adamw_8bit")),
    "online_pca_adamw", "grass_adamw", "flora_adamw", "gosare_adamw", "gasare_adamw",
]  # fmt: skip


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Each optimizer with its parts, its paper and the bytes it holds; each model with its sizes."""
    assert main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(REQUIRED) <= set(rows)
    for name, row in rows.items():
        assert {"name", "summary", "paper", "parts", "lr", "scale", "state_formula", "variables"} <= set(row), name
    assert rows["sara_adamw_8bit"]["parts"] == {
        "selector": "Importance(power=1.0, floor=0.0, method='gram')",
        "rule": "AdamW(betas=(0.9, 0.999), eps=1e-08)",
        "residual": "Discard()",
        "transfer": "keep",
        "state_dtype": "int8",
    }
    assert rows["sara_adamw_8bit"]["state_formula"] == {
        "projected": "2*q(m, r) + 4*n*r + 4", "matrix": "2*q(a, b) + 4", "vector": "8*k + 4",
        "carrier": "2*q(rows, r) + 4", "basis": "4*columns*r",
    }  # fmt: skip
    assert main(["list", "models", "--json"]) == 0
    assert {"name": "llama-nano", "hidden": 64}.items() <= json.loads(capsys.readouterr().out)[0].items()


def test_flags_with_hyphens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hyphens stand for underscores, and --backward-side without a value is true."""
    seen = []
    monkeypatch.setattr(
        "subspan.training.pretraining.Pretraining.__init__", lambda self, config, ranks: seen.append(config)
    )
    monkeypatch.setattr(
        "subspan.training.pretraining.Pretraining.run", lambda self: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    for flags in (["--backward-side", "--micro-batch-size", "4"], ["--micro-batch-size=4", "--backward-side"]):
        assert main(["pretrain", *flags]) == 130
        assert (seen[-1].backward_side, seen[-1].micro_batch_size) == (True, 4)
    for flags in (["--backward-side=false"], ["--backward_side", "false"]):
        assert main(["pretrain", *flags]) == 130
        assert seen[-1].backward_side is False
    assert main(["pretrain"]) == 130
    assert seen[-1].backward_side is None


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    """Both measurements run, print JSON with the promised keys, and a table without; bad input is one line."""
    setting = ["--model", "llama-nano", "--tokens", "128", "--sequence-length", "64", "--rank", "8"]
    assert main(["bench", "memory", *setting, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == [
        "adamw",
        "galore_adamw",
        "sara_adamw",
        "sara_adamw_backward",
        "rso_adamw",
        "sara_sketch_adamw_backward",
    ]
    promised = ["weight", "gradient", "state", "basis", "saved_activation", "peak", "refresh_peak"]
    assert all({"formula", *(f"{kind}_bytes" for kind in promised)} <= set(row) for row in rows)
    assert main(["bench", "train", *setting, "--pairs", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["ratio_vs_adamw_fused"]) == {"median", "low", "high"}
    assert 0 < found["flops_ratio"] < 1
    assert found["shapes"]["tokens"] == 128
    assert main(["bench", "memory", *setting]) == 0
    assert "sara_adamw_backward" in capsys.readouterr().out
    for flags, words in (
        (["--model", "llama-nan"], "llama-nano"),
        (["--tokens", "100"], "a multiple of sequence_length"),
    ):
        with pytest.raises(SystemExit) as status:
            main(["bench", "memory", *flags])
        assert status.value.code == 2
        assert words in capsys.readouterr().err
