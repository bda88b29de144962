"""Time of a whole training step against torch's fused AdamW: interleaved pairs in one process, medians of ratios."""

import statistics
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from subspan.bench.setting import Setting, Trained, build


def measure(setting: Setting, pairs: int, optimizer: str = "sara_adamw") -> dict[str, Any]:
    """Ordinary steps of backward-side ``optimizer`` over those of fused AdamW, on the same model and batch.

    Args:
        pairs: of steps, one of each, the order alternating; two more warm up.
    """
    if pairs < 3:
        raise ValueError(f"pairs={pairs}: expected a whole number >= 3")
    if setting.threads:
        torch.set_num_threads(setting.threads)
    batch = setting.batch()
    ours, theirs = build(setting, optimizer, backward_side=True), build(setting, "adamw", fused=True)
    for _ in range(2):  # also the first bases, which are drawn
        _step(theirs, batch)
        _step(ours, batch)
    flops = [_flops(trained, batch) for trained in (ours, theirs)]
    ratios, seconds = [], []
    for number in range(pairs):
        order = (ours, theirs) if number % 2 else (theirs, ours)
        taken = {id(trained): _timed(trained, batch) for trained in order}
        ratios.append(taken[id(ours)] / taken[id(theirs)])
        seconds.append(taken[id(theirs)])
    low, high = _interval(ratios)
    return {
        "ratio_vs_adamw_fused": {"median": statistics.median(ratios), "low": low, "high": high},
        "flops_ratio": flops[0] / flops[1],
        "flops": {optimizer: flops[0], "adamw_fused": flops[1]},
        "pairs": pairs,
        "shapes": {
            "model": setting.model,
            "hidden": ours.model.config.hidden_size,  # type: ignore[union-attr]  # transformers' config
            "layers": ours.model.config.num_hidden_layers,  # type: ignore[union-attr]
            "vocabulary": ours.model.config.vocab_size,  # type: ignore[union-attr]
            "tokens": setting.tokens,
            "sequence_length": setting.sequence_length,
            "rank": setting.rank,
        },
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _step(trained: Trained, batch: torch.Tensor) -> None:
    trained.forward(batch).backward()
    trained.optimizer.step()
    trained.optimizer.zero_grad(set_to_none=True)
    for projection in trained.handle.projections if trained.handle else ():
        projection.plan = "keep"  # the next step too is an ordinary one


def _timed(trained: Trained, batch: torch.Tensor) -> float:
    began = time.perf_counter()
    _step(trained, batch)
    return time.perf_counter() - began


def _flops(trained: Trained, batch: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        _step(trained, batch)
    return counter.get_total_flops()


def _interval(ratios: list[float]) -> tuple[float, float]:
    """A bootstrap interval of 95 % of the median."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(ratios, dtype=torch.float64)
    index = torch.randint(len(ratios), (2000, len(ratios)), generator=generator)
    medians = values[index].quantile(0.5, dim=1)
    return float(medians.quantile(0.025)), float(medians.quantile(0.975))
