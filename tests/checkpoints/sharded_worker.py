"""One rank of a ``fully_shard`` run that saves or loads sharded checkpoints; if its assertions fail, the others end.

Arguments: the scenario, a directory.
"""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from support.processes import joined
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import subspan
from subspan.checkpoints import checksums, writer
from subspan.checkpoints import shard_files as shards
from subspan.checkpoints.collective import gather
from subspan.checkpoints.directory import list_checkpoints
from subspan.checkpoints.sharded import damage, load_sharded, save_sharded, save_sharded_async
from subspan.utils.errors import InputError

OPTIMIZERS = ["adamw", "torch_sgd", "sara_adamw", "golore_adamw", "galore_adafactor", "fira_adamw", "sara_adamw_8bit"]
"""Names of ``subspan.create``, or ``torch_sgd``. To test another one on sharded models, add it here."""

BEFORE, AFTER = 3, 2  # steps trained before a checkpoint and after it


class Block(nn.Module):
    """A block of seven rows, which ranks share unevenly, and a vector of three, of which a fourth rank has none."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 7), nn.Linear(7, 12, bias=False)
        self.gain = nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.calls += 1
        return x + self.down(torch.relu(self.up(self.norm(x)))) * self.gain.mean()


class Model(nn.Module):
    """An embedding that is the head as well, two blocks, and a layer whose moments are large enough for 8 bits."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(23, 12), nn.Linear(12, 23, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks, self.wide = nn.Sequential(Block(), Block()), nn.Linear(12, 1031)

    def forward(self, ids):
        x = self.blocks(self.embedding(ids))
        return self.head(x) + self.wide(x).mean(-1, keepdim=True)


def build(name, *, mesh=None, sharded=True, seed=0):
    """A model, sharded or plain, and its optimizer."""
    torch.manual_seed(seed)
    model = Model()
    if sharded:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if name == "torch_sgd":
        return model, torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1), momentum=0.9)
    # A basis of the columns, which sharded rows need; a plain run that is to go on from theirs says so.
    return model, subspan.create(name, model, lr=1e-2, rank=4, update_proj_gap=2, proj_type="right")


def train(model, optimizer, steps, *, first):
    for step in range(first, first + steps):
        rank = dist.get_rank() if dist.is_initialized() else 0
        ids = torch.randint(23, (2, 6), generator=torch.Generator().manual_seed(100 * step + rank))
        model(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(value):
    if isinstance(value, DTensor):
        return value.full_tensor()
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def snapshot(model, optimizer):
    """Return everything by name, unsharded. It goes another way than the code under test."""
    every = {f"model {name}": whole(value) for name, value in model.state_dict().items()}
    for name, p in model.named_parameters():
        every |= {f"state {name} {key}": whole(value) for key, value in optimizer.state.get(p, {}).items()}
    for number, group in enumerate(optimizer.param_groups):
        every |= {f"group {number} {key}": whole(value) for key, value in group.items() if key != "params"}
    return every


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert got[key].dtype == value.dtype, key
            assert torch.equal(got[key], value), key
        else:
            assert type(got[key]) is type(value), key
            assert got[key] == value, key


def tensors(sharded):
    """Return a module with every dtype and as few rows as none; ``sharded`` says how a tensor is placed."""
    G = torch.arange(-10, 11).reshape(7, 3)
    dtypes = ("bfloat16", "float16", "float64", "uint8", "int8", "int64", "bool", "float8_e4m3fn")
    plain = {f"as_{dtype}": G.to(getattr(torch, dtype)) for dtype in dtypes}
    plain |= {
        "vector": torch.arange(5.0),
        "row": torch.ones(1, 3),
        "none": torch.ones(0, 3),
        "stack": torch.rand(3, 2, 2),
    }
    module = nn.Module()
    for name, value in plain.items():
        module.register_buffer(name, sharded(value, 0))
    module.register_buffer("columns", sharded(G.float(), 1))
    module.register_buffer("number", torch.tensor(3.5))
    module.register_buffer("copied", sharded(torch.arange(4.0), None))
    return module


def sharded_over(mesh):
    def sharded(value, dim):
        # distribute_tensor communicates, which gloo does not do for every dtype.
        carried = value.view(torch.uint8) if value.dtype in (torch.bool, torch.float8_e4m3fn) else value
        placed = distribute_tensor(carried, mesh, [Replicate() if dim is None else Shard(dim)], src_data_rank=None)
        local = placed.to_local().view(value.dtype)
        return DTensor.from_local(
            local, mesh, placed.placements, run_check=False, shape=value.shape, stride=value.stride()
        )

    return sharded


def no_optimizer():
    """An optimizer that has nothing to do, for a model without parameters."""
    return torch.optim.SGD([{"params": []}], lr=0.1)


# --- scenarios --------------------------------------------------------------------------------------------------------


def save(folder):
    """Save each optimizer, at once and while training goes on, with what the checkpoints must be equal to."""
    rank = dist.get_rank()
    for name in OPTIMIZERS:
        model, optimizer = build(name)
        train(model, optimizer, BEFORE, first=0)
        reference = snapshot(model, optimizer)
        save_sharded(folder / name, model, optimizer)
        pending = save_sharded_async(folder / f"{name}-async", model, optimizer)
        train(model, optimizer, AFTER, first=BEFORE)
        assert not (folder / f"{name}-async" / "index.json").exists()
        pending.wait()
        assert pending.done()
        if rank == 0:
            torch.save(reference, folder / f"{name}.pt")
        later = snapshot(model, optimizer)
        # The unbroken run is met again, by a model that has been trained elsewhere before.
        model, optimizer = build(name, seed=1)
        train(model, optimizer, 1, first=50)
        load_sharded(folder / name, model, optimizer)
        train(model, optimizer, AFTER, first=BEFORE)
        assert_same(snapshot(model, optimizer), later)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    save_sharded(folder / "tensors", tensors(sharded_over(mesh)), no_optimizer())


def load(folder):
    """Load on another number of ranks: the state is the same, in other shards, and so is what is saved again."""
    count = dist.get_world_size()
    meshes = [None] if count != 4 else [None, init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))]
    for name in OPTIMIZERS:
        expected = torch.load(folder / f"{name}.pt", weights_only=True)
        for number, mesh in enumerate(meshes):
            model, optimizer = build(name, seed=1, mesh=mesh)
            load_sharded(folder / name, model, optimizer)
            assert_same(snapshot(model, optimizer), expected)
            assert all(isinstance(p, DTensor) for p in model.parameters())
            save_sharded(folder / f"{name}-from-{count}-{number}", model, optimizer)
            train(model, optimizer, 1, first=BEFORE)
    mesh = init_device_mesh("cpu", (count,))
    module = tensors(sharded_over(mesh))
    for value in module.state_dict().values():
        shards.piece_of(value).local.zero_()
    load_sharded(folder / "tensors", module, no_optimizer())
    torch.manual_seed(0)
    for key, value in tensors(lambda value, dim: value).state_dict().items():
        mine = shards.piece_of(module.state_dict()[key])
        there = value[tuple(slice(at, at + size) for at, size in zip(mine.offsets, mine.local.shape, strict=True))]
        assert mine.local.dtype == there.dtype, key
        assert mine.local.tolist() == there.tolist(), key


