"""The bytes of a training step, by kind: measured on the real step, beside closed forms."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from subspan.backward.layer import BackwardLinear
from subspan.bench.setting import Setting, Trained, build
from subspan.costs.live_bytes import LiveBytes
from subspan.costs.saved_activations import SavedBytes
from subspan.costs.state_costs import StateCosts
from subspan.costs.traffic import Traffic, Way
from subspan.groups import EXCLUDED, select_linear
from subspan.optimizer import SubspaceOptimizer
from subspan.storage.allocation import state_bytes
from subspan.training.models.presets import PRESETS, llama_of

ROWS = {
    "adamw": ("adamw", False),
    "galore_adamw": ("galore_adamw", False),
    "sara_adamw": ("sara_adamw", False),
    "sara_adamw_backward": ("sara_adamw", True),
    "rso_adamw": ("rso_adamw", True),
    "sara_sketch_adamw_backward": ("sara_sketch_adamw", True),
}


def measure(setting: Setting) -> dict[str, Any]:
    """Measure one row for each of ``ROWS``."""
    if setting.threads:
        torch.set_num_threads(setting.threads)
    return {"rows": [_row(setting, name) for name in ROWS]}


def _row(setting: Setting, name: str) -> dict[str, Any]:
    optimizer, backward_side = ROWS[name]
    trained = build(setting, optimizer, backward_side)
    layers = _layers(trained)
    batch = setting.batch()
    refresh = _step(trained, batch, layers, form_largest=True)
    ordinary = _step(trained, batch, layers)
    bases = _basis_bytes(trained.optimizer)
    carriers = {id(layer.carrier) for layer in layers if isinstance(layer, BackwardLinear)}
    sizes = {False: 0, True: 0}
    for p in trained.model.parameters():
        sizes[id(p) in carriers] += p.numel() * p.element_size()
    return {
        "name": name,
        "weight_bytes": sizes[False],
        "carrier_bytes": sizes[True],
        "gradient_bytes": ordinary["gradients"],
        "state_bytes": state_bytes(trained.optimizer) - bases,
        "basis_bytes": bases,
        "saved_activation_bytes": ordinary["saved"],
        "linear_activation_bytes": ordinary["saved_by_linear"],
        "peak_bytes": ordinary["peak"],
        "refresh_peak_bytes": refresh["peak"] if name != "adamw" else ordinary["peak"],
        "formula": _formula(setting, optimizer, trained, layers),
    }


def _layers(trained: Trained) -> list[nn.Linear]:
    if trained.handle is not None:
        return list(trained.handle.layers)
    return list(select_linear(trained.model, "all-linear", EXCLUDED).values())


def _step(trained: Trained, batch: Tensor, layers: list[nn.Linear], form_largest: bool = False) -> dict[str, int]:
    """Take a whole step, and count.

    Args:
        form_largest: let the backward-side layers with the largest gradient choose a basis, whatever is due.
    """
    optimizer = trained.optimizer
    held = [*trained.model.parameters(), *trained.model.buffers(), *_tensors(optimizer), batch]
    with LiveBytes(held) as live:
        if form_largest and trained.handle is not None:
            chosen = max(trained.handle.projections, key=lambda p: sum(layer.weight.numel() for layer in p.layers))
            if isinstance(optimizer, SubspaceOptimizer) and optimizer.selector.needs_gradient:
                chosen.expect("form")
        with SavedBytes(trained.model, layers, _tensors(optimizer)) as saved:
            loss = trained.forward(batch)
        loss.backward()
        gradients = sum(
            p.grad.numel() * p.grad.element_size() for p in trained.model.parameters() if p.grad is not None
        )
        optimizer.step()
        del loss
    optimizer.zero_grad(set_to_none=True)
    return {"peak": live.peak, "saved": saved.total, "saved_by_linear": saved.by_layers, "gradients": gradients}


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def _basis_bytes(optimizer: torch.optim.Optimizer) -> int:
    if not isinstance(optimizer, SubspaceOptimizer):
        return 0
    names = set(optimizer.selector.init(torch.zeros(2, 2), 1))
    kept = [state[name] for state in optimizer.state.values() for name in names & state.keys()]
    return sum(value.numel() * value.element_size() for value in kept if isinstance(value, Tensor))


def _formula(setting: Setting, name: str, trained: Trained, layers: Iterable[nn.Linear]) -> dict[str, int]:
    """These are the same bytes, computed from shapes in fp32: weights W (out, in), tokens T, ranks r, sketches s.

    Layers that share an input count it once, and those that share a basis count ``x [Q O]`` once. Where the bases of an
    input would keep more than the input, it is kept instead.
    """
    T, llama = setting.tokens, llama_of(PRESETS[setting.model])
    way = Way(name, backward_side=trained.handle is not None, own_bases=setting.share == "none")
    traffic = Traffic(llama, setting.rank, 1, way, rank_pattern=setting.rank_pattern)
    projected = {id(layer.weight) for layer in layers}
    shapes = [(tuple(p.shape), id(p)) for key, p in trained.model.named_parameters() if not key.endswith(".carrier")]
    elements = {identity: torch.Size(shape).numel() for shape, identity in shapes}
    full = sum(count for identity, count in elements.items() if identity not in projected)
    every = sum(elements.values())
    low = sum(one.layer.out * one.columns for one in traffic.projected)
    inputs = llama.layers * sum(group[0].inputs for group in llama.sharing)
    held = StateCosts.of_recipe(name).bytes_held(trained.optimizer.param_groups)
    return {
        "weight_bytes": 4 * every,
        "carrier_bytes": 4 * low if way.backward_side else 0,
        "gradient_bytes": 4 * (full + low if way.backward_side else every),
        "state_bytes": held["states"],
        "basis_bytes": held["bases"],
        "linear_activation_bytes": 4 * T * (traffic.kept if way.backward_side else inputs),
    }
