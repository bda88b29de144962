"""Sharded checkpoints: saved by two ranks, loaded by one, two, three and four, equal in every bit; damage is refused."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training import sharded_worker
from training.sharded_worker import AFTER, BEFORE, OPTIMIZERS, assert_same, build, no_optimizer, snapshot, tensors, train
from transformers import LlamaConfig, LlamaForCausalLM

import subspan
from subspan.training import publish, shards
from subspan.training.errors import InputError
from subspan.training.sharded import damage, load_sharded, save_sharded, save_sharded_async

OURS = {
    "sara_adamw": {},
    "golore_adamw": {"transfer": "rotate"},
    "fira_adamw": {},
    "galore_adafactor": {},
    "sara_adamw_8bit": {},
    "rso_adamw": {},
    "ldadam_adamw": {},
}


def launch(count: int, scenario: str, folder: Path) -> None:
    """Run a scenario of the worker on ``count`` ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, sharded_worker.__file__, scenario, str(folder)], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have saved. On them the unbroken run is met again, and that is asserted there."""
    folder = tmp_path_factory.mktemp("sharded")
    launch(2, "save", folder)
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
    """The model trained on while it was written."""
    one, other = saved / name, saved / f"{name}-async"
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()


@pytest.mark.distributed
@pytest.mark.parametrize("count", [3, 4])
def test_two_ranks_then_more(saved: Path, count: int) -> None:
    """Compared on each rank there; four also as two copies of two shards. What they save again, one plain process loads."""
    launch(count, "load", saved)
    for name in OPTIMIZERS:
        for number in range(2 if count == 4 else 1):
            model, optimizer = build(name, sharded=False, seed=1)
            load_sharded(saved / f"{name}-from-{count}-{number}", model, optimizer)
            assert_same(snapshot(model, optimizer), torch.load(saved / f"{name}.pt", weights_only=True))


@pytest.mark.distributed
def test_copies_are_written_once(saved: Path) -> None:
    """What no rank has a part of is in the file of the first alone; a rank without rows has no part of the tensor."""
    first, second = (load_file(saved / "tensors" / f"model-0000{rank}-of-00002.safetensors") for rank in (0, 1))
    assert {"number", "copied"} <= first.keys()
    assert not {"number", "copied", "row", "none"} & second.keys()
    assert first["columns"].shape == (7, 2)


@pytest.mark.distributed
def test_one_rank_is_refused_what_all_are(saved: Path) -> None:
    launch(2, "refuse", saved)
    words = [
        "broken-missing: model-00001-of-00002.safetensors is missing",
        "broken-flipped: model-00001-of-00002.safetensors is damaged",
        "broken-index: index.json is damaged",
        "index.json is of the optimizer AdamW, this one is SGD",
        "model-00001-of-00002.safetensors cannot be written: [Errno 28] No space left on device",
    ]
    messages = [json.loads((saved / f"messages-{rank}.json").read_text()) for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert all(word in message for word, message in zip(words, messages[0], strict=True))


@pytest.mark.distributed
def test_ranks_publish_together(tmp_path: Path) -> None:
    launch(2, "publishing", tmp_path)


# --- one process ------------------------------------------------------------------------------------------------------


def llama() -> nn.Module:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2))


def ours(name: str, model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return subspan.create(name, model, **{"lr": 1e-2, "rank": 48, "update_proj_gap": 2, **OURS.get(name, {}), **settings})


def pretrain(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, first: int) -> None:
    for step in range(first, first + steps):
        ids = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OURS)
def test_our_optimizers_go_on_as_unbroken(tmp_path: Path, name: str) -> None:
    if name.endswith("8bit"):
        pytest.importorskip("bitsandbytes")
    model = llama()
    optimizer = ours(name, model)
    pretrain(model, optimizer, BEFORE, first=0)
    reference = snapshot(model, optimizer)
    save_sharded(tmp_path / "one", model, optimizer)
    pretrain(model, optimizer, AFTER, first=BEFORE)

    other = llama()
    resumed = ours(name, other)
    pretrain(other, resumed, 1, first=50)
    load_sharded(tmp_path / "one", other, resumed)
    assert_same(snapshot(other, resumed), reference)
    pretrain(other, resumed, AFTER, first=BEFORE)
    assert_same(snapshot(other, resumed), snapshot(model, optimizer))


def test_backward_side_layers_go_on_as_unbroken(tmp_path: Path) -> None:
    """Their carriers are parameters of the optimizer, and no tensors of the model's state_dict."""

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = llama()
        subspan.project_backward(model, rank=8)
        return model, ours("golore_adamw", model, rank=8, transfer="keep")

    model, optimizer = start()
    pretrain(model, optimizer, BEFORE, first=0)
    save_sharded(tmp_path / "one", model, optimizer)
    pretrain(model, optimizer, AFTER, first=BEFORE)
    other, resumed = start()
    load_sharded(tmp_path / "one", other, resumed)
    pretrain(other, resumed, AFTER, first=BEFORE)
    assert_same(snapshot(other, resumed), snapshot(model, optimizer))


