"""The rules against torch's own optimizers, and what becomes of moments at a refresh against the papers' formulas."""

import pytest
import torch
from helpers import EVERY_RULE, RANK, SHAPES, feed, gradients, parameter

from subspan import SubspaceAdamW, SubspaceOptimizer
from subspan.linalg import orthonormalise
from subspan.residuals import Discard
from subspan.rules import SGD, AdamW
from subspan.selectors import Dominant, Random

ANY_SHAPE = {**SHAPES, "vector": (17,), "scalar": (), "stack": (3, 8, 6)}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


@pytest.mark.parametrize("shape", ANY_SHAPE.values(), ids=ANY_SHAPE)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("betas", "eps"), [((0.9, 0.999), 1e-8), ((0.0, 0.95), 1e-3), ((0.8, 0.0), 1e-6)])
def test_full_rank_adamw_is_torch_adamw(shape, dtype, betas, eps):
    """Without a rank, sixty steps equal torch.optim.AdamW, weight decay and epsilon included."""
    grads, a, b = gradients(shape, 60, dtype=dtype), parameter(shape, dtype=dtype), parameter(shape, dtype=dtype)
    settings = {"lr": 1e-2, "betas": betas, "eps": eps, "weight_decay": 0.1}
    ours, theirs = feed(SubspaceAdamW([a], **settings), a, grads), feed(torch.optim.AdamW([b], **settings), b, grads)
    # Of the largest weight: with beta2 = 0 weights grow large where gradients are small.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[dtype] * theirs.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("extra", [0, 5])
def test_rank_of_the_shorter_side_is_torch_adamw(shape, extra):
    """rank >= min(m, n) compresses nothing: the step is AdamW's, without scale."""
    grads, a, b = gradients(shape, 60), parameter(shape), parameter(shape)
    ours = feed(SubspaceAdamW([a], lr=1e-2, rank=min(shape) + extra, scale=0.25, weight_decay=0.1), a, grads)
    theirs = feed(torch.optim.AdamW([b], lr=1e-2, weight_decay=0.1), b, grads)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def sgd(p, momentum, dampening=0.0, **settings):
    parts = {"selector": Dominant(), "rule": SGD(momentum, dampening), "residual": Discard()}
    return SubspaceOptimizer([p], 1e-2, **parts, **settings)


@pytest.mark.parametrize("shape", ANY_SHAPE.values(), ids=ANY_SHAPE)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_full_rank_sgd_is_torch_sgd(shape, momentum):
    """Without dampening, sixty steps equal torch.optim.SGD."""
    grads, a, b = gradients(shape, 60), parameter(shape), parameter(shape)
    theirs = torch.optim.SGD([b], 1e-2, momentum=momentum)
    torch.testing.assert_close(feed(sgd(a, momentum), a, grads), feed(theirs, b, grads), rtol=0, atol=1e-12)


