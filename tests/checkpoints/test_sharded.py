"""Sharded checkpoints are saved by two ranks and loaded by one to four, equal in every bit."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import sharded_worker
from checkpoints.sharded_worker import (
    AFTER,
    BEFORE,
    OPTIMIZERS,
    assert_same,
    build,
    no_optimizer,
    snapshot,
    tensors,
    train,
)
from safetensors.torch import load_file
from support.processes import launch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import subspan
from subspan.checkpoints import shard_files as shards
from subspan.checkpoints.sharded import load_sharded, save_sharded, save_sharded_async
from subspan.utils.errors import InputError

OURS = {
    "sara_adamw": {},
    "golore_adamw": {"transfer": "rotate"},
    "fira_adamw": {},
    "galore_adafactor": {},
    "sara_adamw_8bit": {},
    "rso_adamw": {},
    "ldadam_adamw": {},
}


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what two ranks have saved. That they meet the unbroken run again is asserted on them."""
    folder = tmp_path_factory.mktemp("sharded")
    launch(sharded_worker.main, 2, "save", str(folder), torchrun=True)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_ranks_then_one_plain_process(saved: Path, name: str) -> None:
    """The first rank holds four of seven rows, the second three."""
    rows = [load_file(saved / name / f"model-0000{rank}-of-00002.safetensors")["blocks.0.up.weight"] for rank in (0, 1)]
    assert [len(part) for part in rows] == [4, 3]
    model, optimizer = build(name, sharded=False, seed=1)
    load_sharded(saved / name, model, optimizer)
    assert_same(snapshot(model, optimizer), torch.load(saved / f"{name}.pt", weights_only=True))
    train(model, optimizer, 1, first=BEFORE)


@pytest.mark.distributed
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_asynchronous_save_is_the_synchronous_one(saved: Path, name: str) -> None:
    """The model was trained on while it was written."""
    one, other = saved / name, saved / f"{name}-async"
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()


@pytest.mark.distributed
@pytest.mark.parametrize("count", [3, 4])
def test_two_ranks_then_more(saved: Path, count: int) -> None:
    """Three ranks load it, and four, also as two copies of two shards. One plain process loads what they save again."""
    launch(sharded_worker.main, count, "load", str(saved))
    for name in OPTIMIZERS:
        for number in range(2 if count == 4 else 1):
            model, optimizer = build(name, sharded=False, seed=1)
            load_sharded(saved / f"{name}-from-{count}-{number}", model, optimizer)
            assert_same(snapshot(model, optimizer), torch.load(saved / f"{name}.pt", weights_only=True))


@pytest.mark.distributed
def test_copies_are_written_once(saved: Path) -> None:
    """Whole tensors are only in the file of the first rank; a rank without rows has no shard of a tensor."""
    first, second = (load_file(saved / "tensors" / f"model-0000{rank}-of-00002.safetensors") for rank in (0, 1))
    assert {"number", "copied"} <= first.keys()
    assert not {"number", "copied", "row", "none"} & second.keys()
    assert first["columns"].shape == (7, 2)


@pytest.mark.distributed
def test_one_rank_is_refused_what_all_are(saved: Path) -> None:
    launch(sharded_worker.main, 2, "refuse", str(saved))
    words = [
        "broken-missing: model-00001-of-00002.safetensors is missing",
        "broken-flipped: model-00001-of-00002.safetensors is damaged",
        "broken-index: index.json is damaged",
        "index.json is of the optimizer AdamW, this one is SGD",
        "full cannot be written: no space is left; it needs about ",
    ]
    messages = [json.loads((saved / f"messages-{rank}.json").read_text()) for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert all(word in message for word, message in zip(words, messages[0], strict=True))


@pytest.mark.distributed
def test_ranks_publish_together(tmp_path: Path) -> None:
    launch(sharded_worker.main, 2, "publishing", str(tmp_path))


@pytest.mark.distributed
def test_a_disk_that_fails_one_rank(tmp_path: Path) -> None:
    """The disk fails at each moment of a checkpoint; other errors are not taken for one of the disk."""
    launch(sharded_worker.main, 2, "full_disk", str(tmp_path))


# --- one process ------------------------------------------------------------------------------------------------------


def llama() -> nn.Module:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2))


def ours(name: str, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return subspan.create(
        name, model, **{"lr": 1e-2, "rank": 48, "update_proj_gap": 2, **OURS.get(name, {}), **settings}
    )


def pretrain(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, first: int) -> None:
    for step in range(first, first + steps):
        ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("name", "ranks"),
    [*((name, {}) for name in OURS), ("sara_adamw", {"rank": 0.25, "rank_pattern": {"q_proj": 32, "down": 0.5}})],
    ids=str,
)
def test_our_optimizers_go_on_as_unbroken(tmp_path: Path, name: str, ranks: dict[str, Any]) -> None:
    model = llama()
    optimizer = ours(name, model, **ranks)
    pretrain(model, optimizer, BEFORE, first=0)
    reference = snapshot(model, optimizer)
    save_sharded(tmp_path / "one", model, optimizer)
    pretrain(model, optimizer, AFTER, first=BEFORE)

    other = llama()
    resumed = ours(name, other, **ranks)
    pretrain(other, resumed, 1, first=50)
    load_sharded(tmp_path / "one", other, resumed)
    assert_same(snapshot(other, resumed), reference)
    pretrain(other, resumed, AFTER, first=BEFORE)
    assert_same(snapshot(other, resumed), snapshot(model, optimizer))


