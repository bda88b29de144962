"""The learning rate over a run."""

import math


def lr_factor(step: int, steps: int, warmup: int, floor: float) -> float:
    """Linear warmup to 1 over ``warmup`` steps, then half a cosine down to ``floor`` at the last of ``steps``."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
