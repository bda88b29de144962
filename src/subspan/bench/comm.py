"""Bytes that a training step sends, by method: counted on a real step in a fake world, beside closed forms.

Steps are counted when buckets are laid out and bases chosen: an ordinary one, and one in which every basis is chosen anew. A
run spreads its refreshes or takes one in ``PERIOD`` steps; ``amortised`` is the mean over a period.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from subspan.bench.collectives import CountCollectives, Sent, fake_world
from subspan.bench.setting import Setting, build_model
from subspan.factory import create
from subspan.groups import EXCLUDED, select_linear
from subspan.names import near_names
from subspan.optimizer import SubspaceOptimizer
from subspan.training.parallel import Ranks, blocks_of
from subspan.training.presets import PRESETS

PERIOD = 200
_WARM_UP = 3


@dataclass(frozen=True)
class CommSetting:
    """A world and a model."""

    world: int = 8
    """Ranks."""
    model: str = "llama-60m"
    """A preset: `subspan list models`."""
    rank: int = 128
    """Of the subspaces."""
    threads: int | None = None
    """CPU threads; null leaves torch's choice."""

    def __post_init__(self) -> None:
        if self.world < 2:
            raise ValueError(f"world={self.world}: expected 2 ranks or more; one rank sends nothing")
        if self.model not in PRESETS:
            raise ValueError(f"model={self.model!r}: {near_names(self.model, PRESETS)}")
        if not 1 <= self.rank < PRESETS[self.model].hidden:
            raise ValueError(
                f"rank={self.rank}: expected 1 to {PRESETS[self.model].hidden - 1}, below the width of {self.model}"
            )


@dataclass(frozen=True)
class Way:
    """How a step is taken."""

    optimizer: str
    sharded: bool = False
    backward_side: bool = False
    hook: bool = False


WAYS = {
    "adamw_ddp": Way("adamw"),
    "sara_ddp_hook": Way("sara_adamw", hook=True),
    "sara_backward_ddp": Way("sara_adamw", backward_side=True),
    "adamw_fsdp": Way("adamw", sharded=True),
    "sara_fsdp": Way("sara_adamw", sharded=True),
    "sara_backward_fsdp": Way("sara_adamw", sharded=True, backward_side=True),
}


def measure(setting: CommSetting) -> dict[str, Any]:
    """One row for each of ``WAYS``."""
    if setting.threads:
        torch.set_num_threads(setting.threads)
    rows = []
    for name, way in WAYS.items():
        with fake_world(setting.world):
            rows.append(_row(setting, name, way))
            gc.collect()  # DDP goes before its process group does
    return {"world": setting.world, "model": setting.model, "rank": setting.rank, "period": PERIOD, "rows": rows,
            "torch": torch.__version__}  # fmt: skip


def _row(setting: CommSetting, name: str, way: Way) -> dict[str, Any]:
    counted = dict(zip(("step", "refresh"), _count(setting, way), strict=True))
    expected = formula(setting, way)
    wires = {kind: sent.wire(setting.world) for kind, sent in counted.items()}
    return {
        "name": name,
        **{
            kind: {
                "payload_bytes": sent.payload(),
                "wire_bytes": round(wires[kind]),
                "collectives": {operation: [sent.calls[operation], size] for operation, size in sent.bytes.items()},
            }
            for kind, sent in counted.items()
        },
        "amortised_wire_bytes": round(wires["step"] + (wires["refresh"] - wires["step"]) / PERIOD),
        "formula": {kind: sent.bytes for kind, sent in expected.items()},
    }


