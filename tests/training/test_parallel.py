"""Runs of several processes compute what one process computes, save what it saves, and end together."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launching import launch, same, settings, weights
from support.small_runs import documents
from transformers import AutoModelForCausalLM

from subspan.cli import main
from subspan.training.config.resolve import resolve
from subspan.training.config.settings import PretrainConfig
from subspan.training.data.batches import Batch
from subspan.training.data.streams import TokenStream
from subspan.training.data.tokenizer import load_tokenizer
from subspan.training.models.blocks import blocks_of
from subspan.training.models.build import build_model
from subspan.training.monitor.metrics import read_metrics
from subspan.training.pretraining import Pretraining
from subspan.training.processes import ALONE, Processes, join
from subspan.utils.errors import InputError

Make = Callable[..., PretrainConfig]
distributed = pytest.mark.distributed


def short_documents(folder: Path) -> str:
    """A local copy of C4 whose documents have from one token to more than a sequence."""
    folder.mkdir()
    for name, count in (("c4-train.00000-of-01024", 90), ("c4-validation.00000-of-00008", 7)):
        with gzip.open(folder / f"{name}.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": "ab" + "x y " * (i * i % 11)}) + "\n" for i in range(count))
    return f"c4:{folder}"


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {"optimizer": "adamw", "micro_batch_size": 1}),
    "ddp-sara": ("ddp", {"optimizer": "sara_adamw"}),
    "ddp-golore": ("ddp", {"optimizer": "golore_adamw"}),
    "ddp-backward-side": ("ddp", {"optimizer": "sara_adamw", "backward_side": "true"}),
    "ddp-padded": ("ddp", {"optimizer": "adamw", "packing": "false", "data": "short"}),
    "fsdp": ("fsdp", {"optimizer": "adamw", "micro_batch_size": 1}),
    "fsdp-sara": ("fsdp", {"optimizer": "sara_adamw", "optim.proj_type": "right"}),
    "fsdp-backward": ("fsdp", {"optimizer": "golore_adamw", "backward_side": "true"}),
    "fsdp-padded": ("fsdp", {"optimizer": "adamw", "packing": "false", "data": "short"}),
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The settings of each case. Two ranks have run it into ``OUT-2``."""
    folder = tmp_path_factory.mktemp("two")
    data = {"short": short_documents(folder / "c4"), "": documents(folder / "corpus.jsonl")}
    runs = {}
    for name, (_, more) in CASES.items():
        given = more | {"data": data[more.get("data", "")], "steps": 20, "evaluation.every": 5}
        runs[name] = settings(given.pop("data"), folder / name, **given)
    asked = ([*runs[name], f"--out={folder / name}-2", f"--parallel={CASES[name][0]}", "--json"] for name in CASES)
    done = launch(2, *asked, torchrun=True)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["out"] for line in done.stdout.splitlines()] == [f"{folder / name}-2" for name in CASES]
    assert done.stderr.count("step 20/20") == len(CASES), "only rank 0 speaks"
    return runs


@distributed
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_compute_what_one_process_computes(name: str, two_ranks: dict[str, list[str]]) -> None:
    """Losses, norms and validation losses agree over twenty steps that cross refreshes, and each is logged once."""
    assert main(two_ranks[name]) == 0
    out = next(word.partition("=")[2] for word in two_ranks[name] if word.startswith("--out"))
    keys = ("step", "tokens", "loss", "grad_norm", "lr", "val_loss")
    one, two = (
        [{key: row[key] for key in keys if key in row} for row in read_metrics(Path(p))] for p in (out, f"{out}-2")
    )
    assert [row["step"] for row in two if "loss" in row] == list(range(1, 21))
    assert len(one) == len(two)
    for ours, theirs in zip(one, two, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5)


@distributed
def test_gradients_are_sent_once_a_step(two_ranks: dict[str, list[str]]) -> None:
    """The number of micro-batches does not matter, and backward-side layers send little."""
    outs = [
        word.partition("=")[2] for name in ("ddp", "ddp-backward-side") for word in two_ranks[name] if "--out" in word
    ]
    whole, small = (int(Path(f"{out}-2", "sent").read_text()) for out in outs)
    model = build_model("llama-nano", load_tokenizer("bytes"), 16, seed=0)
    assert whole == 20 * sum(4 * p.numel() for p in model.parameters())
    assert small < whole / 3


