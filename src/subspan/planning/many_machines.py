"""A model of a training step on many machines, *computed* from shapes and stated rates.

It gives memory, bytes sent, FLOPs and time. Nothing in it is measured. The bytes are those of ``costs.traffic`` and
``costs.state_costs``, which tests compare with counted ones. The FLOPs are those of matrix products, which tests
compare with ``torch.utils.flop_counter``. A step takes

    compute + optimizer + factorising + max(0, sending - overlap * compute)

The model leaves out elementwise work, latency, the gradients that backward-side layers form in a refresh, and
activations: their memory, and the time to recompute them.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from subspan.costs.llama import Llama
from subspan.costs.state_costs import ParameterShape, StateCosts
from subspan.costs.traffic import WAYS, Projected, Traffic, Way, amortised
from subspan.linalg import gram_flops
from subspan.recipes import find
from subspan.utils.errors import SettingError
from subspan.utils.ranks import Rank, rank_of_side

MODELS = {  # the shapes of LLaMA-2; the rank is a quarter of the width
    "7B": (Llama(4096, 11008, 32, 32, kv=4096), 1024),
    "70B": (Llama(8192, 28672, 80, 64, kv=1024), 2048),
}
WORLDS = (8, 64, 1024)


@dataclass(frozen=True)
class Machines:
    """Assumptions about the accelerators and about the step."""

    flops: float = 989e12
    """FLOPs per second of one accelerator in bf16. The default is that of an H100 SXM, dense, by its data sheet."""
    tf32_flops: float = 495e12
    """FLOPs per second in TF32, for products with fp32 bases (`torch.set_float32_matmul_precision("high")`)."""
    mfu: float = 0.4
    """Share of these two rates that is reached."""
    eigh_flops: float = 1e12
    """FLOPs per second of an eigendecomposition, counted as 9 n^3 FLOPs. The default is a guess."""
    memory: float = 80e9
    """Memory of one accelerator in bytes."""
    node: int = 8
    """Number of accelerators in a node."""
    nvlink: float = 450e9
    """Bytes per second that one accelerator sends within its node."""
    links: tuple[float, ...] = (400, 25, 10)
    """Gbit per second that each accelerator sends between nodes; a table has a column for each value."""
    overlap: float = 0.6
    """Share of the forward and backward pass during which sending costs no time."""
    tokens: int = 8192
    """Number of tokens in a step on each rank."""
    sequence_length: int = 4096
    """Number of tokens in a sequence."""
    period: int = 200
    """Number of steps between refreshes, over which the cost of a refresh is averaged."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            numbers = value if name == "links" else (value,)
            if name != "overlap" and not (numbers and all(0 < number < math.inf for number in numbers)):
                raise SettingError(f"{name}={value}: expected {'numbers' if name == 'links' else 'a number'} > 0")
        for name in ("overlap", "mfu"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"{name}={getattr(self, name)}: expected a share from 0 to 1")

    def rate(self, world: int, link: float) -> float:
        """Bytes per second of a ring.

        There are as many rings as a node has accelerators, and each leaves the node over a link of its own.
        """
        return self.nvlink if world <= self.node else min(self.nvlink, self.node * link * 1e9 / 8)


def compute(machines: Machines) -> dict[str, Any]:
    """Compute every way to take a step of every model, in every world and over every link."""
    models = []
    for name, (model, rank) in MODELS.items():
        rows = [row for way in WAYS for world in WORLDS for row in _rows(machines, model, rank, way, world)]
        models.append({"name": name, "parameters": model.numel, "rank": rank, "rows": rows})
    return {"assumptions": asdict(machines), "models": models}


def _rows(machines: Machines, model: Llama, rank: int, name: str, world: int) -> Iterator[dict[str, Any]]:
    way, links = WAYS[name], machines.links if world > machines.node else machines.links[:1]
    traffic = Traffic(model, rank, world, way, width=4, gathered_width=2, device=torch.device("cuda"))
    step, refresh = traffic.step().wire(world), traffic.refresh().wire(world)
    held, seconds = memory(traffic), _seconds(machines, traffic)
    wire = amortised(step, refresh, machines.period)
    for link in links:
        sending = wire / machines.rate(world, link)
        exposed = max(0.0, sending - machines.overlap * seconds["compute"])
        yield {
            "name": name,
            "world": world,
            "link_gbit": link if world > machines.node else None,
            "memory_bytes": held,
            "fits": held["total"] <= machines.memory,
            "wire_bytes": {"step": step, "refresh": refresh, "mean": wire},
            "flops": {
                "compute": matmul_flops(traffic, machines),
                "optimizer": optimizer_flops(traffic, machines.period),
            },
            "seconds": seconds | {"sending": sending, "step": sum(seconds.values()) + exposed},
        }


