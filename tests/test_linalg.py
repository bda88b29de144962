"""Spectrum, sampling and projection against torch.linalg, enumeration and invariants."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import RANK, SHAPES
from torch.utils.flop_counter import FlopCounterMode

from subspan import linalg
from subspan.selectors import Importance

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_orthonormal(Q: torch.Tensor, tolerance: float = 1e-12) -> None:
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype)
    assert (Q.mT @ Q - eye).abs().max() < tolerance


@shapes
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (1e-20, torch.float32),
        (1.0, torch.float32),
        (1e18, torch.float32),
        (1e-200, torch.float64),
        (1e200, torch.float64),
    ],
)
@pytest.mark.parametrize("method", ["gram", "svd"])
def test_spectrum_is_that_of_the_svd(shape, scale, dtype, method):
    """Singular values and leading subspaces equal torch.linalg.svd's, also where the square leaves the range of the
    dtype.
    """
    G = gaussian(*shape, dtype=dtype) * scale
    _, s, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    sigma, V = linalg.right_singular(G, method)
    torch.testing.assert_close(sigma, s, rtol=1e-9, atol=0)
    assert V.shape == (shape[1], min(shape))
    assert_orthonormal(V)
    for r in (1, RANK, min(shape) - 1):
        torch.testing.assert_close(V[:, :r] @ V[:, :r].T, Vh[:r].T @ Vh[:r], rtol=0, atol=1e-9)


@shapes
def test_rank_deficient_spectrum(shape):
    """Where sigma is zero the columns complete an orthonormal basis; the others still span the row space."""
    m, n = shape
    G = gaussian(m, 3) @ gaussian(3, n, seed=1)
    sigma, V = linalg.right_singular(G)
    s = torch.linalg.svdvals(G)
    torch.testing.assert_close(sigma[:3], s[:3], rtol=1e-9, atol=0)
    assert (sigma[3:] < 1e-7 * s[0]).all()
    assert_orthonormal(V)
    torch.testing.assert_close(G @ V[:, :3] @ V[:, :3].T, G, rtol=0, atol=1e-9 * s[0].item())


def test_batched_spectrum_is_that_of_each_matrix():
    """A stack of matrices is factorised matrix by matrix."""
    stack = gaussian(3, 20, 48)
    sigma, V = linalg.right_singular(stack)
    for index, G in enumerate(stack):
        s, v = linalg.right_singular(G)
        torch.testing.assert_close(sigma[index], s, rtol=1e-12, atol=0)
        torch.testing.assert_close(V[index].abs(), v.abs(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("failure", ["raises", "nan"])
def test_a_failing_driver_is_replaced_by_the_other(monkeypatch, failure):
    """If eigh raises or answers NaN, the SVD answers (contract R11)."""
    G = gaussian(48, 20)
    _, s, _ = torch.linalg.svd(G)

    def eigh(A):
        if failure == "raises":
            raise torch.linalg.LinAlgError("no convergence")
        return torch.full_like(A[..., 0], torch.nan), torch.full_like(A, torch.nan)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    sigma, V = linalg.right_singular(G)
    torch.testing.assert_close(sigma, s, rtol=1e-10, atol=0)
    assert_orthonormal(V)


def test_both_drivers_failing_raises(monkeypatch):
    """With no driver left the error is LinAlgError, and names the shape."""

    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    monkeypatch.setattr(torch.linalg, "svd", fail)
    with pytest.raises(torch.linalg.LinAlgError, match=r"\(48, 20\)"):
        linalg.right_singular(gaussian(48, 20))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(n=st.integers(1, 30), data=st.data(), seed=st.integers(0, 1000))
def test_orthonormalise_is_the_unique_qr(n, data, seed):
    """Orthonormal columns, ``Qᵀ A`` upper triangular with a positive diagonal, for any shape and rank."""
    r = data.draw(st.integers(1, n))
    A = gaussian(n, r, seed=seed)
    Q = linalg.orthonormalise(A)
    assert_orthonormal(Q)
    R = Q.T @ A
    assert (R.diagonal() > 0).all()
    assert R.tril(-1).abs().max() < 1e-12
    torch.testing.assert_close(Q @ R, A, rtol=0, atol=1e-12)


def test_fix_signs():
    """A column takes the sign of its partner; without one, its largest entry is positive. Flips of the input vanish."""
    Q = linalg.orthonormalise(gaussian(20, RANK))
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=Q.dtype)
    reference = Q * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=Q.dtype)
    torch.testing.assert_close(linalg.fix_signs(Q * flips, reference), reference, rtol=0, atol=0)
    alone = linalg.fix_signs(Q * flips, torch.zeros_like(Q))
    torch.testing.assert_close(alone, linalg.fix_signs(Q, torch.zeros_like(Q)), rtol=0, atol=0)
    assert (alone.gather(0, alone.abs().argmax(0, keepdim=True)) > 0).all()


def test_keyed_generator_depends_on_every_part_of_the_key():
    """Equal keys draw the same numbers; a change of any one part, or of how they are joined, draws others."""

    def draw(*key: object) -> float:
        return torch.rand((), generator=linalg.keyed_generator(*key), dtype=torch.float64).item()

    assert draw("random", 0, "a.weight", 200) == draw("random", 0, "a.weight", 200)
    keys = [
        ("random", 0, "a.weight", 200), ("importance", 0, "a.weight", 200), ("random", 1, "a.weight", 200),
        ("random", 0, "b.weight", 200), ("random", 0, "a.weight", 400), ("random", 0, "a.weight2", 0),
        ("random", 0, "a.weight", 20),
    ]  # fmt: skip
    assert len({draw(*key) for key in keys}) == len(keys)


def test_keyed_generator_leaves_the_global_one_alone():
    """A keyed draw neither reads nor moves the process's own generator."""
    before = torch.get_rng_state()
    torch.randn(3, generator=linalg.keyed_generator("x"))
    assert torch.equal(torch.get_rng_state(), before)


