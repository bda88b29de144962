"""Runs on data as people have it, from the command line; what their records say; and the keys of studies."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from subspan.cli import main
from subspan.study.meaning import key_of, meaning_of
from subspan.training.config.settings import FinetuneConfig, PretrainConfig
from subspan.training.finetuning import Finetuning

SMALL = ["--threads", "1", "--steps", "3", "--batch_size", "2", "--rank", "4", "--log_every", "1"]
ALPACA = [
    {"instruction": f"Add {i}", "input": "" if i % 2 else f"to {i}", "output": f"it is {2 * i}"} for i in range(30)
]
CHATS = [
    {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": f"yes {i}"}]}
    for i in range(30)
]


def ran(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, Any], str]:
    assert main(list(words)) == 0
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


@pytest.mark.usefixtures("one_parser")
def test_pretraining_on_one_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text("\n\n".join(f"paragraph {i}: " + "so it goes. " * 9 for i in range(400)))
    sizes = ["--sequence-length", "32", "--evaluation.tokens", "64", "--update_proj_gap", "2"]
    summary, err = ran(capsys, "pretrain", "--data", "input.txt", "--model", "llama-nano", *SMALL, *sizes, "--json")
    assert summary["steps"] == 3
    assert summary["data_form"] == "text files"
    assert err.count("a single text outweighs all others; its last 5.0%") == 1
    kept = json.loads(Path(summary["out"], "summary.json").read_text())
    assert kept["data_form"] == "text files"


@pytest.mark.usefixtures("one_parser")
def test_pretraining_on_a_named_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokens are in the cache the second time, and the lines are said again."""
    rows = [{"content": f"row {i} " + "so it goes " * 9, "title": f"a title of five words {i}"} for i in range(60)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    words = [
        "pretrain",
        "--data",
        str(tmp_path / "a.parquet"),
        "--text-column",
        "content",
        *SMALL,
        "--sequence_length",
        "32",
    ]
    for name in ("one", "two"):
        summary, err = ran(capsys, *words, "--evaluation.tokens", "64", "--out", str(tmp_path / name), "--json")
        assert summary["data_form"] == "parquet (content)"
        assert err.count("the text in 'title' is not used; --text_column title") == 1


@pytest.mark.usefixtures("one_parser")
@pytest.mark.parametrize("name", ["alpaca.json", "chat.jsonl", "chat.parquet"])
def test_fine_tuning(name: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / name
    if name == "alpaca.json":
        path.write_text(json.dumps(ALPACA))
    elif name == "chat.jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    else:
        pq.write_table(pa.Table.from_pylist(CHATS), path)
    words = ["finetune", "--task", "lm", "--data", str(path), "--model", str(llama), *SMALL, "--max_length", "100"]
    summary, err = ran(capsys, *words, "--out", str(tmp_path / "run"), "--json")
    form = "Alpaca (instruction, input, output)" if name == "alpaca.json" else "chat (messages: role, content)"
    assert summary["data_form"] == form
    template = "" if name == "alpaca.json" else ", by the plain chat template, since the tokenizer has none"
    assert (
        err.count(f"data: {form}{template}; only the answers are learnt; --learn_prompts learns the prompts too") == 1
    )
    assert ("max_length=100: 30 of 30 examples are longer and are cut" in err) == (name == "alpaca.json")
    saved = json.loads((Path(summary["best"]) / "tokenizer_config.json").read_text())
    has_template = (Path(summary["best"]) / "chat_template.jinja").exists() or "chat_template" in saved
    assert has_template == (name != "alpaca.json")


def test_packing_decides_the_length_of_an_epoch(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS[:3]))
    config = FinetuneConfig(
        task="lm", model=str(llama), data=str(tmp_path / "a.jsonl"), validation_data=str(tmp_path / "held.jsonl"),
        max_length=200, batch_size=2, epochs=1, threads=1, out=str(tmp_path / "run"), packing=True, device="cpu",
    )  # fmt: skip
    run = Finetuning(config)
    assert run.config.steps == -(-len(run.data.train) // 2)  # type: ignore[attr-defined]
    assert len(run.data.train) < 10  # type: ignore[attr-defined]
    plain = Finetuning(replace(config, packing=False, out=str(tmp_path / "plain")))
    assert plain.config.steps == 15
    assert run.run().val_loss > 0


def key(config: PretrainConfig | FinetuneConfig) -> str:
    return key_of(meaning_of(config, {}))


def test_new_settings_are_in_the_keys_and_their_defaults_are_not(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    base = PretrainConfig(data=str(tmp_path / "a.jsonl"), tokenizer="bytes")
    settings = meaning_of(base, {})["settings"]
    assert not {"text_column", "encoding"} & settings.keys()
    assert len({key(base), key(replace(base, text_column="b")), key(replace(base, encoding="latin-1"))}) == 3
    tuned = FinetuneConfig(task="lm", data=str(tmp_path / "a.jsonl"), tokenizer="bytes", model="llama-tiny")
    settings = meaning_of(tuned, {})["settings"]
    assert not {"encoding", "packing", "learn_prompts", "chat_template"} & settings.keys()
    assert (settings["text_column"], settings["label_column"]) == ("text", "label")
    changes: list[dict[str, Any]] = [
        {"packing": True}, {"learn_prompts": True}, {"encoding": "latin-1"}, {"chat_template": "plain"},
        {"chat_template": str(tmp_path / "own.jinja")},
    ]  # fmt: skip
    keys = {key(tuned), *(key(replace(tuned, **change)) for change in changes)}
    assert len(keys) == 1 + len(changes)
    (tmp_path / "own.jinja").write_text("{{ messages[0] }}")
    assert key(replace(tuned, chat_template=str(tmp_path / "own.jinja"))) not in keys
