"""Time of a whole training step against torch's fused AdamW: pairs of steps in one process, medians of ratios."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from subspan.bench import timing
from subspan.bench.setting import Setting, Trained, build


def measure(setting: Setting, pairs: int, optimizer: str = "sara_adamw") -> dict[str, Any]:
    """Measure ordinary steps of a backward-side optimizer over those of fused AdamW, on the same model and batch.

    Args:
        setting: the model and the batch.
        pairs: number of pairs of steps, one of each, in alternating order. Two more pairs warm up.
        optimizer: name of the backward-side optimizer.
    """
    timing.check_rounds("pairs", pairs)
    if setting.threads:
        torch.set_num_threads(setting.threads)
    batch = setting.batch()
    ours, theirs = build(setting, optimizer, backward_side=True), build(setting, "adamw", fused=True)
    for _ in range(2):  # the first steps also draw the first bases
        _step(theirs, batch)
        _step(ours, batch)
    flops = [_flops(trained, batch) for trained in (ours, theirs)]
    seconds = timing.rounds(
        {"ours": lambda: _step(ours, batch), "theirs": lambda: _step(theirs, batch)}, pairs, warm_up=0
    )
    return {
        "ratio_vs_adamw_fused": timing.interval(timing.median_ratio, zip(*seconds.values(), strict=True)),
        "seconds": {optimizer: timing.median(seconds["ours"]), "adamw_fused": timing.median(seconds["theirs"])},
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
        projection.expect("keep")  # the next step too is an ordinary one


def _flops(trained: Trained, batch: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        _step(trained, batch)
    return counter.get_total_flops()
