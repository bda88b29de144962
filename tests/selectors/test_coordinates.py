"""Coordinate and Gaussian subspaces: which columns are taken, how often, and E[Q Qᵀ]."""

import itertools
import json

import pytest
import torch
from support.helpers import RANK, SHAPES, feed, gradients, matrix_of, oriented_side, parameter

from subspan import SubspaceOptimizer
from subspan.parts import Key
from subspan.residuals import Discard
from subspan.rules import MSGD
from subspan.selectors import Coordinates, Gaussian, Random

COPIES = 500  # draws are made for a stack of matrices at once, and for several keys


def drawn(selector, G, step=0, rank=RANK):
    state = selector.init(G, rank)
    selector.refresh_(G, state, Key(0, "w", step))
    return state


def test_top_takes_the_columns_of_largest_norm():
    for seed in range(5):
        (G,) = gradients((48, 20), 1, seed)
        norms = [sum(x * x for x in column) for column in G.T.tolist()]
        expected = sorted(sorted(range(20), key=lambda j: -norms[j])[:RANK])
        assert drawn(Coordinates("top"), G)["indices"].tolist() == expected


def test_projecting_gathers_columns():
    """R is columns of G, and lifting puts them back among zeros: nothing is multiplied, every bit stays."""
    (G,) = gradients((48, 20), 1)
    selector = Coordinates("uniform")
    state = drawn(selector, G)
    index = state["indices"]
    assert torch.equal(selector.project(G, state), G[:, index])
    masked = torch.zeros_like(G)
    masked[:, index] = G[:, index]
    assert torch.equal(selector.project_back(G[:, index], state), masked)
    assert (index.diff() > 0).all()


@pytest.mark.parametrize("value", [1e-30, 1e30])
@pytest.mark.parametrize(
    "selector", [Coordinates("top"), Coordinates("norm"), Coordinates("norm", scaled=True)], ids=repr
)
def test_extreme_magnitudes(selector, value):
    """In fp32 a tiny or huge gradient, whose square leaves the range, leads to the columns that any multiple of it
    does.
    """
    (G,) = gradients((48, 20), 1, dtype=torch.float32)
    for step in range(5):
        found, expected = drawn(selector, G * value, step), drawn(selector, G, step)
        assert torch.equal(found["indices"], expected["indices"])