@pytest.mark.parametrize("rank", [8, 0.25])
def test_backward_side_layers_go_on_as_unbroken(tmp_path: Path, rank: float) -> None:
    """Carriers are parameters of the optimizer, but no tensors of the model's state_dict."""

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = llama()
        subspan.project_backward(model, rank=rank)
        return model, ours("golore_adamw", model, rank=rank, transfer="keep")

    model, optimizer = start()
    pretrain(model, optimizer, BEFORE, first=0)
    save_sharded(tmp_path / "one", model, optimizer)
    pretrain(model, optimizer, AFTER, first=BEFORE)
    other, resumed = start()
    load_sharded(tmp_path / "one", other, resumed)
    pretrain(other, resumed, AFTER, first=BEFORE)
    assert_same(snapshot(other, resumed), snapshot(model, optimizer))


def test_names_in_the_files(tmp_path: Path) -> None:
    """Names are parameter names, by which other programs and later versions read."""
    model = llama()
    optimizer = ours("sara_adamw_8bit", model)
    pretrain(model, optimizer, 1, first=0)
    save_sharded(tmp_path / "one", model, optimizer)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        "index.json",
        "model-00000-of-00001.safetensors",
        "optimizer-00000-of-00001.safetensors",
    }
    held = load_file(tmp_path / "one" / "optimizer-00000-of-00001.safetensors")
    dtypes = {name: str(value.dtype) for name, value in held.items() if "mlp.gate_proj" in name or "model.norm" in name}
    assert dtypes == {
        "model.layers.0.mlp.gate_proj.weight.step": "torch.float32",
        "model.layers.0.mlp.gate_proj.weight.exp_avg.codes": "torch.uint8",
        "model.layers.0.mlp.gate_proj.weight.exp_avg.absmax": "torch.float32",
        "model.layers.0.mlp.gate_proj.weight.exp_avg_sq.codes": "torch.uint8",
        "model.layers.0.mlp.gate_proj.weight.exp_avg_sq.absmax": "torch.float32",
        "model.layers.0.mlp.gate_proj.weight.basis": "torch.float32",
        "model.norm.weight.step": "torch.float32",
        "model.norm.weight.exp_avg": "torch.float32",
        "model.norm.weight.exp_avg_sq": "torch.float32",
    }
    content = json.loads((tmp_path / "one" / "index.json").read_text())
    assert content["settings"]["state"]["model.layers.0.mlp.gate_proj.weight"]["dict"]["refresh_step"] == 0
    assert set(load_file(tmp_path / "one" / "model-00000-of-00001.safetensors")) == set(model.state_dict())


def test_settings_keep_their_kinds(tmp_path: Path) -> None:
    """A learning rate that is a tensor, tuples, infinity, and keys of other libraries come back as they were."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1), betas=(0.5, 0.75))
    foreign = {
        "nested": {"tuple": (1, [2.5, None]), "value": torch.tensor([1, 2])},
        "infinite": float("-inf"),
        "flag": True,
    }
    optimizer.param_groups[0] |= foreign
    save_sharded(tmp_path / "one", model, optimizer)
    other = nn.Linear(3, 2)
    resumed = torch.optim.AdamW(other.parameters(), lr=torch.tensor(0.3))
    load_sharded(tmp_path / "one", other, resumed)
    group = resumed.param_groups[0]
    assert torch.equal(group["lr"], torch.tensor(0.1))
    assert group["betas"] == (0.5, 0.75)
    assert group["nested"]["tuple"] == (1, [2.5, None])
    assert torch.equal(group["nested"]["value"], torch.tensor([1, 2]))
    assert (group["infinite"], group["flag"]) == (float("-inf"), True)


def test_every_dtype_in_one_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = tensors(lambda value, dim: value)
    save_sharded(tmp_path / "one", module, no_optimizer())
    other = tensors(lambda value, dim: torch.zeros_like(value))
    load_sharded(tmp_path / "one", other, no_optimizer())
    for key, value in module.state_dict().items():
        got = other.state_dict()[key]
        assert (got.dtype, got.tolist()) == (value.dtype, value.tolist()), key


def test_training_goes_on_while_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer is held back until the model has moved; what it writes is what the model was."""
    model, optimizer = build("adamw", sharded=False)
    train(model, optimizer, 1, first=0)
    save_sharded(tmp_path / "synchronous", model, optimizer)
    gate, real = threading.Event(), shards.save_file

    def held(*arguments: Any, **keywords: Any) -> None:
        assert gate.wait(60)
        real(*arguments, **keywords)

    monkeypatch.setattr(shards, "save_file", held)
    pending = save_sharded_async(tmp_path / "asynchronous", model, optimizer)
    train(model, optimizer, 2, first=1)
    assert not pending.done()
    assert list((tmp_path / "asynchronous").iterdir()) == []
    gate.set()
    pending.wait()
    pending.wait()
    for path in (tmp_path / "synchronous").iterdir():
        assert path.read_bytes() == (tmp_path / "asynchronous" / path.name).read_bytes()


def test_what_the_writer_meets_is_raised_by_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    pending = save_sharded_async(tmp_path / "one", *build("adamw", sharded=False))
    with pytest.raises(
        InputError, match=rf"checkpoint {tmp_path / 'one'} cannot be written: no space is left; it needs about .* kB, "
    ):
        pending.wait()
    with pytest.raises(InputError, match="cannot be written"):
        pending.wait()
    assert list((tmp_path / "one").iterdir()) == []
