"""Linear algebra of subspaces, on plain tensors. Nothing here knows of optimizers, parameter groups or processes.

Shapes: gradient ``G (..., m, n)`` with the side to compress last, basis ``Q (..., n, r)`` with orthonormal columns.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch does not declare it


LARGE = 512
"""From this side of the Gram matrix on, a CPU factorises in fp32, and the Gram matrix is computed in blocks."""


def spectral_dtype(device: torch.device, n: int = 0) -> torch.dtype:
    """Return the least precision of a factorisation: fp64 on a CPU if ``n`` is below ``LARGE``, and fp32 otherwise.

    ``n`` is the side of the Gram matrix. The Gram matrix squares the condition number, so in fp32 singular values below
    ``3e-4`` of the largest are noise of that size. fp64 takes twice the time on a CPU, which does not matter for small
    matrices, and far more on other devices.
    """
    return torch.float64 if device.type == "cpu" and n < LARGE else torch.float32


def _dtype_for(G: Tensor, side: int) -> torch.dtype:
    """Return the precision of a factorisation of ``G`` whose Gram matrix has this side."""
    return torch.promote_types(G.dtype, spectral_dtype(G.device, side))


@dataclass(frozen=True)
class Gram:
    """``GᵀG (n, n)`` of a gradient ``G`` with rows on several ranks. It determines the right singular vectors."""

    matrix: Tensor
    """``GᵀG``, in ``spectral_dtype``."""
    row: Tensor
    """Any ``(1, n)`` tensor with the dtype and device of ``G``."""
    rows: int
    """``m``, the rows on all ranks. After the first ``min(m, n)``, eigenvectors are no singular vectors of ``G``."""

    @property
    def shape(self) -> torch.Size:
        """Shape of one row, ``(1, n)``."""
        return self.row.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions, 2."""
        return self.row.ndim

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of ``G``."""
        return self.row.dtype

    @property
    def device(self) -> torch.device:
        """Device of ``G``."""
        return self.row.device


def gram(G: Tensor) -> Tensor:
    """Return ``GᵀG``, in ``spectral_dtype``."""
    return _squared(G.to(_dtype_for(G, G.shape[-1])))


def _squared(G: Tensor) -> Tensor:
    """Return ``GᵀG``. A large one is computed in blocks; as it is symmetric, those below the diagonal are copied."""
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
    """Return the FLOPs of the Gram matrix of a matrix ``(m, n)``: ``2 m n²``, or nearly half of it if it is large."""
    if n < LARGE:
        return 2 * m * n * n
    half = n // 2
    return gram_flops(m, half) + gram_flops(m, n - half) + 2 * m * half * (n - half)


def column_norms(G: Tensor | Gram) -> Tensor:
    """Return the norm ``||G_i||`` of each column, ``(..., n)``, in fp64 on the CPU. Waits for the device."""
    if isinstance(G, Gram):
        return G.matrix.diagonal().to("cpu", torch.float64).clamp_min(0).sqrt()
    norms, unit = scaled_norm(G, -2)
    return norms.to("cpu", torch.float64) * unit.to("cpu", torch.float64)


def scaled_norm(G: Tensor, dim: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return a norm of ``G`` over ``dim`` as the product of two tensors, neither of which underflows or overflows.

    On the CPU the first is the norm in fp64, and the second is 1. Other devices may have no fp64: there the second is
    the largest entry.
    """
    if G.device.type == "cpu":
        return torch.linalg.vector_norm(G, dim=dim, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    largest = torch.linalg.vector_norm(G, ord=torch.inf, dim=dim, keepdim=True)
    divided = G.float() / torch.where(largest > 0, largest, 1.0).float()
    return torch.linalg.vector_norm(divided, dim=dim), largest.squeeze(dim).float()


def largest(G: Tensor | Gram) -> float:
    """Return a number of the size of the entries of ``G``. Waits for the device.

    It is zero if ``G`` is zero, and not finite if ``G`` is not.
    """
    return float(column_norms(G).amax() if isinstance(G, Gram) else torch.linalg.vector_norm(G, ord=torch.inf))


def right_singular(G: Tensor | Gram, method: str = "gram", dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return singular values and right singular vectors of ``G (..., m, n)``.

    Args:
        G: finite and not entirely zero; or its Gram matrix.
        method: ``"gram"`` (``eigh`` of the smaller of ``GᵀG`` and ``GGᵀ``, several times cheaper) or ``"svd"``.
        dtype: precision of the factorisation, unless ``G`` is a Gram matrix. ``None`` means ``spectral_dtype``.

    Returns:
        ``sigma (..., k)`` in descending order and ``V (..., n, k)`` with orthonormal columns, ``k = min(m, n)``.
        Where ``sigma`` is zero, the columns of ``V`` complete the basis.

    Raises:
        LinAlgError: neither method gives a finite answer.
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
        except RuntimeError:  # LinAlgError is one, and cuSOLVER's own failures are others
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
    # Scaled first, because the square of a small gradient would underflow and that of a large one overflow.
    largest = torch.linalg.vector_norm(G, ord=torch.inf, dim=(-2, -1), keepdim=True)
    G = G / largest.clamp_min(torch.finfo(G.dtype).tiny)
    m, n = G.shape[-2:]
    sigma, vectors = _eigh(_squared(G if n <= m else G.mT))
    # V = Gᵀ U / sigma. The QR does the division, and its columns stay orthonormal where sigma is (nearly) zero.
    return sigma * largest.squeeze(-1), vectors if n <= m else orthonormalise(G.mT @ vectors)


def _eigh(S: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(S)
    # eigh sorts ascending, and rounding makes zero eigenvalues slightly negative.
    return values.flip(-1).clamp_min(0).sqrt(), vectors.flip(-1)


def _svd_of_gram(S: Tensor) -> tuple[Tensor, Tensor]:
    squares, V = _svd(S)
    return squares.sqrt(), V


def orthonormalise(A: Tensor) -> Tensor:
    """Return ``Q`` of the QR factorisation of ``A (..., n, r)``.

    It is unique, because the diagonal of the triangular factor is made positive.
    """
    Q, R = torch.linalg.qr(A)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    return Q * torch.where(diagonal < 0, -1.0, 1.0).to(Q.dtype).unsqueeze(-2)


def fix_signs(Q: Tensor, reference: Tensor) -> Tensor:
    """Choose the sign of each column, so that it agrees with the same column of ``reference``.

    Where the two are orthogonal, the largest entry of the column is made positive. A singular vector's sign is
    arbitrary, and it differs between drivers and machines. Moments that are kept across a refresh are coordinates along
    these columns, so an arbitrary flip would reverse them.
    """
    agreement = (Q * reference.to(Q.dtype)).sum(-2, keepdim=True)
    largest = Q.gather(-2, Q.abs().argmax(-2, keepdim=True))
    return torch.where(torch.where(agreement == 0, largest, agreement) < 0, -Q, Q)


def keyed_seed(*key: object) -> int:
    """Return a seed below 2^63 that depends only on ``key``."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that depends only on ``key``.

    On the CPU, its numbers are the same on every rank, for every device, and after a resume.
    """
    return torch.Generator(device).manual_seed(keyed_seed(*key))


def haar(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw orthonormal columns, uniform on the Stiefel manifold, with the shape ``(..., n, r)`` and device of ``like``.

    The QR factorisation of a Gaussian matrix is uniform only after the signs of the triangular factor's diagonal are
    fixed (Mezzadri 2007, arXiv math-ph/0609050, section 5).
    """
    Z = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    return orthonormalise(Z.to(like.device, spectral_dtype(like.device)))


def usable(G: Tensor) -> Tensor:
    """Tell whether each matrix of ``G (..., m, n)`` is finite and not zero, as a tensor ``(..., 1, 1)``.

    This does not wait for the device.
    """
    largest = torch.linalg.vector_norm(G, ord=torch.inf, dim=(-2, -1), keepdim=True)
    return largest.isfinite() & (largest > 0)


def sample_without_replacement(log_weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` of ``n`` items one after another, with probabilities proportional to their weights.

    Gumbel-top-k: the ``count`` largest of ``log w_i + Gumbel_i`` are distributed as successive draws without
    replacement (Yellott 1977; Kool et al. 2019, arXiv 1903.06059). Items of weight zero (``-inf``) are drawn only when
    no others are left, so a rank-deficient matrix is no error.

    Args:
        log_weights: logarithms of the weights, ``(..., n)``, on any device. They need not be normalised.
        count: number of items to draw.
        generator: source of the random numbers, on the CPU.

    Returns:
        The indices ``(..., count)``, ascending.
    """
    weights = log_weights.to("cpu", torch.float64)
    uniform = torch.rand(weights.shape, generator=generator, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
    # Items of weight zero come after all others, and are still in random order among themselves.
    score = torch.where(weights.isneginf(), gumbel - 1e12, weights + gumbel)
    return score.topk(count, dim=-1).indices.sort(-1).values


def project(G: Tensor, Q: Tensor) -> Tensor:
    """Return ``G Q``, accumulated in the precision of ``Q``.

    A gradient of lower precision is converted a few rows at a time, so that no full-size copy is made.
    """
    if G.dtype == Q.dtype:
        return G @ Q
    return torch.cat([rows.to(Q.dtype) @ Q for rows in G.split(256, dim=-2)], dim=-2)