def _seconds(machines: Machines, traffic: Traffic) -> dict[str, float]:
    flops, into = matmul_flops(traffic, machines), into_bases_flops(traffic, machines)
    bf16, tf32 = (machines.mfu * rate for rate in (machines.flops, machines.tf32_flops))
    return {
        "compute": (flops - into) / bf16 + into / tf32,
        "optimizer": optimizer_flops(traffic, machines.period) / tf32,
        "factorising": eigh_flops(traffic) / machines.period / machines.eigh_flops,
    }


# --- FLOPs of a rank --------------------------------------------------------------------------------------------------


def matmul_flops(traffic: Traffic, batch: Any) -> float:
    """FLOPs of a forward and a backward pass over ``batch.tokens`` in sequences of ``batch.sequence_length``."""
    model, T = traffic.model, batch.tokens
    attention = (
        12 * T * batch.sequence_length * model.d
    )  # QKᵀ and its product with V, and twice that in the backward pass
    weights = sum(layer.numel for layer in model.block)
    blocks = model.layers * (6 * T * weights + attention)
    if traffic.way.backward_side:  # dyᵀ (x Q) in place of dyᵀ x
        blocks -= 2 * T * sum(one.layer.out * (one.n - one.columns) for one in traffic.projected)
    return blocks + 6 * T * model.v * model.d + into_bases_flops(traffic, batch)


def into_bases_flops(traffic: Traffic, batch: Any) -> float:
    """The part of these FLOPs that is ``x Q`` of backward-side layers, once for the layers that share it."""
    if not traffic.way.backward_side:
        return 0.0
    return 2.0 * batch.tokens * sum(group[0].n * group[0].columns for group in traffic.bases)


def optimizer_flops(traffic: Traffic, period: int) -> float:
    """FLOPs of products with bases in a step, and its share of the Gram matrices of a period."""
    way, projected = traffic.way, traffic.projected
    if way.optimizer == "adamw":
        return 0.0
    sharing = traffic.world if way.sharded else 1
    if way.backward_side:  # W <- W - U Qᵀ. Only the owner of a basis makes the Gram matrix, and the others wait
        grams = sum(_gram(sum(one.layer.numel for one in group), _smaller(group)) for group in traffic.bases)
        return 2 * sum(one.layer.numel * one.columns for one in projected) / sharing + grams / period
    products = 8 if way.hook else 4  # G Q and U Qᵀ; the hook makes a G Q and an R Qᵀ of its own before
    refresh = sum(
        _gram(one.layer.numel, one.n) + 2 * one.n * one.r**2 for one in projected
    )  # and the new basis on the old one
    return (sum(products * one.layer.numel * one.columns for one in projected) + refresh / period) / sharing


