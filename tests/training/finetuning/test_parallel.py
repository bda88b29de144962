"""Fine-tuning on two ranks computes what one process computes, and leaves one best checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.labelled import examples, write_jsonl
from support.launching import launch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from subspan.cli import main
from subspan.training.monitor.metrics import read_metrics

pytestmark = pytest.mark.distributed
KEYS = ("step", "tokens", "loss", "grad_norm", "lr", "val_loss", "accuracy", "val_ppl")
CASES: dict[str, dict[str, Any]] = {
    # With SGD, because AdamW turns rounding into steps where a gradient is zero, as in the biases of attention's keys.
    # With drawn bases, because singular vectors of small singular values move a thousand times as far as the rounding.
    "ddp": {"parallel": "ddp", "micro_batch_size": 2, "optimizer": "golore_sgd", "lr": 0.05},
    "ddp-backward": {"parallel": "ddp", "optimizer": "golore_sgd", "lr": 0.05, "backward_side": "true"},
    "ddp-lora": {"parallel": "ddp", "optimizer": "adamw", "lora.rank": 2},
    "ddp-lm": {"parallel": "ddp", "task": "lm", "model": "llama"},
    "fsdp": {"parallel": "fsdp", "optimizer": "golore_sgd", "lr": 0.05, "optim.proj_type": "right"},
    "fsdp-still": {"parallel": "fsdp", "optimizer": "golore_sgd", "lr": 0.0, "optim.proj_type": "right"},
    "fsdp-lm": {"parallel": "fsdp", "task": "lm", "model": "llama", "optim.proj_type": "right"},
}


def out_of(arguments: list[str]) -> str:
    return next(word.partition("=")[2] for word in arguments if word.startswith("--out"))


@pytest.fixture(scope="module")
def two_ranks(bert: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The arguments of each case. Two ranks have run it into ``OUT-2``."""
    folder = tmp_path_factory.mktemp("two")
    still = AutoModel.from_pretrained(bert)  # other ranks draw other dropout
    still.config.hidden_dropout_prob = still.config.attention_probs_dropout_prob = 0.0
    still.save_pretrained(folder / "bert")
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder / "bert")
    train, held = (
        write_jsonl(folder / "train.jsonl", examples(48, 0)),
        write_jsonl(folder / "held.jsonl", examples(18, 1)),
    )
    common = {"task": "classification", "data": train, "validation_data": held, "optimizer": "sara_adamw", "steps": 12,
              "batch_size": 8, "max_length": 24, "lr": 1e-2, "scale": 1.0, "rank": 4, "update_proj_gap": 5, "log_every": 1,
              "threads": 1, "device": "cpu", "evaluation.every": 3}  # fmt: skip
    runs = {}
    for name, more in CASES.items():
        given = common | {"out": folder / name} | more
        given["model"] = llama if given.get("model") == "llama" else folder / "bert"
        runs[name] = ["finetune", *(f"--{key}={value}" for key, value in given.items())]
    alone = {name: [word for word in run if not word.startswith("--parallel")] for name, run in runs.items()}
    done = launch(2, *([*run, f"--out={folder / name}-2", "--json"] for name, run in runs.items()))
    assert done.returncode == 0, done.stderr
    return alone


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_compute_what_one_process_computes(name: str, two_ranks: dict[str, list[str]]) -> None:
    assert main(two_ranks[name]) == 0
    out = out_of(two_ranks[name])
    one, two = (
        [{key: row[key] for key in KEYS if key in row} for row in read_metrics(Path(p))] for p in (out, f"{out}-2")
    )
    assert [row["step"] for row in two if "loss" in row] == list(range(1, 13))
    assert len(one) == len(two)
    for ours, theirs in zip(one, two, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)
    summaries = [json.loads(Path(p, "summary.json").read_text()) for p in (out, f"{out}-2")]
    assert summaries[0]["best_step"] == summaries[1]["best_step"]
    assert Path(summaries[1]["best"]).is_dir()


@pytest.mark.parametrize("name", CASES)
def test_the_best_loads_with_transformers(name: str, two_ranks: dict[str, list[str]]) -> None:
    """Whatever the ranks have saved, the best is a plain model with the weights of a single process's best and the
    scores of the summary.
    """
    out = out_of(two_ranks[name])
    if not Path(out).exists():
        assert main(two_ranks[name]) == 0
    one, two = (json.loads(Path(p, "summary.json").read_text()) for p in (out, f"{out}-2"))
    kind = AutoModelForCausalLM if name.endswith("lm") else AutoModelForSequenceClassification
    theirs, model = (kind.from_pretrained(summary["best"]).eval() for summary in (one, two))
    assert model.config.architectures == [type(model).__name__]
    assert model.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():  # AdamW moves weights by steps of 1e-2
        assert model.state_dict()[key].numpy() == pytest.approx(value.numpy(), abs=1e-3), key
    if name.endswith("lm"):
        return
    tokenizer = AutoTokenizer.from_pretrained(two["best"])
    held = next(word.partition("=")[2] for word in two_ranks[name] if word.startswith("--validation_data"))
    rows = [json.loads(line) for line in Path(held).read_text().splitlines()]
    said = [int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()) for row in rows]
    right = sum(model.config.id2label[label] == row["label"] for label, row in zip(said, rows, strict=True))
    assert right / len(rows) == two["accuracy"]


def test_a_best_checkpoint_of_ranks_is_put_together_by_one_process(two_ranks: dict[str, list[str]]) -> None:
    """Without learning the first evaluation stays the best. Its checkpoint holds parts, also for a single process that
    ends the run.
    """
    out = f"{out_of(two_ranks['fsdp-still'])}-2"
    folder = Path(out)
    best = json.loads((folder / "summary.json").read_text())["best"]
    assert best == str(folder / "model")
    shutil.rmtree(best)
    assert main([*two_ranks["fsdp-still"], f"--out={out}", "--parallel=none", "--resume=auto"]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["best_step"] == 3 < summary["steps"]
    assert AutoModelForSequenceClassification.from_pretrained(summary["best"]).config.id2label == {0: "neg", 1: "pos"}