def refuse(folder):
    """An error on one rank is an error on all, at once, with the same words; and nothing has changed."""
    rank, name = dist.get_rank(), OPTIMIZERS[0]
    model, optimizer = build(name, seed=1)
    train(model, optimizer, 1, first=50)
    before = snapshot(model, optimizer)
    messages = []
    for case in ("missing", "flipped", "index"):
        broken = folder / f"broken-{case}"
        if rank == 0:
            shutil.copytree(folder / name, broken)
            path = broken / ("index.json" if case == "index" else "model-00001-of-00002.safetensors")
            data = bytearray(path.read_bytes())
            data[-3] ^= 1
            path.unlink()
            if case != "missing":
                path.write_bytes(data)
        dist.barrier()
        with pytest.raises(InputError) as caught:
            load_sharded(broken, model, optimizer)
        messages.append(str(caught.value))
    with pytest.raises(InputError) as caught:
        load_sharded(folder / name, *build("torch_sgd"))
    messages.append(str(caught.value))

    # A disk that is full on the second rank only.
    real, full = shards.save_file, folder / "full"
    if rank == 1:

        def save_file(*arguments, **keywords):
            raise OSError(28, "No space left on device")

        shards.save_file = save_file
    with pytest.raises(InputError) as caught:
        save_sharded(full, model, optimizer)
    messages.append(str(caught.value))
    shards.save_file = real
    assert not (full / "index.json").exists()
    assert_same(snapshot(model, optimizer), before)
    # An error of another kind on one rank leaves none waiting.
    if rank == 1:
        optimizer.param_groups[0]["strange"] = object()
    with pytest.raises(InputError, match=r"param_groups.0.strange is a object"):
        save_sharded(folder / "strange", model, optimizer)
    (folder / f"messages-{rank}.json").write_text(json.dumps(messages))


def publishing(folder):
    """The ranks write into one scratch directory, and the first renames it when all have."""
    model, optimizer = build(OPTIMIZERS[0])
    home = folder / "checkpoints"
    for step in (1, 2, 3):
        train(model, optimizer, 1, first=step)
        with writer.new_checkpoint(home, step=step, keep=2) as scratch:
            assert list(scratch.iterdir()) == []
            dist.barrier()
            save_sharded(scratch, model, optimizer)
        path = home / f"step-{step:06d}"
        assert not scratch.exists()
        assert damage(path) is None
        (home / f"seen-{dist.get_rank()}-{step}").touch()
        dist.barrier()
    assert [path.name for path in list_checkpoints(home)] == ["step-000002", "step-000003"]