def inclusion(weights, count):
    """Exact probabilities with which each item is among ``count`` successive draws without replacement."""
    found = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), count):
        p, left = 1.0, sum(weights)
        for i in order:
            p *= weights[i] / left
            left -= weights[i]
        for i in order:
            found[i] += p
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(("sample", "power"), [("uniform", 2.0), ("norm", 2.0), ("norm", 1.0), ("norm", 0.0)])
def test_inclusion_frequencies(sample, power):
    """Twenty thousand draws against exact probabilities, within five standard errors; columns ascend, none twice."""
    norms = [4.0, 2.0, 1.0, 1.0, 0.5]
    G = torch.diag(torch.tensor(norms, dtype=torch.float64))
    weights = [1.0] * 5 if sample == "uniform" else [c**power for c in norms]
    exact = inclusion(weights, 2)
    selector, stack = Coordinates(sample, power), G.expand(COPIES, 5, 5)
    index = torch.cat([drawn(selector, stack, step, 2)["indices"] for step in range(20_000 // COPIES)])
    assert (index.diff() > 0).all()
    error = (exact * (1 - exact) / len(index)).sqrt()
    assert ((index.flatten().bincount(minlength=5) / len(index) - exact).abs() < 5 * error + 1e-12).all()


def mean_of_projector(selector, G, rank, draws):
    n = G.shape[1]
    stack, eye = G.expand(COPIES, *G.shape), torch.eye(n, dtype=torch.float64).expand(COPIES, n, n)
    Q = torch.cat([selector.project(eye, drawn(selector, stack, step, rank)) for step in range(draws // COPIES)])
    P = Q @ Q.mT
    return P.mean(0), P.std(0) / draws**0.5


@pytest.mark.parametrize(
    "selector",
    [Coordinates("uniform", scaled=True), Coordinates("norm", scaled=True), Coordinates("norm", 1.0, True), Gaussian()],
    ids=repr,
)
def test_scaled_draws_are_unbiased(selector):
    """E[Q Qᵀ] = I, each entry within five standard errors."""
    (G,) = gradients((9, 6), 1)
    mean, error = mean_of_projector(selector, G, 2, 5000)
    assert ((mean - torch.eye(6)).abs() < 5 * error + 1e-6).all()


def test_haar_is_scaled_by_rank():
    """E[Q Qᵀ] = (r/n) I of an orthonormal random basis."""
    (G,) = gradients((9, 6), 1)
    mean, error = mean_of_projector(Random(), G, 2, 5000)
    assert ((mean - torch.eye(6) / 3).abs() < 5 * error + 1e-6).all()


def test_gaussian_keeps_nothing_but_integers():
    """The basis is drawn again at each use, the same, and of standard deviation 1/sqrt(r)."""
    (G,) = gradients((400, 300), 1)
    assert not Gaussian().project(G, Gaussian().init(G, 50)).any()  # before the first refresh
    state = drawn(Gaussian(), G, rank=50)
    assert all(type(value) is int for value in state.values())
    Q = matrix_of(Gaussian(), state, 300)
    torch.manual_seed(1)
    assert torch.equal(Q, matrix_of(Gaussian(), json.loads(json.dumps(state)), 300))
    torch.testing.assert_close(Gaussian().project(torch.eye(300).bfloat16(), state), Q.float(), rtol=1e-6, atol=0)
    assert abs((Q.T @ Q).diagonal().mean().item() / (300 / 50) - 1) < 0.05
    assert abs(Q.std().item() * 50**0.5 - 1) < 0.02
    assert abs(Q.mean().item()) < 0.01


def test_a_column_drawn_twice_counts_twice():
    """Where one column has all the norm, r scaled draws of it together are that column whole."""
    G = torch.zeros(5, 6, dtype=torch.float64)
    G[:, 4] = torch.arange(1.0, 6.0)
    selector = Coordinates("norm", scaled=True)
    state = drawn(selector, G, rank=3)
    assert state["indices"].tolist() == [4, 4, 4]
    torch.testing.assert_close(selector.project_back(selector.project(G, state), state), G, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("sample", ["uniform", "top"])
def test_momentum_under_a_mask(shape, sample):
    """GoSare and GaSare: M <- (1 - b) S ⊙ M + b S ⊙ G with a mask S of whole columns, here over the full matrix."""
    p, left = parameter(shape), oriented_side(shape, "std") == "left"
    parts = {"selector": Coordinates(sample), "rule": MSGD(0.3), "residual": Discard(), "transfer": "rotate"}
    optimizer = SubspaceOptimizer([p], 0.1, RANK, **parts, scale=1.0, update_proj_gap=3)
    W, M, masks = p.detach().clone(), torch.zeros(shape, dtype=torch.float64), set()
    for G in gradients(shape, 10):
        feed(optimizer, p, [G])
        index = optimizer.state[p]["indices"]
        masks.add(tuple(index.tolist()))
        S = torch.zeros(shape, dtype=torch.float64)
        (S.T if left else S)[:, index] = 1
        M = 0.7 * S * M + 0.3 * S * G
        W = W - 0.1 * M
        torch.testing.assert_close(p.detach(), W, rtol=0, atol=1e-12)
    assert len(masks) > 1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_flora(shape):
    """Momentum in a Gaussian subspace: at each refresh it is lifted by the old draw and compressed by the new one."""
    p, left = parameter(shape), oriented_side(shape, "std") == "left"
    parts = {"selector": Gaussian(), "rule": MSGD(0.3), "residual": Discard(), "transfer": "rotate"}
    optimizer = SubspaceOptimizer([p], 0.1, RANK, **parts, scale=1.0, update_proj_gap=3)
    W, lifted = p.detach().clone(), 0.0
    for G in gradients(shape, 10):
        feed(optimizer, p, [G])
        Q = matrix_of(Gaussian(), optimizer.state[p], min(shape))
        if optimizer.state[p]["refresh_step"] == optimizer.param_groups[0]["clock"] - 1:
            M = lifted @ Q if torch.is_tensor(lifted) else torch.zeros(max(shape), RANK, dtype=torch.float64)
        M = 0.7 * M + 0.3 * (G.T if left else G) @ Q
        lifted = M @ Q.T
        W = W - 0.1 * (lifted.T if left else lifted)
        torch.testing.assert_close(p.detach(), W, rtol=0, atol=1e-9)


def test_columns_without_gradient():
    """Zero columns are taken only when no others are left; a zero matrix in a stack keeps what it had."""
    G = torch.zeros(5, 6, dtype=torch.float64)
    G[:, [1, 4]] = 1.0
    for selector in (Coordinates("top"), Coordinates("norm")):
        assert {1, 4} <= set(drawn(selector, G, rank=3)["indices"].tolist())
    stack = torch.stack([G, torch.zeros_like(G)])
    for selector in (Coordinates("top"), Coordinates("norm"), Coordinates("norm", scaled=True)):
        state = selector.init(stack, 3)
        state["indices"].copy_(torch.tensor([[0, 2, 3], [0, 2, 5]]))
        selector.refresh_(stack, state, Key(0, "w", 1))
        assert state["indices"][1].tolist() == [0, 2, 5]
        assert {1, 4} & set(state["indices"][0].tolist())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sample": "largest"}, "sample='largest': expected one of uniform, top, norm"),
        ({"sample": "norm", "power": -1.0}, "power=-1.0"),
        ({"sample": "top", "scaled": True}, "scaled=True"),
    ],
)
def test_settings_check_themselves(settings, words):
    with pytest.raises(ValueError, match=words):
        Coordinates(**settings)