def test_names_in_the_files(tmp_path: Path) -> None:
    """Names are parameter names: they are what other programs, and later versions, read by."""
    pytest.importorskip("bitsandbytes")
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
    described = {name: f"{value.dtype} {tuple(value.shape)}" for name, value in held.items()}
    assert {name: text for name, text in described.items() if "mlp.gate_proj" in name or "model.norm" in name} == {
        "model.layers.0.mlp.gate_proj.weight.step": "torch.float32 ()",
        "model.layers.0.mlp.gate_proj.weight.exp_avg.codes": "torch.uint8 (96, 48)",
        "model.layers.0.mlp.gate_proj.weight.exp_avg.absmax": "torch.float32 (18,)",
        "model.layers.0.mlp.gate_proj.weight.exp_avg_sq.codes": "torch.uint8 (96, 48)",
        "model.layers.0.mlp.gate_proj.weight.exp_avg_sq.absmax": "torch.float32 (18,)",
        "model.layers.0.mlp.gate_proj.weight.basis": "torch.float32 (64, 48)",
        "model.norm.weight.step": "torch.float32 ()",
        "model.norm.weight.exp_avg": "torch.float32 (64,)",
        "model.norm.weight.exp_avg_sq": "torch.float32 (64,)",
    }
    content = json.loads((tmp_path / "one" / "index.json").read_text())
    assert content["settings"]["state"]["model.layers.0.mlp.gate_proj.weight"]["dict"]["refresh_step"] == 0
    assert set(load_file(tmp_path / "one" / "model-00000-of-00001.safetensors")) == set(model.state_dict())


def test_settings_keep_their_kinds(tmp_path: Path) -> None:
    """A tensor as learning rate, tuples, numbers that are none, and keys of other libraries."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1), betas=(0.5, 0.75))
    foreign = {"nested": {"tuple": (1, [2.5, None]), "value": torch.tensor([1, 2])}, "infinite": float("-inf"), "flag": True}
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
    with pytest.raises(InputError, match=r"model-00000-of-00001.safetensors cannot be written: .*No space left on device"):
        pending.wait()
    assert damage(tmp_path / "one") is not None


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sound(tmp_path: Path) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
    """A checkpoint of an optimizer of ours, and others to load it into."""
    model = Small()
    optimizer = small_optimizer(model)
    small_step(model, optimizer)
    save_sharded(tmp_path / "one", model, optimizer)
    other = Small()
    return tmp_path / "one", other, small_optimizer(other)


class Small(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, width), nn.Linear(width, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def small_optimizer(model: nn.Module, name: str = "sara_adamw", **settings: Any) -> torch.optim.Optimizer:
    return subspan.create(name, model, **{"lr": 1e-2, "rank": 2, **settings})


def small_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(3, 5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def refused(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, words: str, kind: type = InputError) -> None:
    """The words are those of one line, and nothing has changed."""
    before = snapshot(model, optimizer)
    with pytest.raises(kind, match=words) as caught:
        load_sharded(folder, model, optimizer)
    assert "\n" not in str(caught.value)
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("file", ["index.json", "model-00000-of-00001.safetensors", "optimizer-00000-of-00001.safetensors"])
def test_a_damaged_file(sound: tuple[Path, nn.Module, torch.optim.Optimizer], file: str) -> None:
    """One bit at any of many offsets, an end cut off or added to, nothing left, no file."""
    folder, model, optimizer = sound
    path = folder / file
    data = path.read_bytes()
    offsets = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:60].tolist()
    for place in [0, 7, 8, len(data) - 1, *offsets]:
        for bit in (1, 16):
            path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
            refused(folder, model, optimizer, f"checkpoint {folder}: {file} is damaged")
            assert damage(folder).startswith(f"{file} is damaged")
    for cut in (data[:-1], data[: len(data) // 2], b"", data + b" "):
        path.write_bytes(cut)
        refused(folder, model, optimizer, f"{file} (is damaged|has {len(cut):,} bytes, was written with {len(data):,})")
    path.unlink()
    refused(folder, model, optimizer, f"{file} (is missing|cannot be read .No such file or directory.)")
    path.write_bytes(data)
    assert damage(folder) is None
    load_sharded(folder, model, optimizer)


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """An index that says something else, and has its hash."""
    content = json.loads((folder / "index.json").read_text())
    del content["blake2b"]
    change(content)
    (folder / "index.json").write_text(shards._render(content))


def test_a_checkpoint_of_another_world(sound: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    folder, model, optimizer = sound
    stranger = folder / "model-00001-of-00002.safetensors"
    shutil.copy(folder / "model-00000-of-00001.safetensors", stranger)
    refused(folder, model, optimizer, f"{stranger.name} is not of this checkpoint, which 1 ranks wrote: two have been mixed")
    stranger.unlink()
    edit(folder, lambda content: content.update(world=2))
    refused(folder, model, optimizer, "index.json names 'model-00000-of-00001.safetensors', which is no file .* 2 ranks wrote")
    edit(folder, lambda content: content.update(world=1, format=9))
    refused(folder, model, optimizer, "index.json has format 9, expected 1")
    edit(folder, lambda content: content.update(format=1, files={"../one/model-00000-of-00001.safetensors": {}}))
    (folder / "model-00000-of-00001.safetensors").unlink()
    (folder / "optimizer-00000-of-00001.safetensors").unlink()
    refused(folder, model, optimizer, "which is no file of a checkpoint")


def test_a_part_that_no_file_holds(sound: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    folder, model, optimizer = sound
    edit(folder, lambda content: content["files"].pop("optimizer-00000-of-00001.safetensors"))
    (folder / "optimizer-00000-of-00001.safetensors").unlink()
    refused(folder, model, optimizer, "index.json names 'first.weight.step', of which the files hold a part only")


def test_another_model(sound: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    folder, _, _ = sound
    wide = Small(width=8)
    refused(folder, wide, small_optimizer(wide), r"has 'first.weight' as float32 \(6, 5\), this model as float32 \(8, 5\)")
    half = Small().bfloat16()
    refused(folder, half, small_optimizer(half), r"'first.weight' as float32 \(6, 5\), this model as bfloat16 \(6, 5\)")
    less = nn.Sequential(nn.Linear(5, 6))
    refused(folder, less, small_optimizer(less), "index.json names 'first.weight', which this model does not have")
    more = Small()
    more.third = nn.Linear(2, 2)
    refused(folder, more, small_optimizer(more), "index.json does not name 'third.weight', which this model has")


def test_another_optimizer(sound: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    """Ours says what differs in its own words; of torch's, which see nothing, the class and the names are compared."""
    folder, model, _ = sound
    refused(folder, model, small_optimizer(model, "galore_adamw"), "this optimizer is selector Dominant", ValueError)
    refused(folder, model, small_optimizer(model, rank=3), "build the optimizer with the checkpoint's rank", ValueError)
    refused(folder, model, torch.optim.AdamW(model.parameters()), "is of the optimizer SubspaceOptimizer, this one is AdamW")
    part = small_optimizer(model.first)
    refused(folder, model, part, "parameter groups of", ValueError)


