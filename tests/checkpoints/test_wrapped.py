"""What wraps a model, or a layer of it, does not change the names in a checkpoint."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints.sharded_worker import assert_same, whole
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

import subspan
from subspan.checkpoints import shard_files as shards
from subspan.checkpoints.directory import load_weights
from subspan.checkpoints.sharded import load_sharded, save_sharded
from subspan.utils.errors import InputError
from subspan.utils.names import canonical_name


class Model(nn.Module):
    """An embedding that is the head as well, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("calls", torch.rand(3))
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embedding(ids)))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def layers_wrapped(model: nn.Module) -> nn.Module:
    """A layer of the model is compiled, and its parts are recomputed in the backward pass."""
    model.layers[1][0] = checkpoint_wrapper(model.layers[1][0])
    model.layers[1] = compiled(model.layers[1])
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda model: model,
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "DDP": DistributedDataParallel,
    "DDP of compile": lambda model: DistributedDataParallel(compiled(model)),
    "compile of DDP": lambda model: compiled(DistributedDataParallel(model)),
    "layers": layers_wrapped,
    "all": lambda model: DistributedDataParallel(compiled(checkpoint_wrapper(layers_wrapped(model)))),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "torch": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
    "torch, named": lambda model: torch.optim.AdamW(model.named_parameters(), lr=0.1),  # type: ignore[arg-type]
    "ours": lambda model: subspan.create("sara_adamw", model, lr=0.1, rank=2),
}


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one, which DistributedDataParallel asks for."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(wrapper: str, optimizer: str, steps: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = WRAPPERS[wrapper](Model())
    made = OPTIMIZERS[optimizer](model)
    for _ in range(steps):
        model(torch.randint(9, (4,))).square().mean().backward()
        made.step()
        made.zero_grad()
    return model, made


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    every = {f"model {canonical_name(name)}": whole(value) for name, value in model.state_dict().items()}
    for name, p in model.named_parameters():
        every |= {f"{canonical_name(name)} {key}": whole(value) for key, value in optimizer.state.get(p, {}).items()}
    return every


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name != "none"])
def test_both_ways(wrapper: str, optimizer: str, tmp_path: Path) -> None:
    """Weights, buffers and the optimizer's state; the files are those of the unwrapped model."""
    for number, (source, target) in enumerate([(wrapper, "none"), ("none", wrapper), (wrapper, "all")]):
        folder = tmp_path / str(number)
        model, made = trained(source, optimizer, 2, seed=0)
        save_sharded(folder, model, made)
        other, resumed = trained(target, optimizer, 1, seed=1)
        load_sharded(folder, other, resumed)
        assert_same(snapshot(other, resumed), snapshot(model, made))
        save_sharded(folder / "again", other, resumed)
        for file in ("model-00000-of-00001.safetensors", "optimizer-00000-of-00001.safetensors"):
            assert (folder / file).read_bytes() == (folder / "again" / file).read_bytes()
        tensors = json.loads((folder / "index.json").read_text())["tensors"]["model"]
        assert list(tensors) == [name for name in Model().state_dict() if name != "head.weight"]


def test_a_checkpoint_with_names_of_wrappers(tmp_path: Path) -> None:
    """Earlier versions wrote them for wrapped layers."""
    model, optimizer = trained("layers", "torch", 2, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("subspan.checkpoints.sharded.canonical_names", lambda names: {name: name for name in names})
        save_sharded(tmp_path, model, optimizer)
    assert "layers.1._orig_mod.1.weight" in load_file(tmp_path / "model-00000-of-00001.safetensors")
    other, resumed = trained("none", "torch", 1, seed=1)
    load_sharded(tmp_path, other, resumed)
    assert_same(snapshot(other, resumed), snapshot(model, optimizer))


class Twins(nn.Module):
    """Two parameters that would have one canonical name."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.weight = nn.Linear(3, 2), nn.Parameter(torch.ones(2, 3))


def test_names_that_would_collide_are_kept(tmp_path: Path) -> None:
    model, other = Twins(), Twins()
    save_sharded(tmp_path / "one", model, torch.optim.AdamW(model.parameters()))
    load_sharded(tmp_path / "one", other, torch.optim.AdamW(other.parameters()))
    assert set(shards.Shards(tmp_path / "one").tables["model"]) == {"module.weight", "weight", "bias"}
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_plain_weights(wrapper: str, tmp_path: Path) -> None:
    """A file of plain weights, under the names of an unwrapped or of a wrapped model."""
    for number, (source, target) in enumerate([("none", wrapper), (wrapper, "none")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        model, other = (trained(name, "torch", 1, seed)[0] for seed, name in enumerate((source, target)))
        tensors = {name: value for name, value in model.state_dict().items() if not name.endswith("embedding.weight")}
        save_file(tensors, folder / "model.safetensors")
        load_weights(folder, other)
        for ours, theirs in zip(other.state_dict().values(), model.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)


def test_plain_weights_of_another_model(tmp_path: Path) -> None:
    tensors = {name: value.clone() for name, value in Model().state_dict().items() if name != "head.weight"}
    cases = {
        "lacks 'layers.0.bias', which this model has": {k: v for k, v in tensors.items() if k != "layers.0.bias"},
        "has 'layers.2.bias', which this model does not have": {**tensors, "layers.2.bias": torch.ones(2)},
        r"has 'layers.0.bias' as \(2,\), this model as \(6,\)": {**tensors, "layers.0.bias": torch.ones(2)},
    }
    for words, wrong in cases.items():
        save_file(wrong, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=rf"model.safetensors cannot be used: .*{words}.*; remove it, or continue"):
            load_weights(tmp_path, Model())
