"""Coordinate and Gaussian subspaces: which columns are taken, how often, and E[Q Qᵀ]."""

import itertools

import pytest
import torch
from helpers import RANK, gradients, matrix_of

from subspan.parts import Key
from subspan.selectors import Coordinates, Gaussian, Random

DRAWS = 20_000


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
    """Twenty thousand draws against exact probabilities, within five standard errors."""
    norms = [4.0, 2.0, 1.0, 1.0, 0.5]
    G = torch.diag(torch.tensor(norms, dtype=torch.float64))
    weights = [1.0] * 5 if sample == "uniform" else [c**power for c in norms]
    exact = inclusion(weights, 2)
    counts = torch.zeros(5, dtype=torch.float64)
    for step in range(DRAWS):
        counts[drawn(Coordinates(sample, power), G, step, 2)["indices"]] += 1
    error = (exact * (1 - exact) / DRAWS).sqrt()
    assert ((counts / DRAWS - exact).abs() < 5 * error + 1e-12).all()


def mean_of_projector(selector, G, rank, draws):
    total, squares = torch.zeros(G.shape[1], G.shape[1], dtype=torch.float64), 0
    for step in range(draws):
        Q = matrix_of(selector, drawn(selector, G, step, rank), G.shape[1]).double()
        P = Q @ Q.T
        total += P
        squares = squares + P.square()
    mean = total / draws
    error = ((squares / draws - mean.square()).clamp_min(0) / draws).sqrt()
    return mean, error


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
    state = drawn(Gaussian(), G, rank=50)
    assert all(type(value) is int for value in state.values())
    Q = matrix_of(Gaussian(), state, 300)
    torch.manual_seed(1)
    assert torch.equal(Q, matrix_of(Gaussian(), state, 300))
    assert abs(Q.std().item() * 50**0.5 - 1) < 0.02
    assert abs(Q.mean().item()) < 0.01


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
