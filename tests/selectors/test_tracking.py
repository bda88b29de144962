"""Selectors that move at every step, the lazy schedule, and LDAdam whole, against loops from the papers."""

import pytest
import torch
from support.helpers import RANK, SHAPES, feed, gradients, matrix_of, parameter

from subspan import SubspaceOptimizer, create
from subspan.linalg import orthonormalise
from subspan.parts import Key
from subspan.residuals import Discard, ErrorFeedback
from subspan.rules import SGD, AdamW
from subspan.selectors import Dominant, Gaussian, Lazy, OnlinePCA, PowerIteration, Random, Switch

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def leading(G):
    """The leading right singular vectors, each with its largest entry positive."""
    V = torch.linalg.svd(G)[2][:RANK].T
    return V * V.gather(0, V.abs().argmax(0, keepdim=True)).sign()


def qr(A):
    """Q with a positive diagonal of R."""
    Q, R = torch.linalg.qr(A)
    return Q * R.diagonal().sign()


@shapes
def test_slope_is_the_derivative_of_the_reconstruction_error(shape):
    """Online PCA's slope against autograd of ||Ĝ Q Qᵀ - Ĝ||², also where Q is not orthonormal."""
    (G,) = gradients(shape, 1)
    Q = torch.randn(shape[1], RANK, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    unit = G / G.norm()
    (unit @ Q @ Q.T - unit).square().sum().backward()
    torch.testing.assert_close(OnlinePCA.slope(G, Q.detach()), Q.grad, rtol=1e-10, atol=1e-12)


@shapes
@pytest.mark.parametrize(
    "selector", [OnlinePCA(0.05), OnlinePCA(0.05, orthonormalise=False, weight_decay=0.01)], ids=repr
)
def test_online_pca(shape, selector):
    """Torch's AdamW on the reconstruction error, from the leading singular vectors; then the QR that the published code
    leaves
    out."""
    grads = gradients(shape, 9)
    state = selector.init(grads[0], RANK)
    selector.refresh_(grads[0], state, Key(0, "w", 0))
    Q = torch.nn.Parameter(leading(grads[0]))
    adam = torch.optim.AdamW([Q], lr=0.05, weight_decay=selector.weight_decay)
    for G in grads[1:]:
        old = state["basis"].clone()
        change = selector.track_(G, state, None)
        adam.zero_grad()
        unit = G / G.norm()
        (unit @ Q @ Q.T - unit).square().sum().backward()
        adam.step()
        if selector.orthonormalise:
            Q.data = qr(Q.data)
        torch.testing.assert_close(state["basis"], Q.data, rtol=0, atol=1e-9)
        torch.testing.assert_close(change, old.T @ state["basis"], rtol=0, atol=1e-12)


def test_online_pca_finds_the_subspace():
    """On gradients of one leading subspace and noise it ends near that subspace, started from another."""
    (G,) = gradients((48, 20), 1)
    A = 10 * G[:, :RANK] @ torch.linalg.qr(G.T)[0][:, :RANK].T
    selector = OnlinePCA(0.02)
    state = selector.init(G, RANK)
    selector.refresh_(
        torch.randn(48, 20, generator=torch.Generator().manual_seed(7), dtype=torch.float64), state, Key(0, "w", 0)
    )
    V = torch.linalg.svd(A)[2][:RANK].T

    def overlap():
        return (V.T @ state["basis"]).square().sum().item() / RANK

    assert overlap() < 0.6
    for noise in gradients((48, 20), 300, seed=3):
        selector.track_(A + 0.1 * noise, state, None)
    assert overlap() > 0.95


@shapes
def test_ldadam(shape):
    """``ldadam_adamw`` against its algorithm: power iteration on momentum and gradient, both moments transported, what
    the
    projection and the change of basis lose fed back. Written for right bases; wide weights are transposed."""
    beta1, beta2, rho, eps, lr = 0.908, 0.99, 0.908, 1e-8, 1e-2
    grads, p = gradients(shape, 8), parameter(shape)
    wide = shape[0] < shape[1]
    W = p.detach().T.clone() if wide else p.detach().clone()
    optimizer = create("ldadam_adamw", torch.nn.ParameterDict({"w": p}), lr=lr, rank=RANK, targets=["w"])
    error = torch.zeros_like(W)
    Q = m = v = None
    for t, given in enumerate(grads, start=1):
        G = (given.T if wide else given) + error
        if t == 1:
            Q, m, v = leading(G), torch.zeros(len(W), RANK).double(), torch.zeros(len(W), RANK).double()
            error = torch.zeros_like(W)
        else:
            c1, c2 = 1 - beta1 ** (t - 1), 1 - beta2 ** (t - 1)
            B = rho * (m / c1) @ Q.T + (1 - rho) * G
            new = qr(B.T @ (B @ Q))
            C = Q.T @ new
            error = beta1 / (1 - beta1) * (m @ Q.T - m @ C @ new.T)
            v = (((v / c2 - (m / c1) ** 2) @ C**2) + (m / c1 @ C) ** 2).abs() * c2
            m, Q = m @ C, new
        R = G @ Q
        error = error + G - R @ Q.T
        m, v = beta1 * m + (1 - beta1) * R, beta2 * v + (1 - beta2) * R**2
        W = W - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps) @ Q.T
        after = feed(optimizer, p, [given])
        torch.testing.assert_close(after.T if wide else after, W, rtol=0, atol=1e-9)
        torch.testing.assert_close(optimizer.state[p]["error"], error, rtol=0, atol=1e-9)


