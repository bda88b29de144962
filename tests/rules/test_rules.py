"""The rules against torch's own optimizers, and what becomes of moments at a refresh against the papers' formulas."""

import pytest
import torch
from support.helpers import EVERY_RULE, RANK, SHAPES, assert_same, feed, gradients, oriented_side, parameter, part_of

from subspan import SubspaceAdamW, SubspaceOptimizer
from subspan.linalg import orthonormalise
from subspan.residuals import Discard, Fira
from subspan.rules import MSGD, SGD, Adafactor, AdamW
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
    """A rank >= min(m, n) compresses nothing: the step is AdamW's, without scale."""
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


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_sgd_against_its_equation(momentum):
    """M <- mu M + (1 - d) R, also where mu = 0 keeps no M. (torch leaves the dampening out there.)"""
    rule, M = SGD(momentum, 0.3), torch.zeros(9, RANK, dtype=torch.float64)
    state = rule.init(torch.zeros(1, dtype=torch.float64), (9, RANK), -2)
    for R in gradients((9, RANK), 4):
        M = momentum * M + 0.7 * R
        torch.testing.assert_close(rule.update_(R, state)[0], M, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta1", [0.1, 0.6])
def test_msgd_is_torch_sgd(beta1):
    """M <- (1 - b) M + b R from M = 0: torch's SGD of momentum and dampening 1 - b, fed with b of the first
    gradient.
    """
    grads, a, b = gradients((48, 20), 60), parameter((48, 20)), parameter((48, 20))
    ours = SubspaceOptimizer([a], 1e-2, selector=Dominant(), rule=MSGD(beta1), residual=Discard())
    theirs = torch.optim.SGD([b], 1e-2, momentum=1 - beta1, dampening=1 - beta1)
    expected = feed(theirs, b, [grads[0] * beta1, *grads[1:]])
    torch.testing.assert_close(feed(ours, a, grads), expected, rtol=0, atol=1e-12)


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


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("mode", ["orthogonal", "official"])
def test_sgd_with_the_whole_residual_is_sgd(shape, mode):
    """Without momentum Fira scales the residual by one, so at scale 1 nothing of the gradient is lost:
    torch.optim.SGD.
    """
    grads, a, b = gradients(shape, 12), parameter(shape), parameter(shape)
    residual = Fira(mode, limiter=None)
    parts = {"selector": Random(), "rule": SGD(0.0), "residual": residual}
    ours = SubspaceOptimizer([a], 1e-2, RANK, **parts, scale=1.0, update_proj_gap=5)
    expected = feed(torch.optim.SGD([b], 1e-2), b, grads)
    torch.testing.assert_close(feed(ours, a, grads), expected, rtol=0, atol=1e-8)  # its guard of 1e-8 in a division


# --- the state --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [("m", "r"), ("k",)], ids=str)
@pytest.mark.parametrize("rows", [-2, -1])
@pytest.mark.parametrize("rule", [*EVERY_RULE, SGD(0.0), Adafactor(beta1=0.0)], ids=repr)
def test_moments_are_entries_of_the_state(rule, shape, rows):
    """Whatever may be kept in 8 bits is in the state that ``init`` allocates."""
    sizes = {"m": 48, "r": RANK, "k": 17}
    state = rule.init(torch.zeros(1), tuple(sizes[name] for name in shape), rows)
    assert rule.moments.keys() <= state.keys()


WITH_MEAN = [AdamW(), *(rule for rule in EVERY_RULE if not isinstance(rule, Adafactor)), MSGD(0.4), SGD(0.8, 0.3)]


@pytest.mark.parametrize("rule", WITH_MEAN, ids=repr)
def test_the_mean_of_the_first_moment(rule):
    """Where one gradient comes again and again, the mean is that gradient at every step, and before the first it is
    zero. The rule is linear in what it has seen.
    """
    state = rule.init(torch.zeros(1, dtype=torch.float64), (9, RANK), -2)
    R, S = gradients((9, RANK), 2)
    assert not rule.first_moment(state).mean.any()
    for _ in range(4):
        rule.update_(R, state)
        momentum = rule.first_moment(state)
        torch.testing.assert_close(momentum.mean, R, rtol=1e-10, atol=0)
        assert momentum.value is state["exp_avg"]
    before = state["exp_avg"].clone()
    rule.update_(S, state)
    after = state["exp_avg"].clone()
    # What a gradient of weight * M would add by one update is what M leaves to it.
    fresh = rule.init(torch.zeros(1, dtype=torch.float64), (9, RANK), -2)
    rule.update_(S + momentum.weight * before, fresh)
    torch.testing.assert_close(fresh["exp_avg"], after, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("rule", [SGD(0.0), MSGD(1.0), Adafactor()], ids=repr)
def test_rules_without_a_first_moment(rule):
    """None is kept, or it is no sum of gradients."""
    state = rule.init(torch.zeros(1), (9, RANK), -2)
    rule.update_(torch.ones(9, RANK), state)
    assert rule.first_moment(state) is None


@pytest.mark.parametrize("rule", [*EVERY_RULE, SGD(0.0), SGD(0.0, 0.3)], ids=repr)
@pytest.mark.parametrize("shape", [(9, RANK), (2, 9, RANK), (17,), ()], ids=str)
def test_the_update_is_a_fresh_tensor(rule, shape):
    """The gradient is not written to, and overwriting it or the direction after the step changes nothing in the
    state.
    """
    state = rule.init(torch.zeros(1, dtype=torch.float64), shape, -2)
    for R in gradients(shape, 2):
        before = R.clone()
        U, factor = rule.update_(R, state)
        assert torch.equal(R, before)
        assert U.data_ptr() != R.data_ptr()
    assert (U.shape, factor.shape, factor.dtype) == (shape, (), torch.float64)
    held = part_of(state, state)
    U.fill_(7.0)
    R.fill_(7.0)
    assert_same(state, held)


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


@pytest.mark.parametrize("rows", [-2, -1])
@pytest.mark.parametrize("rule", EVERY_RULE, ids=repr)
def test_momentum_is_projected_on_the_new_subspace(rule, rows):
    """If the subspaces overlap in part, what survives is the projection of M Qᵀ; step and second moment are left
    alone.
    """
    state = rule.init(torch.zeros(48, 20, dtype=torch.float64), (48, RANK), rows)
    for R in gradients((48, RANK), 7):
        rule.update_(R, state)
    old, new = frame(1), frame(2)
    before, others = state["exp_avg"] @ old.T, part_of(state, state.keys() - {"exp_avg"})
    rule.transfer_(state, old.T @ new, "rotate")
    torch.testing.assert_close(state["exp_avg"] @ new.T, before @ new @ new.T, rtol=0, atol=1e-12)
    assert_same(part_of(state, others), others)


@pytest.mark.parametrize("rows", [-2, -1])
@pytest.mark.parametrize("rule", [*EVERY_RULE, SGD(0.0)], ids=repr)
def test_reset_is_the_initial_state(rule, rows):
    """After ``reset`` every entry is as ``init`` made it."""
    state = rule.init(torch.zeros(1, dtype=torch.float64), (48, RANK), rows)
    fresh = part_of(state, state)
    for R in gradients((48, RANK), 3):
        rule.update_(R, state)
    rule.transfer_(state, frame(1).T @ frame(2), "reset")
    assert_same(state, fresh)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("how", ["keep", "rotate", "moments", "reset"])
@pytest.mark.parametrize("rule", [*EVERY_RULE, SGD(0.0)], ids=repr)
def test_every_rule_across_refreshes(rule, how, shape):
    """The optimizer's step is the rule's on R = G Q, lifted; at each refresh, and only there, the moments are carried
    over.
    """
    p, left = parameter(shape), oriented_side(shape, "std") == "left"
    parts = {"selector": Random(), "rule": rule, "residual": Discard(), "transfer": how}
    optimizer = SubspaceOptimizer([p], 1e-2, RANK, **parts, scale=0.5, update_proj_gap=3, weight_decay=0.1)
    state = rule.init(p.detach(), (max(shape), RANK), -1 if left else -2)
    W, Q = p.detach().clone(), torch.zeros(min(shape), RANK, dtype=torch.float64)
    for t, G in enumerate(gradients(shape, 8)):
        feed(optimizer, p, [G])
        new = optimizer.state[p]["basis"].clone()
        assert torch.equal(new, Q) == (t % 3 > 0)
        if t % 3 == 0 and how == "reset":
            state = rule.init(p.detach(), (max(shape), RANK), -1 if left else -2)
        elif t % 3 == 0 and how != "keep":
            rule.transfer_(state, Q.T @ new, how)
        Q = new
        U, factor = rule.update_((G.T if left else G) @ Q, state)
        D = U @ Q.T
        W = (1 - 1e-2 * 0.1) * W - 1e-2 * 0.5 * factor.item() * (D.T if left else D)
        torch.testing.assert_close(p.detach(), W, rtol=0, atol=1e-12)


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


def test_ldadam_transport_of_a_negative_variance():
    """Where the mean cancels and its square exceeds the second moment, the absolute value is taken: never a negative
    V.
    """
    rule, state = moments(m=1)
    c1, c2 = 1 - 0.9**7, 1 - 0.999**7
    state["exp_avg"].copy_(torch.tensor([[2.0, 2.0, 0.0, 0.0]]).double() * c1)
    state["exp_avg_sq"].copy_(torch.tensor([[1.0, 1.0, 1.0, 1.0]]).double() * c2)
    C = torch.eye(RANK, dtype=torch.float64)
    C[:2, :2] = torch.tensor([[1.0, 1.0], [-1.0, 1.0]]).double() / 2**0.5
    rule.transfer_(state, C, "moments")
    # (1 - 4) (1/2 + 1/2) + 0, in absolute value, and (1 - 4) + (4 / sqrt 2)².
    expected = torch.tensor([[3.0, 5.0, 1.0, 1.0]], dtype=torch.float64) * c2
    torch.testing.assert_close(state["exp_avg_sq"], expected, rtol=1e-10, atol=0)


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
    """GoLore's MSGD: the momentum in the full space is projected on the new subspace at each refresh, at once and for
    good.
    """
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
