"""Sharded checkpoints that are damaged or of something else are refused in one line, and nothing has changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints.sharded_worker import assert_same, snapshot
from torch import nn

import subspan
from subspan.checkpoints import shard_files as shards
from subspan.checkpoints.sharded import damage, load_sharded, save_sharded
from subspan.utils.errors import InputError


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


def refused(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, words: str, kind: type = InputError
) -> None:
    """Check that loading fails with these words in one line, and that nothing has changed."""
    before = snapshot(model, optimizer)
    with pytest.raises(kind, match=words) as caught:
        load_sharded(folder, model, optimizer)
    assert "\n" not in str(caught.value)
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize(
    "file", ["index.json", "model-00000-of-00001.safetensors", "optimizer-00000-of-00001.safetensors"]
)
def test_a_damaged_file(sound: tuple[Path, nn.Module, torch.optim.Optimizer], file: str) -> None:
    """A file has another bit, has lost or gained bytes at its end, is empty, or is missing."""
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
    """Make the index say something else, with the hash that belongs to it."""
    content = json.loads((folder / "index.json").read_text())
    del content["blake2b"]
    change(content)
    (folder / "index.json").write_text(shards._render(content))


def test_a_checkpoint_of_another_world(sound: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    folder, model, optimizer = sound
    stranger = folder / "model-00001-of-00002.safetensors"
    shutil.copy(folder / "model-00000-of-00001.safetensors", stranger)
    refused(
        folder, model, optimizer, f"{stranger.name} is not of this checkpoint, which 1 ranks wrote: two have been mixed"
    )
    stranger.unlink()
    edit(folder, lambda content: content.update(world=2))
    refused(
        folder,
        model,
        optimizer,
        "index.json names 'model-00000-of-00001.safetensors', which is no file .* 2 ranks wrote",
    )
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
    refused(folder, model, optimizer, "index.json names 'first.weight.step', of which the files hold only a part")


def test_another_model(sound: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    folder, _, _ = sound
    wide = Small(width=8)
    refused(
        folder, wide, small_optimizer(wide), r"has 'first.weight' as float32 \(6, 5\), this model as float32 \(8, 5\)"
    )
    half = Small().bfloat16()
    refused(folder, half, small_optimizer(half), r"'first.weight' as float32 \(6, 5\), this model as bfloat16 \(6, 5\)")
    less = nn.Sequential(nn.Linear(5, 6))
    refused(folder, less, small_optimizer(less), "index.json names 'first.weight', which this model does not have")
    more = Small()
    more.third = nn.Linear(2, 2)
    refused(folder, more, small_optimizer(more), "index.json does not name 'third.weight', which this model has")


def test_another_optimizer(sound: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    """Our optimizers say what differs in their own words; for those of torch, class and names are compared."""
    folder, model, _ = sound
    refused(folder, model, small_optimizer(model, "galore_adamw"), "this optimizer is selector Dominant", ValueError)
    refused(folder, model, small_optimizer(model, rank=3), "build the optimizer with the checkpoint's rank", ValueError)
    refused(
        folder, model, torch.optim.AdamW(model.parameters()), "is of the optimizer SubspaceOptimizer, this one is AdamW"
    )
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
    with pytest.raises(
        InputError, match=r"parameter group 0 has a parameter of shape \(6, 5\) that is not the model's"
    ):
        save_sharded(tmp_path / "one", model, torch.optim.AdamW(Small().parameters()))
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.param_groups[0]["generator"] = torch.Generator()
    with pytest.raises(
        InputError, match=r"optimizer: param_groups.0.generator is a Generator; expected tensors, numbers"
    ):
        save_sharded(tmp_path / "one", model, optimizer)
    assert list((tmp_path / "one").iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    model = Small()
    with pytest.raises(InputError, match=r"folder='.*file/one': cannot be made \(Not a directory\)"):
        save_sharded(tmp_path / "file" / "one", model, small_optimizer(model))


def test_a_checkpoint_is_not_written_over(sound: tuple[Path, nn.Module, torch.optim.Optimizer]) -> None:
    folder, model, optimizer = sound
    with pytest.raises(InputError, match="holds a checkpoint; save into an empty folder"):
        save_sharded(folder, model, optimizer)
    assert damage(folder) is None