@shapes
@pytest.mark.parametrize("selector", [Dominant(), Random(), PowerIteration()], ids=repr)
def test_error_feedback_loses_nothing(shape, selector):
    """With SGD without momentum, what has been applied and the error together are all gradients so far, and ``.grad``
    is not written to.
    """
    grads, p = gradients(shape, 12), parameter(shape)
    settings = {"selector": selector, "rule": SGD(0.0), "residual": ErrorFeedback(), "scale": 1.0, "update_proj_gap": 5}
    optimizer = SubspaceOptimizer([p], 0.5, RANK, **settings)
    start = p.detach().clone()
    for count, G in enumerate(grads, start=1):
        feed(optimizer, p, [G])
        assert torch.equal(p.grad, G)
        error = optimizer.state[p]["error"]
        applied = (start - p.detach()) / 0.5
        total = applied + (error.T if shape[0] < shape[1] else error)
        torch.testing.assert_close(total, sum(grads[:count]), rtol=0, atol=1e-10)


def test_error_feedback_at_full_width_is_sgd():
    """A subspace that holds the whole gradient leaves no error."""
    A, B = gradients((48, RANK), 1)[0], gradients((RANK, 20), 1, seed=1)[0]
    p = parameter((48, 20))
    settings = {"selector": Dominant(), "rule": SGD(0.0), "residual": ErrorFeedback(), "scale": 1.0}
    optimizer = SubspaceOptimizer([p], 0.5, RANK, **settings)
    start = p.detach().clone()
    torch.testing.assert_close(feed(optimizer, p, [A @ B, 2 * A @ B]), start - 0.5 * 3 * A @ B, rtol=0, atol=1e-9)
    assert optimizer.state[p]["error"].abs().max() < 1e-9


