"""The learning rate over the steps of a run."""

import math


def lr_factor(step: int, steps: int, warmup: int, floor: float, shape: str = "cosine") -> float:
    """The factor on the learning rate in ``step``, which counts from 0.

    It rises in a line to 1 over ``warmup`` steps, then falls to ``floor`` at the last of ``steps``.

    Args:
        shape: how it falls: ``cosine`` (half a period), ``linear``, or ``constant``, which stays at 1.
    """
    if step < warmup:
        return (step + 1) / warmup
    if shape == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return floor + (1 - floor) * (1 - done if shape == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
