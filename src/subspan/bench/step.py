"""Time and memory of an optimizer's step on the linear layers of a LLaMA, against optimizers of other packages.

An *ordinary* step projects, steps inside the subspace, and lifts. A *refresh* also chooses every basis again. Every
optimizer is built twice on the same weights and gradients: with a period that never ends, and with a period of one
step. What a run pays is ``amortised``: ``ordinary + (refresh - ordinary) / PERIOD``.
"""

import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from subspan.backward import project_backward
from subspan.bench import timing
from subspan.bench.peers import LR, PEERS, Parameters
from subspan.costs.live_bytes import LiveBytes
from subspan.costs.traffic import PERIOD, amortised
from subspan.factory import create
from subspan.step.layout import layout_of
from subspan.training.models.presets import PRESETS, llama_of
from subspan.utils.errors import SettingError
from subspan.utils.suggestions import near_names

_NEVER = 10**9
OURS = ("sara_adamw", "galore_adamw", "fira_adamw")
_MATMULS = "matmuls"
_BACKWARD = "sara_adamw_backward"


@dataclass(frozen=True)
class StepSetting:
    """The layers, and the optimizers that step on them."""

    model: str = "llama-60m"
    """Preset of the model, from `subspan list models`."""
    layers: int | None = None
    """Number of blocks of the model; null takes all of them."""
    rank: int = 128
    """Rank of the subspaces."""
    pairs: int = 15
    """Number of rounds. In a round each optimizer takes an ordinary step."""
    refresh_pairs: int = 3
    """Number of rounds in which each optimizer takes a step with a refresh."""
    peers: tuple[str, ...] | None = None
    """Optimizers of other packages to compare with; null takes those that are installed."""
    seed: int = 0
    """Random seed for weights and gradients."""
    threads: int | None = None
    """Number of CPU threads; null leaves the choice to torch."""

    def __post_init__(self) -> None:
        if self.model not in PRESETS:
            raise SettingError(f"model={self.model!r}: {near_names(self.model, PRESETS)}")
        if not 1 <= self.rank < PRESETS[self.model].hidden:
            raise SettingError(
                f"rank={self.rank}: expected 1 to {PRESETS[self.model].hidden - 1}, below the width of {self.model}"
            )
        for name, value in (("layers", self.layers), ("threads", self.threads)):
            if value is not None and value < 1:
                raise SettingError(f"{name}={value}: expected a whole number >= 1")
        timing.check_rounds("pairs", self.pairs)
        timing.check_rounds("refresh_pairs", self.refresh_pairs)
        for name in self.peers or ():
            if name not in PEERS:
                raise SettingError(f"peers={name!r}: {near_names(name, PEERS)}")
            if not PEERS[name].installed:
                raise SettingError(
                    f"peers={name!r}: is not installed; pip install {PEERS[name].distribution}, or leave it out"
                )

    @property
    def compared(self) -> list[str]:
        """The other packages' optimizers that take part."""
        return [name for name, peer in PEERS.items() if peer.installed] if self.peers is None else [*self.peers]

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """The shapes of the weights."""
        model = llama_of(PRESETS[self.model])
        return [(layer.out, layer.inputs) for layer in model.block] * (self.layers or model.layers)


def measure(setting: StepSetting) -> dict[str, Any]:
    """Measure a row for each optimizer, and ``ratio_vs_NAME`` for each optimizer of another package.

    A ratio is the amortised time of our optimizer over that of the other one. Ours is ``sara_adamw``, unless the other
    one has another method that this library has too.
    """
    if setting.threads:
        torch.set_num_threads(setting.threads)
    model = _layers_of(setting)
    weights = [*model.parameters()]
    ordinary = _optimizers(setting, model, _NEVER)
    refreshing = _optimizers(setting, model, 1)
    steps: dict[str, Callable[[], object]] = {name: optimizer.step for name, optimizer in ordinary.items()}
    held, backward = _backward_side(setting)
    others: dict[str, Callable[[], object]] = {_MATMULS: _matmuls(weights, setting.rank), _BACKWARD: backward.step}
    seconds = timing.rounds(steps | others, setting.pairs, warm_up=2)
    del held  # it has kept the layers of the carriers alive
    refreshes = {name: optimizer.step for name, optimizer in refreshing.items()}
    refresh_seconds = timing.rounds(refreshes, setting.refresh_pairs)
    matrices = collections.Counter("x".join(map(str, shape)) for shape in setting.matrices)
    found: dict[str, Any] = {}
    for name in setting.compared:
        ours = PEERS[name].ours
        pairs = [list(zip(taken[ours], taken[name], strict=True)) for taken in (seconds, refresh_seconds)]
        shapes = {
            "of": ours,
            "model": setting.model,
            "matrices": dict(matrices),
            "rank": setting.rank,
            "period": PERIOD,
        }
        found[f"ratio_vs_{name}"] = timing.interval(_amortised_ratio, *pairs) | {"shapes": shapes}
        found[f"ordinary_ratio_vs_{name}"] = timing.interval(timing.median_ratio, pairs[0])
        if PEERS[name].refreshes:
            found[f"refresh_ratio_vs_{name}"] = timing.interval(timing.median_ratio, pairs[1])
        if name == "adamw_fused":
            both = zip(seconds[_BACKWARD], seconds[name], strict=True)
            found[f"backward_ratio_vs_{name}"] = timing.interval(timing.median_ratio, both)
    flops = sum(4 * m * n * setting.rank for m, n in setting.matrices)
    largest = max(p.numel() * p.element_size() for p in weights)
    memory = {
        name: {
            kind: _extra(built[name], weights) / largest
            for kind, built in (("ordinary", ordinary), ("refresh", refreshing))
        }
        for name in ordinary
    }
    return found | {
        "rows": [*(_row(name, seconds, refresh_seconds, memory[name]) for name in ordinary), _backward_row(seconds)],
        "matmul_flops": flops,
        "matmul_flops_per_second": flops / timing.median(seconds[_MATMULS]),
        "largest_weight_bytes": largest,
        "pairs": setting.pairs,
        "refresh_pairs": setting.refresh_pairs,
        "not_installed": [peer.distribution for peer in PEERS.values() if not peer.installed],
        "machine": timing.machine(peer.distribution for peer in PEERS.values()),
    }  # fmt: skip