def _count(setting: CommSetting, way: Way) -> tuple[Sent, Sent]:
    """What an ordinary step sends, and a step in which every basis is chosen."""
    small = Setting(setting.model, tokens=32, rank=setting.rank, sequence_length=16)
    model, handle = build_model(small, way.backward_side, "mean" if way.sharded else "owner")
    forward: Callable[..., Any] = model
    if way.sharded:
        Ranks("fsdp", 0, setting.world).place(model, "cpu")
    optimizer = create(way.optimizer, model, rank=setting.rank, update_proj_gap=_WARM_UP, stagger=False,
                       proj_type="right" if way.sharded and not way.backward_side else "std")  # fmt: skip
    if not way.sharded:
        forward = _data_parallel(model, optimizer, way.hook)
    batch, counted = small.batch(), []
    for step in range(_WARM_UP + 2):
        with CountCollectives() as count:
            forward(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _say_chosen(optimizer)
        if step >= _WARM_UP:
            counted.append(count.sent)
    del handle
    refresh, ordinary = counted
    return ordinary, refresh


def _say_chosen(optimizer: torch.optim.Optimizer) -> None:
    """Put down as chosen the bases that ranks own which are not there: they have not said so."""
    if not isinstance(optimizer, SubspaceOptimizer):
        return
    states = [state for state in optimizer.state.values() if "refresh_step" in state]
    newest = max(state["refresh_step"] for state in states)
    for state in states:
        state["refresh_step"] = newest
    optimizer._plan()


def _data_parallel(model: nn.Module, optimizer: Any, low_rank: bool) -> nn.Module:
    from subspan.comm import register

    # Buffers, which DDP sends from rank 0 in each forward pass, are constant here and nobody's gradient.
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    if low_rank:
        register(wrapped, optimizer)
    else:  # DDP's own all-reduce, as a hook: the fake group has no result to hand to its C++
        wrapped.register_comm_hook(None, _all_reduce)
    return wrapped


def _all_reduce(_: Any, bucket: Any) -> Any:
    whole = bucket.buffer()
    return dist.all_reduce(whole, async_op=True).get_future().then(lambda _: whole)


_all_reduce.__annotations__ = {}  # torch would want its own types


# --- closed forms -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shapes:
    """Numbers of a model in fp32, from its shapes alone."""

    parameters: list[list[tuple[int, ...]]]
    """Of each block, and last of what is outside."""
    layers: list[tuple[int, int]]
    """``(out, in)`` of the projected ones."""
    inputs: list[list[tuple[int, int]]]
    """Those that share an input."""


def formula(setting: CommSetting, way: Way) -> dict[str, Sent]:
    """Payload bytes of each operation from shapes alone: weights W (out, in) in fp32, rank r, n the compressed side."""
    shapes, r, world = _shapes(setting), setting.rank, setting.world
    every = sum(_numel(shape) for group in shapes.parameters for shape in group)
    projected = sum(_numel(shape) for shape in shapes.layers)
    step, refresh = Sent(), Sent()
    if not way.sharded:
        low = sum((out if way.backward_side else max(out, n)) * r for out, n in shapes.layers)
        dense = way.optimizer == "adamw"
        step.add("all_reduce", 4 * (every if dense else every - projected + low))
        # Backward-side layers send R at a refresh too, and then what the basis is chosen from.
        refresh.add("all_reduce", 4 * (every - projected + low if way.backward_side else every))
    else:
        for sent in (step, refresh):
            for operation, size in _sharded(shapes, r, world, way.backward_side):
                sent.add(operation, size)
    if way.sharded and not way.backward_side and way.optimizer != "adamw":
        for _, n in shapes.layers:
            refresh.add("all_reduce", 8 * n * n)  # the Gram matrix, in fp64 on a CPU
            refresh.add("broadcast", _basis(n, r))
    if way.backward_side:
        for sharing in shapes.inputs:
            n = sharing[0][1]
            if way.sharded:
                refresh.add("all_reduce", 4 * n * sum(out for out, _ in sharing))  # the one gradient, averaged
            refresh.add("broadcast", _basis(n, r))
    return {"step": step, "refresh": refresh}


def _basis(n: int, r: int) -> int:
    """Basis, change of basis, two integers."""
    return 4 * n * r + 4 * r * r + 16


def _sharded(shapes: _Shapes, r: int, world: int, backward_side: bool) -> Iterator[tuple[str, int]]:
    """What ``fully_shard`` sends: blocks are gathered in the forward and in the backward pass, the rest once; gradients are
    reduced as they come. Rows are filled up to a multiple of the world."""
    frozen = set(shapes.layers) if backward_side else set()
    for number, group in enumerate(shapes.parameters):
        block = number < len(shapes.parameters) - 1
        gathered = sum(_padded(shape, world) for shape in group)
        reduced = gathered
        if block and backward_side:
            carriers = sum(_padded((shape[0], r), world) for shape in group if shape in frozen)
            reduced = carriers + sum(_padded(shape, world) for shape in group if shape not in frozen)
            gathered += carriers
        yield "all_gather", 4 * gathered * (2 if block else 1)
        yield "reduce_scatter", 4 * reduced


def _padded(shape: tuple[int, ...], world: int) -> int:
    return -(-shape[0] // world) * world * _numel(shape[1:])


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _shapes(setting: CommSetting) -> _Shapes:
    with torch.device("meta"):
        model, _ = build_model(Setting(setting.model, rank=setting.rank), backward_side=False)
    blocks = blocks_of(model)
    inside = {id(p) for block in blocks for p in block.parameters()}
    layers = [(layer.out_features, layer.in_features) for layer in select_linear(model, "all-linear", EXCLUDED).values()]
    preset = PRESETS[setting.model]
    d, f = preset.hidden, preset.mlp
    return _Shapes(
        parameters=[
            *([tuple(p.shape) for p in block.parameters()] for block in blocks),
            [tuple(p.shape) for p in model.parameters() if id(p) not in inside],
        ],
        layers=layers,
        inputs=preset.layers * [[(d, d)] * 3, [(d, d)], [(f, d)] * 2, [(d, f)]],
    )