def test_dampened_sgd_starts_from_zero():
    """M <- mu M + (1 - d) R from M = 0: torch's SGD, which takes the first gradient whole, fed with (1 - d) of it."""
    grads, a, b = gradients((48, 20), 60), parameter((48, 20)), parameter((48, 20))
    theirs = torch.optim.SGD([b], 1e-2, momentum=0.9, dampening=0.7)
    expected = feed(theirs, b, [grads[0] * (1 - 0.7), *grads[1:]])
    torch.testing.assert_close(feed(sgd(a, 0.9, 0.7), a, grads), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("proj_type", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_momentumless_sgd_takes_the_projected_gradient(shape, proj_type):
    """With momentum 0 one step is -lr * scale * the gradient projected on its leading singular subspace."""
    (G,), p = gradients(shape, 1), parameter(shape)
    before = p.detach().clone()
    after = feed(sgd(p, 0.0, rank=RANK, scale=0.5, proj_type=proj_type), p, [G])
    U, s, Vh = torch.linalg.svd(G, full_matrices=False)
    truncated = U[:, :RANK] * s[:RANK] @ Vh[:RANK]
    torch.testing.assert_close(after - before, -1e-2 * 0.5 * truncated, rtol=0, atol=1e-12)


# --- transfer ---------------------------------------------------------------------------------------------------------


def moments(m=48, seed=0):
    """An AdamW state after some steps on Gaussian low-rank gradients."""
    rule, state = AdamW(), AdamW().init(torch.zeros(m, 20, dtype=torch.float64), (m, RANK), -2)
    for R in gradients((m, RANK), 7, seed):
        rule.update_(R, state)
    return rule, state


def frame(seed, n=20, r=RANK):
    return orthonormalise(torch.randn(n, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


@pytest.mark.parametrize("rule", EVERY_RULE, ids=repr)
@pytest.mark.parametrize("how", ["rotate", "moments"])
def test_momentum_survives_a_rotation_of_the_basis(rule, how):
    """If the new basis spans the old subspace, the momentum M Qᵀ in the full space is the same."""
    state = rule.init(torch.zeros(48, 20, dtype=torch.float64), (48, RANK), -2)
    rule.update_(gradients((48, RANK), 1)[0], state)
    old = frame(1)
    new = old @ frame(2, RANK)
    before = state["exp_avg"] @ old.T
    rule.transfer_(state, old.T @ new, how)
    torch.testing.assert_close(state["exp_avg"] @ new.T, before, rtol=0, atol=1e-12)


def test_momentum_is_projected_on_the_new_subspace():
    """If the subspaces overlap in part, what survives is the projection of M Qᵀ; the second moment is left alone."""
    rule, state = moments()
    old, new = frame(1), frame(2)
    before, second = state["exp_avg"] @ old.T, state["exp_avg_sq"].clone()
    rule.transfer_(state, old.T @ new, "rotate")
    torch.testing.assert_close(state["exp_avg"] @ new.T, before @ new @ new.T, rtol=0, atol=1e-12)
    assert torch.equal(state["exp_avg_sq"], second)


def test_ldadam_transport():
    """``moments`` is LDAdam's V <- |(V̂ - M̂²) C∘C + (M̂ C)²| (1 - beta2^t), written here entry by entry."""
    rule, state = moments(m=5)
    C = frame(1).T @ frame(2)
    M, V, t = state["exp_avg"].tolist(), state["exp_avg_sq"].tolist(), 7
    c1, c2 = 1 - 0.9**t, 1 - 0.999**t
    expected = torch.zeros(5, RANK, dtype=torch.float64)
    for i in range(5):
        for j in range(RANK):
            variance = sum((V[i][k] / c2 - (M[i][k] / c1) ** 2) * C[k, j].item() ** 2 for k in range(RANK))
            mean = sum(M[i][k] / c1 * C[k, j].item() for k in range(RANK))
            expected[i, j] = abs(variance + mean**2) * c2
    first = torch.tensor(M, dtype=torch.float64) @ C
    rule.transfer_(state, C, "moments")
    torch.testing.assert_close(state["exp_avg_sq"], expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(state["exp_avg"], first, rtol=1e-12, atol=0)


def test_ldadam_transport_of_a_signed_permutation():
    """If the new basis is the old one with columns permuted and negated, both moments follow exactly."""
    rule, state = moments()
    order, signs = torch.tensor([2, 0, 3, 1]), torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    C = torch.eye(RANK, dtype=torch.float64)[:, order] * signs
    M, V = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    rule.transfer_(state, C, "moments")
    torch.testing.assert_close(state["exp_avg"], M[:, order] * signs, rtol=1e-12, atol=0)
    torch.testing.assert_close(state["exp_avg_sq"], V[:, order], rtol=1e-9, atol=0)


@pytest.mark.parametrize("how", ["rotate", "moments", "reset"])
@pytest.mark.parametrize("rule", [*EVERY_RULE, AdamW(betas=(0.0, 0.0))], ids=repr)
def test_transfer_before_the_first_step(rule, how):
    """The first refresh finds zero moments and a zero old basis; they stay zero."""
    state = rule.init(torch.zeros(48, 20), (48, RANK), -2)
    rule.transfer_(state, torch.zeros(RANK, RANK), how)
    assert not any(value.any() for value in state.values())


def test_reset_starts_over():
    """After a refresh with ``reset`` the step is that of a new optimizer: moments and bias correction restart."""
    grads, p = gradients((48, 20), 8), parameter((48, 20))
    settings = {"lr": 1e-2, "rank": RANK, "transfer": "reset", "update_proj_gap": 5, "selector": "dominant"}
    optimizer = SubspaceAdamW([p], **settings)
    feed(optimizer, p, grads[:5])
    fresh = torch.nn.Parameter(p.detach().clone())
    new = SubspaceAdamW([fresh], **settings)
    for G in grads[5:]:
        change = feed(optimizer, p, [G])
        # Columns may differ in sign: the old basis decides in one, the largest entry in the other.
        torch.testing.assert_close(change, feed(new, fresh, [G]), rtol=0, atol=1e-12)
    assert optimizer.state[p]["step"] == 3


@pytest.mark.parametrize("how", ["rotate", "moments"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_momentum_projection_through_the_optimizer(how, shape):
    """GoLore's MSGD: the momentum in the full space is projected on the new subspace at each refresh, at once and for good."""
    p = parameter(shape)
    optimizer = sgd(p, 0.9, 0.9, rank=RANK, transfer=how, update_proj_gap=3, proj_type="right")
    full = torch.zeros(shape, dtype=torch.float64)
    for G in gradients(shape, 10):
        feed(optimizer, p, [G])
        Q = optimizer.state[p]["basis"]
        full = (0.9 * full + 0.1 * G) @ Q @ Q.T
        torch.testing.assert_close(optimizer.state[p]["exp_avg"] @ Q.T, full, rtol=0, atol=1e-12)


def test_keep_reuses_the_coordinates():
    """Under ``keep`` a refresh leaves the moments as they are: they are the plain averages of R over both bases."""
    grads, p = gradients((48, 20), 10), parameter((48, 20))
    optimizer = SubspaceAdamW([p], lr=1e-2, rank=RANK, update_proj_gap=5, selector=Random())
    M = V = torch.zeros(48, RANK, dtype=torch.float64)
    for G in grads:
        feed(optimizer, p, [G])
        R = G @ optimizer.state[p]["basis"]
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R.square()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], M, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], V, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdamW(betas=(0.9, 1.0)), r"betas=\(0.9, 1.0\)"),
        (lambda: AdamW(betas=(-0.1, 0.9)), r"betas=\(-0.1, 0.9\)"),
        (lambda: AdamW(eps=-1.0), "eps=-1.0"),
        (lambda: SGD(momentum=1.0), "momentum=1.0"),
        (lambda: SGD(dampening=-0.5), "dampening=-0.5"),
    ],
)
def test_settings_check_themselves(make, words):
    """The error shows the bad value."""
    with pytest.raises(ValueError, match=words):
        make()