def test_haar_moments():
    """Uniform on the Stiefel manifold: E[Q] = 0, E[QQᵀ] = (r/n) I, and along any unit vector E[(u·q)⁴] = 3 / (n (n +
    2)).
    """
    n, r, draws = 6, 2, 40_000
    Q = linalg.haar(torch.empty(draws, n, r), torch.Generator().manual_seed(0))
    assert_orthonormal(Q)
    assert Q.mean(0).abs().max() < 5 * math.sqrt(1 / n / draws)
    # The variance of an entry of QQᵀ is below r/n.
    projector = (Q @ Q.mT).mean(0)
    assert (projector - r / n * torch.eye(n, dtype=Q.dtype)).abs().max() < 5 * math.sqrt(r / n / draws)
    eighth = 105 / (n * (n + 2) * (n + 4) * (n + 6))
    fourth = 3 / (n * (n + 2))
    error = math.sqrt((eighth - fourth**2) / draws)
    for u in (
        torch.eye(n, dtype=Q.dtype)[0],
        torch.full((n,), n**-0.5, dtype=Q.dtype),
        gaussian(n) / gaussian(n).norm(),
    ):
        for column in range(r):
            assert abs(((Q[..., column] @ u) ** 4).mean().item() - fourth) < 5 * error


def set_probabilities(w: list[float], r: int) -> dict[tuple[int, ...], float]:
    """Probability of each set of indices, by enumeration of the ordered draws (SARA, Algorithm 2)."""
    result: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(len(w)), r):
        p, left = 1.0, sum(w)
        for i in order:
            p, left = p * w[i] / left, left - w[i]
        result[tuple(sorted(order))] = result.get(tuple(sorted(order)), 0.0) + p
    return result


@pytest.mark.parametrize(
    ("power", "floor"), [(1.0, 0.0), (0.0, 0.0), (2.0, 0.0), (0.5, 0.0), (1.0, 0.3), (3.0, 0.5), (1.0, 1.0)]
)
def test_sampling_frequencies(power, floor):
    """Draws of 2 of 5, 20,000 of them, follow the exact law of successive draws: chi-square over the ten sets, at the
    1e-4 level.
    """
    sigma, draws, r = [4.0, 2.5, 1.0, 0.6, 0.3], 20_000, 2
    total = sum(s**power for s in sigma)
    w = [(1 - floor) * s**power / total + floor / 5 for s in sigma]
    log_w = Importance(power=power, floor=floor).log_weights(torch.tensor(sigma, dtype=torch.float64))
    torch.testing.assert_close(log_w.exp(), torch.tensor(w, dtype=torch.float64), rtol=1e-12, atol=0)
    index = linalg.sample_without_replacement(log_w.expand(draws, 5), r, torch.Generator().manual_seed(0))
    counts: dict[tuple[int, ...], int] = {}
    for row in index.tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    expected = set_probabilities(w, r)
    assert set(counts) <= set(expected)
    chi_square = sum((counts.get(s, 0) - draws * p) ** 2 / (draws * p) for s, p in expected.items())
    assert chi_square < 33.72  # the 1 - 1e-4 quantile with nine degrees of freedom