def test_torchs_optimizers_are_compared_by_name(tmp_path: Path) -> None:
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters())
    small_step(model, optimizer)
    save_sharded(tmp_path / "one", model, optimizer)
    backwards = torch.optim.AdamW(list(model.parameters())[::-1])
    refused(tmp_path / "one", model, backwards, "parameter 'first.weight' where this optimizer has 'second.weight'")
    split = torch.optim.AdamW([{"params": [p]} for p in model.parameters()])
    refused(tmp_path / "one", model, split, "different number of parameter groups", ValueError)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    refused(tmp_path / "one", model, sgd, "is of the optimizer AdamW, this one is SGD")


def test_a_strange_optimizer_is_not_saved(tmp_path: Path) -> None:
    model = Small()
    with pytest.raises(InputError, match=r"parameter group 0 has a parameter of shape \(6, 5\) that is not the model's"):
        save_sharded(tmp_path / "one", model, torch.optim.AdamW(Small().parameters()))
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.param_groups[0]["generator"] = torch.Generator()
    with pytest.raises(InputError, match=r"optimizer: param_groups.0.generator is a Generator; expected tensors, numbers"):
        save_sharded(tmp_path / "one", model, optimizer)
    assert list((tmp_path / "one").iterdir()) == []


def test_a_checkpoint_is_not_written_over(sound: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    folder, model, optimizer = sound
    with pytest.raises(InputError, match="holds a checkpoint; save into an empty folder"):
        save_sharded(folder, model, optimizer)
    assert damage(folder) is None


def test_publishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest stand, and those of a later step; a failure leaves them, and no half checkpoint."""
    for step in (1, 2, 30, 3):
        scratch = publish.open_scratch(tmp_path)
        (scratch / "file").write_text(str(step))
        assert publish.publish(scratch, step=step, keep=2) == tmp_path / f"step-{step:06d}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003", "step-000030"]
    scratch = publish.open_scratch(tmp_path)
    (scratch / "left by a kill").touch()
    assert list(publish.open_scratch(tmp_path).iterdir()) == []

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish, "replace_directory", full)
    with pytest.raises(InputError, match=r"step-000004 cannot be written: .*No space left"):
        publish.publish(scratch, step=4, keep=2)
    assert not (tmp_path / "step-000004").exists()
