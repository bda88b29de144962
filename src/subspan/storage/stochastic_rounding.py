"""Updates of bf16 weights that are right on average: stochastic rounding."""

import torch
from torch import Tensor

_CHUNK = 1 << 20  # entries raised to fp32 at a time, so that no second full-size temporary is made


def add_rounded_(p: Tensor, D: Tensor, keep: float | Tensor, generator: torch.Generator) -> None:
    """``p <- round(keep * p + D)``, each entry rounded to one of its two bf16 neighbours, with ``E[p] = keep * p + D``.

    Rounding to nearest drops every update below 1/512 of a weight, and all of a small weight decay.

    Args:
        p: bf16.
        D: fp32, of the shape of ``p``; overwritten.
        keep: factor on the old value, such as ``1 - lr * weight_decay``.
        generator: on the device of ``p``.
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
        target.copy_(
            torch.where(new.isfinite(), rounded, new)
        )  # what is not finite would carry over into another number
