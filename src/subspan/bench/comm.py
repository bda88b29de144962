"""The bytes that a training step sends, by method: counted on a real step in a fake world, beside closed forms.

Two steps are counted once DDP has laid out its buckets: an ordinary one, and a *refresh*, in which every basis is
chosen again. A run takes one refresh in ``PERIOD`` steps, or distributes it over them. ``amortised`` is the mean over a
period.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from subspan.bench.setting import Setting, build_model
from subspan.costs.collectives import CountCollectives, Sent, fake_world
from subspan.costs.traffic import COUNTED, PERIOD, Traffic, Way, amortised
from subspan.factory import create, residual_of
from subspan.groups import check_rank
from subspan.optimizer import SubspaceOptimizer
from subspan.training.models.presets import PRESETS, llama_of
from subspan.training.processes import Processes
from subspan.utils.errors import SettingError
from subspan.utils.ranks import Rank
from subspan.utils.suggestions import near_names

_WARM_UP = 2  # steps: DDP lays out its buckets again after the first


@dataclass(frozen=True)
class CommSetting:
    """A world and a model, whose traffic is counted."""

    world: int = 8
    """Number of ranks (processes)."""
    model: str = "llama-60m"
    """Preset of the model, from `subspan list models`."""
    rank: Rank = 128
    """Rank of the subspaces, or its share of each compressed side, such as 0.25."""
    select_from: Literal["owner", "mean"] = "owner"
    """Gradient that chooses the basis of backward-side layers: that of one rank (owner), or the mean over all ranks,
    which must then be sent."""
    threads: int = 1
    """Number of CPU threads. It does not change what is counted."""
    rank_pattern: dict[str, Rank] | None = None
    """Other ranks by name, such as {q_proj: 32, mlp: 0.5}."""

    def __post_init__(self) -> None:
        if self.world < 2:
            raise SettingError(f"world={self.world}: expected 2 ranks or more; one rank sends nothing")
        if self.model not in PRESETS:
            raise SettingError(f"model={self.model!r}: {near_names(self.model, PRESETS)}")
        check_rank(self.rank, self.rank_pattern)
        if self.rank >= PRESETS[self.model].hidden:
            raise SettingError(
                f"rank={self.rank}: expected 1 to {PRESETS[self.model].hidden - 1}, below the width of {self.model}; "
                f"its own is {PRESETS[self.model].rank}"
            )
        if self.threads < 1:
            raise SettingError(f"threads={self.threads}: expected a whole number >= 1")


def measure(setting: CommSetting) -> dict[str, Any]:
    """Count one row for each of ``COUNTED``: payloads and the bytes that each rank sends, and their closed forms.

    Raises:
        SettingError: this process belongs to a process group.
    """
    torch.set_num_threads(setting.threads)
    rows = []
    for name, way in COUNTED.items():
        with fake_world(setting.world):
            counted = count(setting, way)
            gc.collect()  # DDP must go before its process group does
        rows.append({"name": name} | row_of(setting, way, *counted))
    return {"world": setting.world, "model": setting.model, "rank": setting.rank, "period": PERIOD, "rows": rows,
            "torch": torch.__version__}  # fmt: skip


def row_of(setting: CommSetting, way: Way, step: Sent, refresh: Sent) -> dict[str, Any]:
    """Write what was counted of a way beside its closed forms."""
    expected = Traffic(
        llama_of(PRESETS[setting.model]),
        setting.rank,
        setting.world,
        way,
        select_from=setting.select_from,
        rank_pattern=setting.rank_pattern,
    )
    return {
        "step": step.report(setting.world),
        "refresh": refresh.report(setting.world),
        "amortised_wire_bytes": round(amortised(step.wire(setting.world), refresh.wire(setting.world))),
        "zeros_bytes": expected.zeros(),
        "formula": {"step": expected.step().bytes, "refresh": expected.refresh().bytes},
    }


def count(setting: CommSetting, way: Way) -> tuple[Sent, Sent]:
    """Count what an ordinary step and a refresh send, in the process group that is there."""
    small = Setting(
        setting.model,
        tokens=32,
        rank=setting.rank,
        rank_pattern=setting.rank_pattern,
        sequence_length=16,
        share="none" if way.own_bases else "auto",
    )
    model, handle = build_model(small, way.backward_side, setting.select_from, residual_of(way.optimizer))
    forward: Callable[..., Any] = model
    if way.sharded:
        Processes("fsdp", size=setting.world).place(model, "cpu")
    optimizer = create(way.optimizer, model, rank=setting.rank, rank_pattern=setting.rank_pattern,
                       update_proj_gap=PERIOD, stagger=False,
                       proj_type="std" if way.backward_side else way.proj_type)  # fmt: skip
    if not way.sharded:
        forward = _data_parallel(model, optimizer, way.hook)
    batch, counted = small.batch(), []
    for refresh in (*[False] * _WARM_UP, False, True):
        _schedule(optimizer, refresh)
        with CountCollectives() as counting:
            forward(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        counted.append(counting.sent)
    del handle  # it has kept the layers alive
    return counted[-2], counted[-1]


def _schedule(optimizer: torch.optim.Optimizer, refresh: bool) -> None:
    """Let every basis be due at the next step, or none.

    In a fake world most bases are chosen by ranks that do not exist, so the optimizer's own schedule would find them
    due for ever.
    """
    if not isinstance(optimizer, SubspaceOptimizer):
        return
    for group in optimizer.param_groups:
        group["clock"] = PERIOD
    for state in optimizer.state.values():
        if "refresh_step" in state:
            state["refresh_step"] = 0 if refresh else PERIOD
    optimizer.carriers.schedule()


def _data_parallel(model: nn.Module, optimizer: Any, low_rank: bool) -> nn.Module:
    from subspan.ddp import register

    wrapped = nn.parallel.DistributedDataParallel(model)
    if low_rank:
        register(wrapped, optimizer)
    else:  # DDP's own all-reduce as a hook, because the fake group has no result to hand to its C++
        wrapped.register_comm_hook(None, _all_reduce)
    return wrapped


def _all_reduce(_: Any, bucket: Any) -> Any:
    whole = bucket.buffer()
    return dist.all_reduce(whole, async_op=True).get_future().then(lambda _: whole)


_all_reduce.__annotations__ = {}  # torch accepts no other types than its own