def _gram(numel: int, n: int) -> int:
    return gram_flops(numel // n, n)


def eigh_flops(traffic: Traffic) -> float:
    """FLOPs of the eigendecompositions that a rank waits for in a period.

    Data-parallel ranks each factorise every matrix. For backward-side layers one rank factorises after the other, and
    the backward pass waits. Sharded matrices are factorised at the same time, each by another rank.
    """
    way, at_once = traffic.way, 1
    if way.optimizer == "adamw":
        return 0.0
    if way.backward_side:
        sides = [_smaller(group) for group in traffic.bases]
    else:
        sides = [one.n for one in traffic.projected]
        at_once = traffic.world if way.sharded else 1
    return sum(9.0 * n**3 for n in sorted(sides, reverse=True)[::at_once])


def _smaller(group: list[Projected]) -> int:
    """The smaller side of the gradient of layers that share a basis."""
    return min(group[0].n, sum(one.layer.out for one in group))


# --- bytes of a rank --------------------------------------------------------------------------------------------------


def memory(traffic: Traffic) -> dict[str, int]:
    """The bytes that rank 0 holds, by kind.

    Weights and gradients are in fp32, as in mixed precision. ``gathered`` is what ``fully_shard`` gathers in bf16: two
    blocks, and what is outside of blocks.
    """
    model, way = traffic.model, traffic.way
    held = StateCosts.of_recipe(way.optimizer).bytes_held(
        groups(model, traffic.rank, way),
        parallel="fsdp" if way.sharded else "ddp",
        world=traffic.world,
    )
    if way.sharded:
        block = sum(layer.numel for layer in model.block)
        if way.backward_side:
            block += sum(one.layer.out * one.columns for one in traffic.projected) // model.layers
        held["gathered"] = 2 * (2 * block + sum(map(math.prod, model.outside)))
    return held | {"total": sum(held.values())}


def groups(model: Llama, rank: Rank, way: Way) -> list[dict[str, Any]]:
    """The groups that an optimizer would have, with shapes in place of parameters."""
    others = [ParameterShape(shape) for shape in model.outside + model.layers * model.block_vectors]
    projected = []
    for layers in model.layers * model.sharing:
        for number, layer in enumerate(layers):
            p = ParameterShape((layer.out, layer.inputs))
            if way.backward_side:  # the first of the layers that share a basis keeps it
                r = rank_of_side(rank, layer.inputs)
                columns = r + find(way.optimizer).residual.sketch_width(layer.inputs, r)
                keeps = number == 0 or way.own_bases
                p = ParameterShape((layer.out, columns), weight=p, keeps_basis=keeps, rank=r)
            projected.append(p)
    own = None if way.optimizer == "adamw" else rank
    return [{"params": projected, "rank": own, "proj_type": way.proj_type}, {"params": others, "rank": None}]


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> str:
    """Write tables in Markdown: for each model the memory, what is sent and computed, and the time of a step."""
    parts = [
        "| assumption | value |\n|---|---|\n"
        + "\n".join(f"| `{k}` | {_plain(v)} |" for k, v in found["assumptions"].items())
    ]
    for model in found["models"]:
        about = f"**{model['name']}**, {model['parameters'] / 1e9:.2f}B parameters, rank {model['rank']}"
        parts += [f"{about}: {what} (*computed*)\n\n{table(model['rows'])}" for what, table in _TABLES.items()]
    return "\n\n".join(parts)


def _plain(value: Any) -> str:
    return ", ".join(map(_plain, value)) if isinstance(value, tuple | list) else f"{value:g}"


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def _by_name(rows: list[dict[str, Any]]) -> dict[str, dict[int, list[dict[str, Any]]]]:
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in rows:
        found.setdefault(row["name"], {}).setdefault(row["world"], []).append(row)
    return found


def _memory_table(rows: list[dict[str, Any]]) -> str:
    kinds = ("weights", "carriers", "gradients", "states", "bases", "gathered", "total")
    lines = []
    for name, worlds in _by_name(rows).items():
        first = worlds[WORLDS[0]][0]["memory_bytes"]
        totals = [worlds[world][0]["memory_bytes"]["total"] for world in WORLDS[1:]]
        lines.append(
            [f"`{name}`", *(f"{first.get(kind, 0) / 1e9:.1f}" for kind in kinds), *(f"{t / 1e9:.1f}" for t in totals)]
        )
    return _table(["GB a rank", *kinds, *(f"total of {world}" for world in WORLDS[1:])], lines)


def _work_table(rows: list[dict[str, Any]]) -> str:
    world = WORLDS[1]
    lines = []
    for name, worlds in _by_name(rows).items():
        row = worlds[world][0]
        wires, flops, seconds = row["wire_bytes"], row["flops"], row["seconds"]
        lines.append([
            f"`{name}`", *(f"{wires[kind] / 1e9:.1f}" for kind in ("step", "refresh", "mean")),
            *(f"{flops[kind] / 1e12:.0f}" for kind in ("compute", "optimizer")),
            *(f"{seconds[kind]:.2f}" for kind in ("compute", "optimizer", "factorising")),
        ])  # fmt: skip
    head = [f"a rank of {world}", "GB sent, a step", "a refresh", "mean", "TFLOP, forward and backward", "optimizer",
            "seconds, forward and backward", "optimizer", "factorising"]  # fmt: skip
    return _table(head, lines)


def _time_table(rows: list[dict[str, Any]]) -> str:
    lines, head = [], ["seconds a step"]
    for name, worlds in _by_name(rows).items():
        every = [row for world in WORLDS for row in worlds[world]]
        head[1:] = [f"{row['world']}" + (f" at {row['link_gbit']:g}" if row["link_gbit"] else "") for row in every]
        lines.append(
            [f"`{name}`", *(f"{row['seconds']['step']:.2f}" if row["fits"] else "does not fit" for row in every)]
        )
    return _table(head, lines)


_TABLES = {
    f"memory of a rank of {WORLDS[0]}, without activations": _memory_table,
    "what a rank sends and computes": _work_table,
    "time of a step, by ranks and Gbit/s between nodes": _time_table,
}