def test_padding_leaves_the_ranks_with_different_numbers_of_tokens(tmp_path: Path) -> None:
    """Without this the padded cases above would show nothing."""
    stream = TokenStream(short_documents(tmp_path / "c4"), load_tokenizer("bytes"), 16, 80, packing=False)
    batches = [stream.next_batch(4) for _ in range(20)]
    assert sum(batch.part(0, 2).tokens() != batch.part(1, 2).tokens() for batch in batches) > 10


@distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_checkpoint_goes_on_with_any_number_of_ranks(ranks: int, corpus: Path, tmp_path: Path) -> None:
    """As many ranks go on bit for bit, with dropout too; one process goes on as far as rounding allows."""
    more: dict[str, Any] = {"optimizer": "sara_adamw", "batch_size": 12}
    if ranks == 2:
        model = build_model("llama-nano", load_tokenizer("bytes"), 16, seed=0)
        model.config.attention_dropout = 0.3
        model.save_pretrained(tmp_path / "model")
        more |= {"model": tmp_path / "model", "tokenizer": "bytes"}
    run, again = ([*settings(corpus, tmp_path / name, **more), "--parallel=ddp"] for name in ("run", "again"))
    done = launch(ranks, run, [*again, f"--resume={tmp_path}/run/checkpoints/step-000004"])
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path / "run", 12), weights(tmp_path / "again", 12))
    resume = f"--resume={tmp_path}/run/checkpoints/step-000008"
    assert main([*settings(corpus, tmp_path / "one", **more), resume]) == 0
    first, second = (read_metrics(tmp_path / name)[-1]["val_loss"] for name in ("run", "one"))
    assert second == pytest.approx(first, rel=1e-5 if ranks == 3 else 0.1)  # other ranks, other dropout


SHARDED = [{"optimizer": "adamw"}, {"optimizer": "sara_adamw", "optim.proj_type": "right"}]


