"""Stochastic rounding: updates of bf16 weights that are right on average."""

import torch
from torch import Tensor

_CHUNK = 1 << 20  # entries raised to fp32 at a time, so that no second full-size temporary is made


def add_rounded_(p: Tensor, D: Tensor, keep: float | Tensor, generator: torch.Generator) -> None:
    """Compute ``p <- round(keep * p + D)`` at random, with ``E[p] = keep * p + D``.

    Each entry is rounded to one of its two neighbours in bf16. Rounding to the nearest would drop every update below
    1/512 of a weight, and all of a small weight decay.

    Args:
        p: weight in bf16.
        D: update in fp32, of the shape of ``p``. It is overwritten.
        keep: factor on the old value, such as ``1 - lr * weight_decay``.
        generator: source of the random numbers, on the device of ``p``.
    """
    if p.ndim == 0:
        p, D = p.unsqueeze(0), D.unsqueeze(0)
    rows = max(1, _CHUNK // max(1, p[0].numel())) if p.shape[0] else 1
    for target, new in zip(p.split(rows), D.split(rows), strict=True):
        new.add_(target.float() * keep)
        bits = new.view(torch.int32)
        # A bf16 number is the upper half of an fp32 one: a random lower half carries over as often as it should.
        noise = torch.randint(1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
        rounded = noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32)
        # A number that is not finite would carry over into another one.
        target.copy_(torch.where(new.isfinite(), rounded, new))