def test_lazy_doubles_while_the_subspace_stands_still():
    """Periods of 5, then 10, 20, 40 and no more (longest=8), and 5 again once the subspace has moved."""
    (first,), (second,) = gradients((48, 20), 1), gradients((48, 20), 1, seed=5)
    second = second.flip(1)
    p = parameter((48, 20))
    settings = {"selector": Lazy(Dominant(), threshold=0.9, longest=8), "rule": AdamW(), "residual": Discard()}
    optimizer = SubspaceOptimizer([p], 1e-3, RANK, update_proj_gap=5, **settings)
    refreshed = []
    for step in range(130):
        feed(optimizer, p, [first if step < 84 else second])
        if optimizer.state[p]["refresh_step"] == step:
            refreshed.append(step)
    # On the grid of each period: every 5, then multiples of 10, 20 and 40.
    assert refreshed[:5] == [0, 5, 10, 20, 40]
    assert refreshed[5:7] == [80, 120]
    assert refreshed[7:] == [125]


@pytest.mark.parametrize("first", [OnlinePCA(0.05), PowerIteration()], ids=repr)
def test_a_switch_lets_its_first_selector_track(first):
    """Before the switch it is the first selector, at every step; the switch comes at its step, whatever the period."""
    grads, p, q = gradients((48, 20), 12), parameter((48, 20)), parameter((48, 20))
    settings = {"rule": AdamW(), "residual": Discard(), "update_proj_gap": 5}
    switching = SubspaceOptimizer([p], 1e-2, RANK, selector=Switch(first, Random(), at=7), **settings)
    alone = SubspaceOptimizer([q], 1e-2, RANK, selector=first, **settings)
    for step, G in enumerate(grads):
        a, b = feed(switching, p, [G]), feed(alone, q, [G])
        assert torch.equal(a, b) == (step < 7)
    assert switching.state[p]["refresh_step"] == 10


@pytest.mark.parametrize("first", [Dominant(), Gaussian(), PowerIteration()], ids=repr)
@shapes
def test_momentum_is_carried_across_a_switch(first, shape):
    """Under ``rotate`` the momentum after the switch is that before it, projected on the new subspace."""
    grads, p = gradients(shape, 8), parameter(shape)
    settings = {"selector": Switch(first, Random(), at=5), "rule": SGD(0.9, 0.9), "residual": Discard()}
    optimizer = SubspaceOptimizer([p], 1e-3, RANK, transfer="rotate", update_proj_gap=5, proj_type="right", **settings)
    state, n = optimizer.state[p], shape[1]
    feed(optimizer, p, grads[:5])
    before = state["exp_avg"] @ matrix_of(optimizer.selector, state, n).T
    assert state["switched"] == 0
    feed(optimizer, p, grads[5:6])
    Q = matrix_of(optimizer.selector, state, n)
    assert state["switched"] == 1
    torch.testing.assert_close(state["exp_avg"], (0.9 * before + 0.1 * grads[5]) @ Q, rtol=0, atol=1e-10)
    torch.testing.assert_close(Q, orthonormalise(Q), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OnlinePCA(lr=-1.0), "lr=-1.0"),
        (lambda: OnlinePCA(betas=(0.9, 1.0)), "betas="),
        (lambda: PowerIteration(rho=1.5), "rho=1.5"),
        (lambda: Lazy(Dominant(), threshold=2.0), "threshold=2.0"),
        (lambda: Lazy(Dominant(), longest=0), "longest=0"),
        (lambda: Lazy(PowerIteration()), "moves at every step"),
        (lambda: Lazy("dominant"), "selector='dominant': expected a selector, such as subspan.selectors.Importance()"),
        (lambda: Switch("dominant", Random(), at=3), "first='dominant': expected a selector"),
        (lambda: Switch(Switch(Dominant(), Random(), at=3), Random(), at=9), "a switch cannot hold another"),
        (lambda: Switch(Lazy(Switch(Dominant(), Random(), at=3)), Random(), at=9), "a switch cannot hold another"),
        (lambda: Switch(Dominant(), Random(), at=0.5, total_steps=-7), "total_steps=-7"),
        (lambda: Lazy(Gaussian()), "overlap is measured between orthonormal bases"),
    ],
)
def test_settings_check_themselves(make, words):
    with pytest.raises(ValueError, match=words):
        make()
