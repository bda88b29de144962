"""Linear algebra of subspaces, on plain tensors: it knows no optimizer, parameter group or rank.

Shapes: gradient ``G (..., m, n)`` with the side to compress last, basis ``Q (..., n, r)`` with orthonormal columns.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch does not declare it


LARGE = 512
"""Side of the Gram matrix from which on factorisations on a CPU are in fp32, and the Gram matrix is made in blocks."""


def spectral_dtype(device: torch.device, n: int = 0) -> torch.dtype:
    """The least precision of a factorisation, ``n`` the side of the Gram matrix: fp64 on a CPU if below ``LARGE``, else
    fp32.

    The Gram matrix squares the condition number, so in fp32 singular values below ``3e-4`` of the largest are noise of
    that size. fp64 takes twice the time on a CPU, which is nothing where matrices are small, and far more on other
    devices.
    """
    return torch.float64 if device.type == "cpu" and n < LARGE else torch.float32


def _dtype_for(G: Tensor, side: int) -> torch.dtype:
    """The precision of a factorisation of ``G`` over a Gram matrix of this side."""
    return torch.promote_types(G.dtype, spectral_dtype(G.device, side))


@dataclass(frozen=True)
class Gram:
    """``GᵀG (n, n)``, for a gradient ``G`` whose rows are on several ranks: all that its right singular vectors depend
    on.
    """

    matrix: Tensor
    """``GᵀG``, in ``spectral_dtype``."""
    row: Tensor
    """``(1, n)``: any row of the kind of ``G``."""
    rows: int
    """``m``, on all ranks: beyond ``min(m, n)`` what an eigendecomposition finds is no singular vector of ``G``."""

    @property
    def shape(self) -> torch.Size:
        """Of one row."""
        return self.row.shape

    @property
    def ndim(self) -> int:
        """Two."""
        return self.row.ndim

    @property
    def dtype(self) -> torch.dtype:
        """Of ``G``."""
        return self.row.dtype

    @property
    def device(self) -> torch.device:
        """Of ``G``."""
        return self.row.device


def gram(G: Tensor) -> Tensor:
    """``GᵀG``, in ``spectral_dtype``."""
    return _squared(G.to(_dtype_for(G, G.shape[-1])))


def _squared(G: Tensor) -> Tensor:
    """``GᵀG`` of a large matrix in blocks: it is symmetric, so those below the diagonal need not be computed."""
    n = G.shape[-1]
    if n < LARGE or G.ndim > 2:
        return G.mT @ G
    half = n // 2
    left, right = G[:, :half], G[:, half:]
    S = G.new_empty(n, n)
    S[:half, :half] = _squared(left)
    S[half:, half:] = _squared(right)
    torch.mm(left.mT, right, out=S[:half, half:])
    S[half:, :half] = S[:half, half:].mT
    return S


def gram_flops(m: int, n: int) -> int:
    """FLOPs of the Gram matrix of ``(m, n)``: ``2 m n²``, and of a large one nearly half."""
    if n < LARGE:
        return 2 * m * n * n
    half = n // 2
    return gram_flops(m, half) + gram_flops(m, n - half) + 2 * m * half * (n - half)


def column_norms(G: Tensor | Gram) -> Tensor:
    """``||G_i|| (..., n)``, in fp64."""
    if isinstance(G, Gram):
        return G.matrix.diagonal().double().clamp_min(0).sqrt()
    return torch.linalg.vector_norm(G, dim=-2, dtype=torch.float64)


def largest(G: Tensor | Gram) -> float:
    """Zero if ``G`` is, not finite if it is not, else of the size of its entries. Waits for the device."""
    return float(column_norms(G).amax() if isinstance(G, Gram) else torch.linalg.vector_norm(G, ord=torch.inf))


def right_singular(G: Tensor | Gram, method: str = "gram", dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Singular values and right singular vectors of ``G (..., m, n)``.

    Args:
        G: finite, not entirely zero; or its Gram matrix.
        method: ``"gram"`` (``eigh`` of the smaller of ``GᵀG`` and ``GGᵀ``; several times cheaper) or ``"svd"``.
        dtype: precision of the factorisation of a ``G``; ``None`` is ``spectral_dtype``.

    Returns:
        ``sigma (..., k)`` in descending order and ``V (..., n, k)`` with orthonormal columns, ``k = min(m, n)``.
        Where ``sigma`` is zero, the columns of ``V`` complete the basis.

    Raises:
        LinAlgError: if neither method gives a finite answer.
    """
    ways: Sequence[Callable[[Tensor], tuple[Tensor, Tensor]]]
    if isinstance(G, Gram):
        A, ways = G.matrix, (_eigh, _svd_of_gram)
    else:
        A, ways = G.to(dtype or _dtype_for(G, min(G.shape[-2:]))), (_svd, _gram) if method == "svd" else (_gram, _svd)
    for factorise in ways:
        try:
            sigma, V = factorise(A)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # LinAlgError is one; cuSOLVER's own failures are others
            continue
        # Some drivers return NaN where others raise.
        if sigma.isfinite().all() and V.isfinite().all():
            k = min(G.rows, V.shape[-1]) if isinstance(G, Gram) else V.shape[-1]
            return sigma[..., :k], V[..., :k]
    raise LinAlgError(f"no finite singular vectors of a matrix of shape {tuple(G.shape)}")


