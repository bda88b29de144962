"""How the directions of a sketch are drawn.

A draw is a function ``(like, rank, outside, generator) -> O (..., n, s)``, in the shape, dtype and device of ``like``.
``outside`` maps ``(..., k, n)`` to what of it lies outside the basis ``Q (n, r)``: it multiplies by the projector ``P =
I - Q Qᵀ``. Laws, for each basis:

    Qᵀ O = 0,    E[O Oᵀ] = P

so ``G O Oᵀ`` is what lies outside the basis, on average. For a row ``g`` that lies outside, the variance
``E||g O Oᵀ - g||²`` is ``((n - r) / s - 1) ||g||²`` with ``gaussian``, and at most ``(n / s - 1) ||g||²`` with the
others.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from subspan import linalg

Draw = Callable[[Tensor, int, Callable[[Tensor], Tensor], torch.Generator], Tensor]


def gaussian(like: Tensor, rank: int, outside: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
    """Draw orthonormal directions, uniform among those outside the basis, times ``sqrt((n - r) / s)``.

    A Gaussian matrix is projected and orthonormalised. With ``s = n - r`` they are all directions, and ``O Oᵀ = P``.
    """
    n, s = like.shape[-2:]
    Z = torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.device, like.dtype)
    precise = torch.promote_types(like.dtype, linalg.spectral_dtype(like.device, n))
    O = linalg.orthonormalise(outside(Z.mT).mT.to(precise)).to(like.dtype)
    # Nearly all directions of a space may be ill-conditioned, and then rounding has put something of the basis into
    # them. To take it out again changes their norms by its square.
    return outside(O.mT).mT * math.sqrt((n - rank) / s)


def axes(columns: int, width: int, generator: torch.Generator, batch: Sequence[int] = ()) -> Tensor:
    """Draw ``width`` of the columns without replacement, each as likely as any other; return them, ``(..., width)``."""
    return torch.rand(*batch, columns, generator=generator).topk(width).indices


def coordinates(like: Tensor, rank: int, outside: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
    """Draw ``s`` of the ``n`` coordinates without replacement, each as likely as any other: ``O = sqrt(n / s) P E``.

    As ``E[E Eᵀ] = (s / n) I``, ``E[O Oᵀ] = P P = P``. As ``||O Oᵀ gᵀ|| <= (n / s) ||Eᵀ gᵀ||`` for a row ``g`` outside,
    the variance is at most ``(n / s - 1) ||g||²``. Nothing is orthonormalised.
    """
    n, s = like.shape[-2:]
    index = axes(n, s, generator, like.shape[:-2]).to(like.device)
    E = torch.zeros_like(like).scatter_(-2, index.unsqueeze(-2), math.sqrt(n / s))
    return outside(E.mT).mT


def cosines(like: Tensor, rank: int, outside: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
    """Draw ``s`` of the ``n`` columns of a cosine transform with random signs: ``O = sqrt(n / s) P diag(signs) H``.

    The whole transform (DCT-II) is orthonormal, so the columns ``H``, drawn without replacement, have ``E[H Hᵀ] = (s /
    n) I``, and ``E[O Oᵀ] = P``. Other than a coordinate, each direction mixes all columns of the gradient. The signs,
    one for each row of ``O``, keep gradients that are smooth along the columns from being aligned with a few of them.
    Nothing is orthonormalised.
    """
    n, s = like.shape[-2:]
    signs = torch.randint(2, (*like.shape[:-2], n, 1), generator=generator) * 2 - 1
    k = axes(n, s, generator, like.shape[:-2]).unsqueeze(-2)
    i = torch.arange(n).unsqueeze(-1)
    # Whole turns are left out as integers. Then the angle is exact, however large n is.
    angle = ((2 * i + 1) * k % (4 * n)).to(like.device, like.dtype) * (math.pi / (2 * n))
    norm = (2 - (k == 0).to(like.device, like.dtype)).div(n).sqrt()
    H = angle.cos() * norm * signs.to(like.device, like.dtype)
    return outside(H.mT).mT * math.sqrt(n / s)


DRAWS: dict[str, Draw] = {"gaussian": gaussian, "coordinates": coordinates, "cosines": cosines}
"""Draws by name."""