@contextlib.contextmanager
def failing(rank, owner, name, error):
    """Let a call fail on one rank."""
    real = getattr(owner, name)

    def fail(*arguments, **keywords):
        raise error

    if dist.get_rank() == rank:
        setattr(owner, name, fail)
    try:
        yield
    finally:
        setattr(owner, name, real)


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FULL = {
    "shards of the first": (0, shards, "save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
    "shards of the second": (1, shards, "save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
    "reaching the disk": (1, os, "fsync", NO_SPACE),
    "index": (0, shards, "write_text", NO_SPACE),
    "more of the first": (0, torch, "save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")),
    "before the shards": (0, Path, "touch", NO_SPACE),
    "record": (0, writer, "seal", NO_SPACE),
    "rename": (0, Path, "rename", NO_SPACE),
    "scratch": (0, writer, "make_empty", NO_SPACE),
}  # fmt: skip
FAULTS = {
    "a mistake in the shards": (1, shards, "save_file", KeyError("layer")),
    "a mistake elsewhere": (0, torch, "save", ValueError("zip() argument 2 is shorter than argument 1")),
    "before the shards": (0, Path, "touch", RuntimeError("CUDA error: out of memory")),
}


def full_disk(folder):
    """What the disk refuses to one rank is the same error on all. Nothing is left of it, and the next save succeeds."""
    rank, home = dist.get_rank(), folder / "checkpoints"
    model, optimizer = build("sara_adamw")
    train(model, optimizer, BEFORE, first=0)

    def save(step):
        with writer.new_checkpoint(home, step=step, keep=99) as scratch:
            if rank == 0:
                (scratch / "note").touch()
            save_sharded(scratch, model, optimizer)
            if rank == 0:
                torch.save({"step": step}, scratch / "training.pt")

    def intact(last):
        found = list_checkpoints(home)
        assert [path.name for path in found] == [f"step-{step:06d}" for step in range(1, last + 1)]
        assert len(list(home.iterdir())) == last
        for path in found:
            assert damage(path) is None
            assert checksums.damage(path) is None
            assert not any("unfinished" in file.name for file in path.iterdir())
        dist.barrier()

    save(1)
    for step, (label, (who, owner, name, error)) in enumerate([*FULL.items(), *FAULTS.items()], 2):
        with failing(who, owner, name, error), pytest.raises(Exception) as caught:  # noqa: PT011
            save(step)
        intact(step - 1)
        said = gather((type(caught.value).__name__, str(caught.value)))
        if step < 2 + len(FULL):
            words = f"checkpoint {home}/step-{step:06d} cannot be written: "
            assert said[0] == said[1], label
            assert said[0][0] == "NotWrittenError", (label, said)
            assert said[0][1].startswith(words), (label, said)
            assert "needs about" in said[0][1]
            assert " kB, " in said[0][1], (label, said)
        else:
            assert said[who] == (type(error).__name__, str(error)), label
            assert said[1 - who] == ("RuntimeError", f"rank {who}: {error}"), (label, said)
        save(step)
        intact(step)
    assert os.path.getsize(home / "step-000002" / "index.json")


def small_disk(folder):
    """Two ranks save on a disk that is full at one place after another."""
    rank, home = dist.get_rank(), folder / "checkpoints"
    model, optimizer = build("sara_adamw")
    train(model, optimizer, BEFORE, first=0)
    needed = 0
    for step, leave in enumerate([None, 0, 8_192, 16_384, 24_576, 40_960, 57_344, 65_536, None], 1):
        if rank == 0:
            ballast = folder / "ballast"
            ballast.unlink(missing_ok=True)
            if leave is not None:
                ballast.write_bytes(bytes(shutil.disk_usage(folder).free - leave))
        dist.barrier()

        def save(step=step):
            with writer.new_checkpoint(home, step=step, keep=2) as scratch:
                save_sharded(scratch, model, optimizer)
                if rank == 0:
                    torch.save({"step": step}, scratch / "training.pt")

        if leave is None:
            save()
            continue
        needed = needed or sum(file.stat().st_size for file in (home / "step-000001").iterdir())
        assert leave < needed
        with pytest.raises(InputError) as caught:
            save()
        said = gather(str(caught.value))
        assert said[0] == said[1]
        assert said[0].startswith(f"checkpoint {home}/step-{step:06d} cannot be written: no space is left; it needs")
        assert [path.name for path in home.iterdir()] == ["step-000001"]
        assert damage(home / "step-000001") is None
        dist.barrier()
    assert sorted(path.name for path in home.iterdir()) == ["step-000001", "step-000009"]


def main(scenario, folder):
    with joined():
        globals()[scenario](Path(folder))