def test_zero_weights_only_fill_up():
    """Items of weight zero are drawn when no others are left, and then evenly; indices ascend and never repeat."""
    log_w = torch.tensor([0.0, -torch.inf, 3.0, -torch.inf, -torch.inf]).expand(9000, 5)
    two = linalg.sample_without_replacement(log_w, 2, torch.Generator().manual_seed(0))
    assert (two == torch.tensor([0, 2])).all()
    three = linalg.sample_without_replacement(log_w, 3, torch.Generator().manual_seed(0))
    assert (three.diff() > 0).all()
    assert all({0, 2} < set(row) for row in three.tolist())
    for item in (1, 3, 4):
        assert abs((three == item).any(-1).double().mean().item() - 1 / 3) < 5 * math.sqrt(2 / 9 / 9000)
    everything = linalg.sample_without_replacement(log_w, 5, torch.Generator().manual_seed(0))
    assert (everything == torch.arange(5)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_project_raises_low_precision_gradients(dtype):
    """``G Q`` in the precision of ``Q``: nothing is lost beyond the rounding of the gradient itself, at any number of
    rows.
    """
    Q = linalg.orthonormalise(gaussian(24, RANK)).float()
    for m in (1, 256, 600):
        G = gaussian(m, 24).to(dtype)
        R = linalg.project(G, Q)
        assert R.dtype == torch.float32
        torch.testing.assert_close(R.double(), G.double() @ Q.double(), rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(m=st.integers(1, 30), n=st.integers(1, 30), data=st.data(), seed=st.integers(0, 1000))
def test_projection_never_increases_the_norm(m, n, data, seed):
    """``G -> G Q Qᵀ`` is a contraction and its own square."""
    r = data.draw(st.integers(1, n))
    G, Q = gaussian(m, n, seed=seed), linalg.orthonormalise(gaussian(n, r, seed=seed + 1))
    once = linalg.project(G, Q) @ Q.T
    assert once.norm() <= G.norm() * (1 + 1e-12)
    torch.testing.assert_close(linalg.project(once, Q) @ Q.T, once, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(700, 600), (700, 1024), (520, 513)])
def test_large_gram_matrices_are_made_in_blocks(shape):
    """That of the whole product, symmetric to the bit, in fp32; fewer FLOPs, as many as are said."""
    G = gaussian(*shape).float()
    with FlopCounterMode(display=False) as counter:
        S = linalg.gram(G)
    assert S.dtype == torch.float32
    assert torch.equal(S, S.T)
    exact = G.double().T @ G.double()
    assert (S - exact).abs().max() < 1e-6 * exact.diagonal().max()
    assert counter.get_total_flops() == linalg.gram_flops(*shape) <= 0.76 * 2 * shape[0] * shape[1] ** 2
    assert linalg.gram_flops(700, 511) == 2 * 700 * 511**2


def test_large_spectra_are_in_fp32_and_as_good_as_that():
    """Singular values to 3e-4 of the largest, and the leading subspace, against an SVD in fp64. One in fp64 stays
    there.
    """
    G = gaussian(700, 512) * torch.logspace(0, -4, 512, dtype=torch.float64)
    _, exact, Vh = torch.linalg.svd(G, full_matrices=False)
    for dtype, tolerance in ((torch.float32, 3e-4), (torch.float64, 1e-7)):
        sigma, V = linalg.right_singular(G.to(dtype))
        assert sigma.dtype == dtype
        assert (sigma - exact).abs().max() < tolerance * exact[0]
        lost = Vh[:16].T - V[:, :16].double() @ (V[:, :16].double().T @ Vh[:16].T)
        assert lost.norm(dim=0).max() < 100 * tolerance**2 + 1e-4 * (dtype == torch.float32)


def test_a_gram_matrix_has_no_more_singular_vectors_than_its_gradient():
    """What lies beyond is the null space of G, and a selector that draws evenly would draw from it."""
    G = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    S = linalg.Gram(linalg.gram(G), G[:1], 5)
    (sigma, V), (expected, U) = linalg.right_singular(S), linalg.right_singular(G)
    assert V.shape == (12, 5)
    torch.testing.assert_close(sigma, expected)
    torch.testing.assert_close(V @ V.mT, U @ U.mT)