def _layers_of(setting: StepSetting, gradients: bool = True) -> nn.ModuleDict:
    torch.manual_seed(setting.seed)
    layers = {f"layer{i}": nn.Linear(n, m, bias=False) for i, (m, n) in enumerate(setting.matrices)}
    model = nn.ModuleDict(layers)
    for p in model.parameters() if gradients else ():
        p.grad = torch.randn_like(p) / 1000
    return model


def _optimizers(setting: StepSetting, model: nn.Module, gap: int) -> dict[str, torch.optim.Optimizer]:
    weights = [*model.parameters()]
    ours = {
        name: create(name, model, lr=LR, rank=setting.rank, update_proj_gap=gap, stagger=False, seed=setting.seed)
        for name in OURS
    }
    return ours | {name: PEERS[name].make(weights, setting.rank, gap) for name in setting.compared}


def _backward_side(setting: StepSetting) -> tuple[nn.Module, torch.optim.Optimizer]:
    """SARA's optimizer on backward-side layers. A real backward pass has given their carriers gradients."""
    model = _layers_of(setting, gradients=False)
    project_backward(model, rank=setting.rank, share="none")
    optimizer = create("sara_adamw", model, lr=LR, rank=setting.rank, update_proj_gap=_NEVER, seed=setting.seed)
    for layer in model.values():
        x = torch.randn(8, layer.in_features)  # type: ignore[call-overload]  # that of a linear layer
        layer(x).square().sum().backward()
    return model, optimizer


def _matmuls(weights: Parameters, rank: int) -> Callable[[], None]:
    """The two products that a step cannot do without, ``R = G Q`` and ``U Qᵀ``, for all weights."""
    work: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for p in weights:
        G = layout_of(p.shape, rank, "std").enter(torch.randn_like(p))
        m, n = G.shape
        work.append((G, torch.randn(n, rank), torch.empty(m, rank), torch.empty_like(G)))

    @torch.no_grad()
    def run() -> None:
        for G, Q, R, D in work:
            torch.mm(G, Q, out=R)
            torch.mm(R, Q.mT, out=D)

    return run


def _amortised_ratio(ordinary: Tensor, refresh: Tensor) -> Tensor:
    """The ratio of amortised times, from medians over rounds: ``(..., n, 2)`` and ``(..., m, 2)`` to ``(...)``."""
    step = ordinary.quantile(0.5, dim=-2)
    mean = step + (refresh.quantile(0.5, dim=-2) - step) / PERIOD
    return mean[..., 0] / mean[..., 1]


def _row(
    name: str, seconds: dict[str, list[float]], refresh_seconds: dict[str, list[float]], memory: dict[str, float]
) -> dict[str, Any]:
    peer = PEERS.get(name)
    refreshes, lifts = (True, True) if peer is None else (peer.refreshes, peer.lifts)
    ordinary, refresh = timing.median(seconds[name]), timing.median(refresh_seconds[name])
    share = timing.interval(timing.median_ratio, zip(seconds[_MATMULS], seconds[name], strict=True))
    return {
        "name": name,
        "ordinary_seconds": ordinary,
        "refresh_seconds": refresh if refreshes else None,
        "amortised_seconds": amortised(ordinary, refresh, PERIOD) if refreshes else ordinary,
        "matmul_share": share if lifts else None,
        "extra_weights": memory["ordinary"],
        "refresh_extra_weights": memory["refresh"] if refreshes else None,
    }


def _backward_row(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """A row without refreshes: backward-side layers choose bases in the backward pass, which is not timed."""
    ordinary = timing.median(seconds[_BACKWARD])
    return {"name": _BACKWARD, "ordinary_seconds": ordinary} | dict.fromkeys(
        ("refresh_seconds", "amortised_seconds", "matmul_share", "extra_weights", "refresh_extra_weights")
    )


def _extra(optimizer: torch.optim.Optimizer, weights: Parameters) -> int:
    """The most bytes that a step holds besides weights, gradients and state."""
    gradients = [p.grad for p in weights if p.grad is not None]
    with LiveBytes([*weights, *gradients, *_tensors_in(optimizer.state)]) as live:
        before = live.now
        optimizer.step()
    return live.peak - before


def _tensors_in(held: Any) -> Iterator[Tensor]:
    """The tensors in a state, also those of objects in it, such as projectors."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from _tensors_in(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from _tensors_in(value)
    elif hasattr(held, "__dict__"):
        yield from _tensors_in(vars(held))