@distributed
@pytest.mark.parametrize("more", SHARDED, ids=["adamw", "sara"])
def test_a_sharded_run_goes_on(corpus: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    """As many ranks go on bit for bit. One process goes on too, and leaves a plain checkpoint that no sharded run can
    continue.
    """
    run, again = (settings(corpus, tmp_path / name, **more) for name in ("run", "again"))
    resume = f"--resume={tmp_path}/run/checkpoints/step-000004"
    done = launch(2, [*run, "--parallel=fsdp"], [*again, "--parallel=fsdp", resume])
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run" / "checkpoints" / "unfinished").exists()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    for name in ("run", "again"):
        assert main([*settings(corpus, tmp_path / name, **more), "--resume=auto"]) == 0
    assert same(weights(tmp_path / "run", 12), weights(tmp_path / "again", 12))
    assert same(weights(tmp_path / "run", 12), whole)
    assert not (tmp_path / "run" / "model").exists(), "the checkpoint is plain now"
    one = settings(corpus, tmp_path / "one", **more)
    assert main([*one, "--parallel=none", f"--resume={tmp_path}/run/checkpoints/step-000008"]) == 0
    first, second = (read_metrics(tmp_path / name)[-1]["val_loss"] for name in ("run", "one"))
    assert second == pytest.approx(first, rel=1e-5)
    done = launch(2, [*run, "--parallel=fsdp", "--resume=auto"])
    assert done.returncode != 0
    assert "holds the whole model in one file; continue it with --parallel ddp or in one process" in done.stderr


@distributed
@pytest.mark.parametrize("name", ["training.pt", "model-00001-of-00002.safetensors", "index.json"])
def test_a_damaged_shard_is_passed_over(
    tmp_path: Path, name: str, two_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on from the checkpoint before the newest, whatever file of the newest is damaged."""
    shutil.copytree(two_shards, tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / "step-000012" / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    arguments = settings(two_shards.parent / "corpus.jsonl", tmp_path / "run", **SHARDED[1])
    assert main([*arguments, "--resume=auto"]) == 0
    said = capsys.readouterr().err
    assert f"step-000012 ({name}" in said
    assert "step-000008 is sound" in said


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two ranks under FSDP."""
    folder = tmp_path_factory.mktemp("shards")
    done = launch(2, [*settings(documents(folder / "corpus.jsonl"), folder / "run", **SHARDED[1]), "--parallel=fsdp"])
    assert done.returncode == 0, done.stderr
    return folder / "run"


@distributed
def test_a_signal_to_one_rank_stops_all_at_one_step(corpus: Path, tmp_path: Path) -> None:
    arguments = settings(corpus, tmp_path / "run", **{"checkpoint.every": 100})
    done = launch(2, [*arguments, "--parallel=ddp"], what="terminate", step=7, torchrun=True)
    assert done.returncode != 0
    assert done.stderr.count("subspan: SIGTERM: saved at step 7") == 1
    assert "torchrun --nproc-per-node 2 -m subspan pretrain --config" in done.stderr
    assert "exitcode  : 143" in done.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000007"]
    assert main([*arguments, "--resume=auto"]) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == list(range(1, 13))


ENDS = {
    "bad data": ["subspan: error: data 'moon': is made of cheese; expected stone"],
    "bug": ["subspan: error: rank 1 failed: ZeroDivisionError: a mistake of ours; the traceback is in "],
    "kill": ["rank 0 has lost another process", "repeat the command with --resume auto", "SIGKILL"],
}


@distributed
@pytest.mark.parametrize("what", ENDS)
def test_a_rank_that_ends_ends_the_job(what: str, corpus: Path, tmp_path: Path) -> None:
    """There is one message, from the rank that knows most, and no hang. What was saved is continued."""
    arguments = settings(corpus, tmp_path / "run")
    done = launch(2, [*arguments, "--parallel=ddp"], what=what, step=7, torchrun=what == "kill")
    assert done.returncode != 0
    for word in ENDS[what]:
        assert word in done.stderr
    assert done.stderr.count("subspan: ") == 1, done.stderr
    assert not (tmp_path / "run" / "summary.json").exists()
    assert main([*arguments, "--resume=auto"]) == 0


@distributed
def test_divergence_is_reported_once(corpus: Path, tmp_path: Path) -> None:
    extra = {"optimizer": "adamw", "lr": 1e30, "schedule.warmup_steps": 0}
    done = launch(2, [*settings(corpus, tmp_path / "run", **extra), "--parallel=ddp"])
    assert done.returncode != 0
    assert done.stderr.count("the run diverged") == 1
    assert "Traceback" not in done.stderr.partition("the run diverged")[0]


# --- in one process ---------------------------------------------------------------------------------------------------


def test_torchrun_without_a_mode_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as status:
        main(settings(corpus, tmp_path / "run"))
    assert status.value.code == 2
    words = "parallel='none': torchrun has started 2 processes; say how they share the work with --parallel ddp"
    assert words in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first has said it
    with pytest.raises(SystemExit):
        main(settings(corpus, tmp_path / "run"))
    assert capsys.readouterr().err == ""


def test_a_batch_must_divide(small: Make) -> None:
    with pytest.raises(InputError, match="batch_size=4: expected a multiple of the 3 processes"):
        Pretraining(small(), Processes("ddp", 0, 3))


@pytest.mark.parametrize("mode", ["ddp", "none", None])
def test_without_torchrun_there_is_one_rank(mode: Any, small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes = join(mode, "cpu")
    assert (processes.rank, processes.size, processes.first, processes.sharded) == (0, 1, True, False)
    assert Pretraining(small(parallel=mode), processes).run().steps == 12


def test_a_sharded_run_says_which_side_it_compresses(small: Make) -> None:
    """A run that goes on in one process then compresses the same side."""
    assert resolve(small(parallel="fsdp")).optim.proj_type == "right"
    assert resolve(small(parallel="ddp")).optim.proj_type == "std"


def test_parts_of_a_batch_are_all_of_it() -> None:
    ids = torch.arange(24).view(6, 4)
    batch = Batch(ids, ids + 1)
    parts = [batch.part(rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([part.inputs for part in parts]), batch.inputs)
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    assert (batch.tokens(), batch.ignored().tokens()) == (24, 0)


def test_blocks() -> None:
    model: Any = build_model("llama-nano", load_tokenizer("bytes"), 16, seed=0)
    blocks = [type(block).__name__ for block in blocks_of(model)]
    assert blocks == ["LlamaDecoderLayer"] * 4
    model._no_split_modules = None
    assert [type(block).__name__ for block in blocks_of(model)] == blocks


def test_alone_says_and_hears_itself() -> None:
    assert (ALONE.sum(1.5), ALONE.largest(3), ALONE.from_first(lambda: ["a", None]), ALONE.speaks()) == (
        1.5,
        3,
        ["a", None],
        True,
    )