def _svd(G: Tensor) -> tuple[Tensor, Tensor]:
    _, sigma, Vh = torch.linalg.svd(G, full_matrices=False)
    return sigma, Vh.mT


def _gram(G: Tensor) -> tuple[Tensor, Tensor]:
    # Scaled first: the square of a small gradient would underflow, of a large one overflow.
    largest = torch.linalg.vector_norm(G, ord=torch.inf, dim=(-2, -1), keepdim=True)
    G = G / largest.clamp_min(torch.finfo(G.dtype).tiny)
    m, n = G.shape[-2:]
    sigma, vectors = _eigh(_squared(G if n <= m else G.mT))
    # V = Gᵀ U / sigma: the QR does the division, and stays orthonormal where sigma is (nearly) zero.
    return sigma * largest.squeeze(-1), vectors if n <= m else orthonormalise(G.mT @ vectors)


def _eigh(S: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(S)
    # eigh sorts ascending; rounding makes zero eigenvalues slightly negative.
    return values.flip(-1).clamp_min(0).sqrt(), vectors.flip(-1)


def _svd_of_gram(S: Tensor) -> tuple[Tensor, Tensor]:
    squares, V = _svd(S)
    return squares.sqrt(), V


def orthonormalise(A: Tensor) -> Tensor:
    """``Q`` of the QR factorisation of ``A (..., n, r)``, made unique by a positive diagonal of its triangular
    factor.
    """
    Q, R = torch.linalg.qr(A)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    return Q * torch.where(diagonal < 0, -1.0, 1.0).to(Q.dtype).unsqueeze(-2)


def fix_signs(Q: Tensor, reference: Tensor) -> Tensor:
    """Choose the sign of each column: that of its partner in ``reference``, else the one that makes its largest entry
    positive.

    A singular vector's sign is arbitrary and differs between drivers and machines. Moments that are kept across a
    refresh are coordinates along these columns, so an arbitrary flip would reverse them.
    """
    agreement = (Q * reference.to(Q.dtype)).sum(-2, keepdim=True)
    largest = Q.gather(-2, Q.abs().argmax(-2, keepdim=True))
    return torch.where(torch.where(agreement == 0, largest, agreement) < 0, -Q, Q)


def keyed_seed(*key: object) -> int:
    """A seed, below 2^63, that depends on ``key`` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on ``key`` alone: on the CPU, the same on every rank and device, and after a resume."""
    return torch.Generator(device).manual_seed(keyed_seed(*key))


def haar(like: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal columns, uniform on the Stiefel manifold, in the shape ``(..., n, r)`` and on the device of ``like``.

    QR of a Gaussian is uniform only once the signs of the triangular factor's diagonal are fixed (Mezzadri 2007, arXiv
    math-ph/0609050, section 5).
    """
    Z = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    return orthonormalise(Z.to(like.device, spectral_dtype(like.device)))


def usable(G: Tensor) -> Tensor:
    """Whether each matrix of ``G (..., m, n)`` is finite and not zero, ``(..., 1, 1)``. Does not wait for the
    device.
    """
    largest = torch.linalg.vector_norm(G, ord=torch.inf, dim=(-2, -1), keepdim=True)
    return largest.isfinite() & (largest > 0)


def sample_without_replacement(log_weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices, ascending, of ``count`` of ``n`` items drawn one after another with probability proportional to weight.

    Gumbel-top-k: the ``count`` largest of ``log w_i + Gumbel_i`` are distributed as successive draws without
    replacement (Yellott 1977; Kool et al. 2019, arXiv 1903.06059). Items of weight zero (``-inf``) are drawn only when
    no others are left, so a rank-deficient matrix is no error.

    Args:
        log_weights: ``(..., n)``, on any device; normalisation is not needed.
    """
    weights = log_weights.to("cpu", torch.float64)
    uniform = torch.rand(weights.shape, generator=generator, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
    # Below any logarithm of a positive weight, and still in random order among themselves.
    score = torch.where(weights.isneginf(), gumbel - 1e12, weights + gumbel)
    return score.topk(count, dim=-1).indices.sort(-1).values


def project(G: Tensor, Q: Tensor) -> Tensor:
    """``G Q``, accumulated and returned in the precision of ``Q``.

    A gradient of lower precision is raised a few rows at a time: no full-size copy is made.
    """
    if G.dtype == Q.dtype:
        return G @ Q
    return torch.cat([rows.to(Q.dtype) @ Q for rows in G.split(256, dim=-2)], dim=-2)
