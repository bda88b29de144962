"""Fira against a slow version written from the paper, the published package, and its own geometry."""

import itertools

import fira
import pytest
import torch
from fira.gradient_projection import GradientProjector
from support.helpers import RANK, SHAPES, feed, gradients, oriented_side, parameter

from subspan import SubspaceAdamW, SubspaceOptimizer
from subspan.residuals import Fira
from subspan.rules import MSGD
from subspan.selectors import Dominant

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
modes = pytest.mark.parametrize("mode", ["orthogonal", "official"])
limiters = pytest.mark.parametrize("limiter", [None, 1.01, 1.1])
LR, GAP, STEPS, SCALE, DECAY = 1e-2, 7, 40, 0.25, 0.1
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def uneven(shape, seed=0):
    """Gradients whose size rises and falls, so that the limiter acts at some steps and not at others."""
    return [G * (1 + 0.8 * (-1) ** (t // 3)) for t, G in enumerate(gradients(shape, STEPS, seed))]


def test_scaled_is_unscaled_with_the_residual_times_scale():
    """At scale 1 they are one; else scaled moves as unscaled at scale 1 with ``scale`` times the learning rate."""
    moved = {}
    for scale, scaled, lr in ((0.25, True, LR), (1.0, False, LR / 4), (0.25, False, LR)):
        p = parameter(SHAPES["tall"])
        optimizer = SubspaceAdamW([p], lr, RANK, residual=Fira(scaled=scaled), update_proj_gap=GAP, scale=scale)
        moved[scale, scaled] = feed(optimizer, p, uneven(SHAPES["tall"]))
    torch.testing.assert_close(moved[0.25, True], moved[1.0, False], rtol=0, atol=1e-12)
    assert not torch.allclose(moved[0.25, True], moved[0.25, False], atol=1e-3)


def rate(U, R, G):
    """The rate of one row: the paper's quotient of norms, except where the row is outside or zero."""
    return U.norm().item() / max(R.norm().item(), 1e-8 * G.norm().item()) if G.any() else 0.0


class SlowFira:
    """Equations 5 to 8 and Algorithm 1 of the paper, row by row, for one weight whose columns are compressed."""

    def __init__(self, m, r, a, limiter):
        self.M = self.V = torch.zeros(m, r, dtype=torch.float64)
        self.a, self.limiter, self.previous, self.t, self.limited = a, limiter, None, 0, 0

    def direction(self, G, Q):
        self.t += 1
        R = G @ Q
        self.M = BETA1 * self.M + (1 - BETA1) * R
        self.V = BETA2 * self.V + (1 - BETA2) * R**2
        c1, c2 = 1 - BETA1**self.t, 1 - BETA2**self.t
        N = self.M / (self.V.sqrt() + EPS * c2**0.5)
        S = G - self.a * R @ Q.T
        T = torch.stack([rate(N[i], R[i], G[i]) * S[i] for i in range(len(G))])
        if self.limiter is not None and self.previous is not None:
            growth = T.norm().item() / self.previous
            if growth > self.limiter:
                T, self.limited = T * self.limiter / growth, self.limited + 1
        self.previous = T.norm().item()
        return (SCALE * N @ Q.T + T) * c2**0.5 / c1


@shapes
@modes
@limiters
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_slow_version(shape, mode, limiter, proj_type):
    """Forty steps with six subspaces equal the slow version, which takes the basis from the state."""
    left = oriented_side(shape, proj_type) == "left"
    p = parameter(shape)
    W = p.detach().clone()
    optimizer = SubspaceAdamW(
        [p], LR, RANK, selector="dominant", residual=Fira(mode, limiter), update_proj_gap=GAP, scale=SCALE,
        proj_type=proj_type, weight_decay=DECAY, betas=(BETA1, BETA2), eps=EPS,
    )  # fmt: skip
    slow = SlowFira(shape[1] if left else shape[0], RANK, 1.0 if mode == "orthogonal" else SCALE, limiter)
    bases = []
    for G in uneven(shape):
        feed(optimizer, p, [G])
        Q = optimizer.state[p]["basis"].clone()
        bases.append(Q)
        D = slow.direction(G.T if left else G, Q)
        W = (1 - LR * DECAY) * W - LR * (D.T if left else D)
        torch.testing.assert_close(p.detach(), W, rtol=0, atol=1e-10)
    assert sum(not torch.equal(a, b) for a, b in zip(bases[1:], bases, strict=False)) == (STEPS - 1) // GAP
    if limiter is not None:
        assert 0 < slow.limited < STEPS - 1
        torch.testing.assert_close(optimizer.state[p]["residual_norm"].item(), slow.previous, rtol=1e-9, atol=0)


@pytest.mark.parametrize("share", [0.3, 0.03, 0.003])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_small_residual_of_low_precision(dtype, share):
    """The limiter's norm is that of the residual, which is formed here, where nearly all of the
    gradient lies inside.
    """
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(64, RANK, generator=generator))[0]
    low = torch.randn(300, RANK, generator=generator) @ Q.T
    G = (300 * (low + share * torch.randn(300, 64, generator=generator))).to(dtype)
    R = G.float() @ Q
    U = torch.randn(300, RANK, generator=generator)
    phi = U.norm(dim=1) / R.norm(dim=1)
    expected = (phi[:, None] * (G.double() - R.double() @ Q.double().T)).norm()
    state = Fira().init(G)
    Fira().combine(G, R, U.clone(), SCALE, lambda A: A @ Q.T, state)
    torch.testing.assert_close(state["residual_norm"].double(), expected, rtol=1e-2, atol=0)


def exact_basis(self, weights, rank, type):
    """The package's own choice of basis without its cast to fp32, so that the comparison can be strict."""
    U, _, Vh = torch.linalg.svd(weights, full_matrices=False)
    return Vh[:rank] if type == "right" else U[:, :rank]


@pytest.mark.parametrize("shape", [SHAPES["tall"], SHAPES["wide"], SHAPES["square"]], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
def test_published_package(monkeypatch, shape, proj_type):
    """``official`` equals fira.FiraAdamW inside one refresh interval. Epsilon, which it places differently, is
    negligible, and so is its absolute guard against large gradients.
    """
    monkeypatch.setattr(GradientProjector, "get_orthogonal_matrix", exact_basis)
    grads, a, b = [1e6 * G for G in uneven(shape)], parameter(shape), parameter(shape)
    theirs = fira.FiraAdamW(
        [{"params": [b], "rank": RANK, "update_proj_gap": 1000, "alpha": SCALE, "proj_type": proj_type}],
        lr=LR, eps=1e-30, no_deprecation_warning=True,
    )  # fmt: skip
    ours = SubspaceAdamW(
        [a], LR, RANK, selector="dominant", residual=Fira("official"), update_proj_gap=1000, scale=SCALE, proj_type=proj_type,
        eps=1e-30,
    )  # fmt: skip
    for G in grads:
        torch.testing.assert_close(feed(ours, a, [G]), feed(theirs, b, [G]), rtol=0, atol=1e-10)


@shapes
@limiters
def test_the_residual_is_orthogonal_to_the_basis(shape, limiter):
    """In orthogonal mode what moves the weight besides the subspace step has no component inside the subspace."""
    p = parameter(shape)
    optimizer = SubspaceAdamW([p], LR, RANK, selector="dominant", residual=Fira("orthogonal", limiter), scale=0.0)
    for G in gradients(shape, 5):
        before = p.detach().clone()
        change = feed(optimizer, p, [G]) - before
        change = change.T if oriented_side(shape, "std") == "left" else change
        assert change.norm() > 1e-3
        assert (change @ optimizer.state[p]["basis"]).norm() < 1e-12 * change.norm() / LR


@shapes
def test_the_official_residual_leaks(shape):
    """In official mode a share 1 - scale of the projected gradient stays in the residual, row by row."""
    (G,) = gradients(shape, 1)
    p = parameter(shape)
    before = p.detach().clone()
    optimizer = SubspaceAdamW([p], LR, RANK, selector="dominant", residual=Fira("official"), scale=SCALE)
    inside = feed(optimizer, p, [G]) - before
    Q = optimizer.state[p]["basis"]
    if oriented_side(shape, "std") == "left":
        G, inside = G.T, inside.T
    R = G @ Q
    U = (1 - BETA1) * R / ((1 - BETA2) ** 0.5 * (R.abs() + EPS))
    phi = U.norm(dim=1, keepdim=True) / R.norm(dim=1, keepdim=True)
    factor = (1 - BETA2) ** 0.5 / (1 - BETA1)
    expected = -LR * factor * (SCALE * U + (1 - SCALE) * phi * R)
    torch.testing.assert_close(inside @ Q, expected, rtol=0, atol=1e-12)


@modes
def test_a_stack_is_separate_matrices(mode):
    """Each matrix of a stack has a limiter of its own, also where one's gradients jump and the other's do not."""
    first, second = uneven((12, 8)), gradients((12, 8), STEPS, seed=1)
    settings = {"selector": "dominant", "residual": Fira(mode), "update_proj_gap": GAP, "scale": SCALE}
    p = parameter((2, 12, 8))
    stack = SubspaceAdamW([p], LR, RANK, **settings)
    alone = [torch.nn.Parameter(A.clone()) for A in p.detach()]
    optimizers = [SubspaceAdamW([a], LR, RANK, **settings) for a in alone]
    for pair in zip(first, second, strict=True):
        together = feed(stack, p, [torch.stack(pair)])
        for index, G in enumerate(pair):
            expected = feed(optimizers[index], alone[index], [G])
            torch.testing.assert_close(together[index], expected, rtol=0, atol=1e-10)


def test_the_limiter_bounds_the_growth():
    """From one step to the next the norm of the residual grows at most by the factor, however the gradient jumps."""
    p = parameter((48, 20))
    optimizer = SubspaceAdamW([p], LR, RANK, selector="dominant", residual=Fira(limiter=1.01), scale=0.0)
    c, norms = [], []
    for t, G in enumerate(gradients((48, 20), 12)):
        before = p.detach().clone()
        change = feed(optimizer, p, [G * 10 ** (t % 4)]) - before
        c.append((1 - BETA2 ** (t + 1)) ** 0.5 / (1 - BETA1 ** (t + 1)))
        norms.append(change.norm().item() / LR / c[-1])
        torch.testing.assert_close(optimizer.state[p]["residual_norm"].item(), norms[-1], rtol=1e-9, atol=0)
    assert all(b <= 1.01 * a * (1 + 1e-6) for a, b in itertools.pairwise(norms))
    assert any(b > 1.009 * a for a, b in itertools.pairwise(norms))


@modes
@limiters
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_scale_of_the_gradients_does_not_matter(mode, limiter, factor, dtype):
    """Gradients a trillion times as small or as large move the weight as far, as with Adam without epsilon. A power of
    two changes no digit of them.
    """
    grads = [G.to(dtype) for G in uneven(SHAPES["tall"])[:12]]
    moved = {}
    for scale in (1.0, factor):
        p = torch.nn.Parameter(torch.zeros(SHAPES["tall"], dtype=dtype))
        optimizer = SubspaceAdamW(
            [p], LR, RANK, selector="dominant", residual=Fira(mode, limiter), update_proj_gap=GAP, scale=SCALE, eps=0.0
        )
        moved[scale] = feed(optimizer, p, [scale * G for G in grads])
    largest = moved[1.0].abs().max().item()
    assert largest > LR
    torch.testing.assert_close(moved[factor], moved[1.0], rtol=0, atol=8 * torch.finfo(dtype).eps * largest)


@modes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_outside_or_zero(mode, dtype):
    """Each row is that of a slow version in fp64: an ordinary one, one without a gradient, one that is outside, one
    that nearly is, and a tiny one. A second matrix of the stack has no gradient, and one of its rows no momentum.
    """
    a = 1.0 if mode == "orthogonal" else SCALE
    generator = torch.Generator().manual_seed(0)
    G, U = (torch.randn(2, 5, width, generator=generator) for width in (8, 2))
    G[0, 1], G[0, 2, :2], G[1], U[1, 0] = 0, 0, 0, 0
    G[0, 3, :2] *= 1e-12
    G[0, 4] *= 1e-15
    G = G.to(dtype)
    U = U.to(torch.promote_types(dtype, torch.float32))
    R, Q = G[..., :2].to(U), torch.eye(8, dtype=U.dtype)[:, :2]
    residual = Fira(mode)
    state = residual.init(G)
    A, phi = residual.combine(G, R, U.clone(), SCALE, lambda A: A @ Q.T, state)
    D = (A @ Q.T + phi * G).double()
    for number in (0, 1):
        G_, R_, U_ = (X[number].double() for X in (G, R, U))
        S = G_ - a * R_ @ Q.T.double()
        T = torch.stack([rate(U_[i], R_[i], G_[i]) * S[i] for i in range(5)])
        torch.testing.assert_close(state["residual_norm"][number].double(), T.norm(), rtol=1e-5, atol=0)
        expected = SCALE * U_ @ Q.T.double() + T
        apart = (D[number] - expected).norm(dim=1)
        assert (apart <= 1e-5 * expected.norm(dim=1)).all()


@pytest.mark.parametrize("limiter", [None, 1.01])
@pytest.mark.parametrize("spike", [1e15, 1e18])
@pytest.mark.parametrize("row", [0.0, 1e-22, 1.0])
def test_finite_after_a_spike(limiter, spike, row):
    """The momentum of SGD is still as large as one gradient was, and the next gradients are of any size, or zero."""
    p = torch.nn.Parameter(torch.zeros(16, 8))
    optimizer = SubspaceOptimizer(
        [p], 1e-12, 2, selector=Dominant(), rule=MSGD(0.1), residual=Fira(limiter=limiter), update_proj_gap=GAP
    )
    first, second, third = gradients((16, 8), 3, dtype=torch.float32)
    second[3] *= row
    assert feed(optimizer, p, [spike * first, second, third]).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "words"), [({"mode": "paper"}, "mode='paper'"), ({"limiter": 0.0}, "limiter=0.0")]
)
def test_settings_check_themselves(settings, words):
    """The error shows the bad value."""
    with pytest.raises(ValueError, match=words):
        Fira(**settings)
