"""The parts of LDAdam one by one: what error feedback conserves, and the iterated basis. (``test_tracking``: LDAdam
whole.)
"""

import pytest
import torch
from support.helpers import RANK, SHAPES, feed, gradients, oriented_side, parameter, part_of

from subspan import SubspaceOptimizer
from subspan.parts import Key, Momentum
from subspan.residuals import ErrorFeedback
from subspan.rules import MSGD, SGD, Adafactor, AdamW, Lion
from subspan.selectors import Coordinates, Dominant, OnlinePCA, PowerIteration, Random

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
LR = 0.5


def build(p, rule, selector, **settings):
    parts = {"rule": rule, "selector": selector, "residual": ErrorFeedback()}
    return SubspaceOptimizer([p], LR, RANK, **parts, scale=1.0, update_proj_gap=4, **settings)


@shapes
@pytest.mark.parametrize("rule", [SGD(0.9), SGD(0.8, 0.3), MSGD(0.2), MSGD(1.0)], ids=repr)
@pytest.mark.parametrize("selector", [Random(), Coordinates("top"), PowerIteration(), OnlinePCA()], ids=repr)
def test_nothing_is_lost_with_momentum(shape, rule, selector):
    """A momentum M <- d M + g R gives a gradient g / (1 - d) of its size in the end. What has been applied, what the
    momentum will still apply and the error, so weighed, are all gradients so far, whatever the changes of basis.
    """
    d, g = rule.decay, rule.gain
    grads, p = gradients(shape, 12), parameter(shape)
    optimizer = build(p, rule, selector, transfer="rotate")
    state, start = optimizer.state[p], p.detach().clone()
    for count, G in enumerate(grads, start=1):
        feed(optimizer, p, [G])
        applied = (start - p.detach()) / LR * (1 - d) / g
        inside = selector.project_back(state["exp_avg"], state) * d / g if d else 0.0
        rest = state["error"] + inside
        total = applied + (rest.T if oriented_side(shape, "std") == "left" else rest)
        torch.testing.assert_close(total, sum(grads[:count]), rtol=0, atol=1e-10)


@shapes
@pytest.mark.parametrize("rule", [Lion((0.9, 0.95)), AdamW((0.8, 0.9)), Adafactor()], ids=repr)
def test_the_error_against_its_equations(shape, rule):
    """E <- G̃ - R Qᵀ + w (M_old Q_oldᵀ - M_new Q_newᵀ); w is the moment's own d / (1 - d), and 0 without one of
    gradients.
    """
    d = {Lion: 0.95, AdamW: 0.8, Adafactor: 0.0}[type(rule)]
    grads, p, left = gradients(shape, 9), parameter(shape), oriented_side(shape, "std") == "left"
    optimizer = build(p, rule, Random(), transfer="moments")
    state, E = optimizer.state[p], 0.0
    Q, M = torch.zeros(min(shape), RANK, dtype=torch.float64), torch.zeros(max(shape), RANK, dtype=torch.float64)
    for given in grads:
        feed(optimizer, p, [given])
        G, new = (given.T if left else given) + E, state["basis"].clone()
        moved = M @ Q.T @ new if not torch.equal(new, Q) else M
        E = G - G @ new @ new.T + d / (1 - d) * (M @ Q.T - moved @ new.T)
        Q, M = new, state["exp_avg"].clone()
        torch.testing.assert_close(state["error"], E, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", [SGD(0.9), AdamW()], ids=repr)
@pytest.mark.parametrize("selector", [Random(), Dominant(), PowerIteration()], ids=repr)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_gradient_leaves_the_error(rule, selector, value):
    """A gradient with one entry that is not finite keeps error and basis, at a refresh and between two. (To rounding:
    where the basis follows, the change that carries the momentum is QᵀQ.)
    """
    p = parameter((48, 20))
    optimizer = build(p, rule, selector, transfer="rotate")
    for count in (3, 4):
        feed(optimizer, p, gradients((48, 20), count))
        held = part_of(optimizer.state[p], ["error", "basis"])
        (bad,) = gradients((48, 20), 1)
        bad[2, 3] = value
        feed(optimizer, p, [bad])
        for key, before in held.items():
            torch.testing.assert_close(optimizer.state[p][key], before, rtol=0, atol=1e-13)
        with torch.no_grad():  # the momentum is spoilt, as in torch; mended here
            p.copy_(parameter((48, 20)))
            optimizer.state[p]["exp_avg"].zero_()
            optimizer.state[p].get("exp_avg_sq", torch.zeros(())).zero_()
    feed(optimizer, p, [bad, *gradients((48, 20), 5)])  # not mended, and a refresh among them
    assert optimizer.state[p]["error"].isfinite().all()


@shapes
@pytest.mark.parametrize("rho", [None, 0.0, 0.7, 1.0])
def test_power_iteration(shape, rho):
    """Q <- orth(Bᵀ B Q) with B = rho M̂ Qᵀ + (1 - rho) G formed whole; without momentum B is G."""
    first, second, M = *gradients(shape, 2), gradients((shape[0], RANK), 1, seed=3)[0]
    selector = PowerIteration(0.7 if rho is None else rho)
    state = selector.init(first, RANK)
    selector.refresh_(first, state, Key(0, "w", 0))
    Q = state["basis"].clone()
    change = selector.track_(second, state, None if rho is None else Momentum(9 * M, M, 1.0))
    B = second if rho is None else rho * M @ Q.T + (1 - rho) * second
    new, R = torch.linalg.qr(B.T @ B @ Q)
    new = new * R.diagonal().sign()
    torch.testing.assert_close(state["basis"], new, rtol=0, atol=1e-10)
    torch.testing.assert_close(change, Q.T @ new, rtol=0, atol=1e-10)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_power_iteration_without_a_direction(value):
    """A good gradient outside the subspace with a momentum of zero, or a momentum that is no
    number, leaves the basis.
    """
    (G,) = gradients((48, 20), 1)
    selector, M = PowerIteration(), torch.full((48, RANK), value, dtype=torch.float64)
    state = selector.init(G, RANK)
    Q = torch.eye(20, dtype=torch.float64)[:, :RANK]
    state["basis"].copy_(Q)
    if value == 0:
        G[:, :RANK] = 0
    change = selector.track_(G, state, Momentum(M, M, 1.0))
    assert torch.equal(state["basis"], Q)
    torch.testing.assert_close(change, Q.T @ Q, rtol=0, atol=1e-12)


def test_power_iteration_finds_the_leading_subspace():
    """On one gradient again and again, started from another's, it ends in that gradient's leading subspace."""
    first, second = gradients((48, 20), 2)
    second = second * torch.logspace(0, 1, 20, dtype=torch.float64)
    selector = PowerIteration()
    state = selector.init(first, RANK)
    selector.refresh_(first, state, Key(0, "w", 0))
    for _ in range(400):
        selector.track_(second, state, None)
    V = torch.linalg.svd(second)[2][:RANK].T
    torch.testing.assert_close(state["basis"] @ state["basis"].T, V @ V.T, rtol=0, atol=1e-6)
