"""Each selector's choice against singular vectors, exact probabilities and the laws of the protocol."""

import pytest
import torch
from helpers import EVERY_SELECTOR, RANK, SHAPES, gradients, matrix_of

from subspan.parts import Key
from subspan.selectors import Dominant, Importance, Random, Switch

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
KEY = Key(0, "layer.weight", 0)


def basis(selector, G, key=KEY, rank=RANK, state=None):
    state = selector.init(G, rank) if state is None else state
    selector.refresh_(G, state, key)
    return matrix_of(selector, state, G.shape[-1]).clone()


def projector(Q):
    return Q @ Q.mT


def right_vectors(G):
    return torch.linalg.svd(G)[2].mT


@shapes
@pytest.mark.parametrize("method", ["gram", "svd"])
def test_dominant_is_the_leading_right_singular_subspace(shape, method):
    """Column j is the j-th right singular vector of torch.linalg.svd, up to sign."""
    (G,) = gradients(shape, 1)
    Q, V = basis(Dominant(method), G), right_vectors(G)[:, :RANK]
    torch.testing.assert_close((Q * V).sum(0).abs(), torch.ones(RANK, dtype=G.dtype), rtol=0, atol=1e-10)


@shapes
@pytest.mark.parametrize("selector", EVERY_SELECTOR, ids=repr)
def test_protocol(shape, selector):
    """Orthonormal columns if it says so; refresh_ returns Q_oldᵀ Q_new; project is linear, and project_back its adjoint, a
    fresh tensor."""
    first, second = gradients(shape, 2)
    state = selector.init(first, RANK)
    if "basis" in state:
        assert state["basis"].shape == (shape[1], RANK)
        assert not state["basis"].any()
    old = basis(selector, first, state=state)
    change = selector.refresh_(second, state, Key(0, "layer.weight", 5))
    new = matrix_of(selector, state, shape[1])
    assert new.shape == (shape[1], RANK)
    if selector.orthonormal:
        torch.testing.assert_close(new.mT @ new, torch.eye(RANK, dtype=new.dtype), rtol=0, atol=1e-12)
    torch.testing.assert_close(change.to(new.dtype), old.mT @ new, rtol=0, atol=1e-12)
    mixed = selector.project(2 * first - 3 * second, state)
    parts = 2 * selector.project(first, state) - 3 * selector.project(second, state)
    torch.testing.assert_close(mixed, parts, rtol=0, atol=1e-10)
    R = torch.randn(shape[0], RANK, dtype=first.dtype)
    inner = (selector.project(first, state) * R).sum()
    torch.testing.assert_close(inner, (first * selector.project_back(R, state)).sum(), rtol=1e-10, atol=0)
    selector.project_back(R, state).zero_()
    assert torch.equal(matrix_of(selector, state, shape[1]), new)


@pytest.mark.parametrize("selector", EVERY_SELECTOR, ids=repr)
def test_the_result_depends_on_gradient_state_and_key_alone(selector):
    """The same key gives the same basis, bit for bit, whatever the process's generator has done."""
    (G,) = gradients((32, 32), 1)
    Q = basis(selector, G)
    torch.manual_seed(12345)
    assert torch.equal(basis(selector, G), Q)


@pytest.mark.parametrize("selector", [Importance(), Random()], ids=repr)
@pytest.mark.parametrize("other", [Key(1, "layer.weight", 0), Key(0, "other.weight", 0), Key(0, "layer.weight", 200)])
def test_another_key_draws_another_basis(selector, other):
    """Seed, name and step each change a random choice."""
    (G,) = gradients((32, 32), 1)
    assert (projector(basis(selector, G)) - projector(basis(selector, G, other))).abs().max() > 0.01


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_importance_takes_singular_vectors_in_descending_order(power):
    """Each column is one right singular vector, none twice, sorted by singular value."""
    (G,) = gradients((48, 20), 1)
    overlap = (right_vectors(G).mT @ basis(Importance(power=power), G)).abs()
    index = overlap.argmax(0)
    torch.testing.assert_close(overlap.amax(0), torch.ones(RANK, dtype=G.dtype), rtol=0, atol=1e-9)
    assert (index.diff() > 0).all()


def frequencies(selector, sigma, rank, draws):
    """How often each singular vector is in the basis. The gradient is diagonal, so vectors are coordinates."""
    G = torch.diag(torch.tensor(sigma, dtype=torch.float64))
    total = torch.zeros(len(sigma), dtype=torch.float64)
    for step in range(draws):
        total += basis(selector, G, Key(0, "w", step), rank).square().sum(1).round()
    return total / draws


def test_power_zero_is_uniform():
    """power=0 includes every direction with probability r/n, also those of singular value zero."""
    observed = frequencies(Importance(power=0.0), [9.0, 3.0, 1.0, 0.0, 0.0], 2, 2000)
    assert (observed - 2 / 5).abs().max() < 5 * (2 / 5 * 3 / 5 / 2000) ** 0.5


def test_large_power_is_dominant():
    """power -> infinity selects the leading subspace, without underflow."""
    for seed in range(5):
        (G,) = gradients((48, 20), 1, seed)
        torch.testing.assert_close(
            projector(basis(Importance(power=2000.0), G)), projector(basis(Dominant(), G)), rtol=0, atol=1e-9
        )


def test_floor_bounds_the_probability_from_below():
    """A singular value of zero is never drawn with floor=0; with a floor, by one draw with probability floor / k."""
    sigma, draws, floor = [5.0, 2.0, 1.0, 0.0], 2000, 0.4
    assert frequencies(Importance(), sigma, 1, 500)[3] == 0
    observed, p = frequencies(Importance(floor=floor), sigma, 1, draws), floor / 4
    assert abs(observed[3].item() - p) < 5 * (p * (1 - p) / draws) ** 0.5


def test_random_ignores_the_gradient():
    """Two gradients of the same shape lead to the same basis, and needs_gradient says so."""
    a, b = gradients((48, 20), 2)
    assert torch.equal(basis(Random(), a), basis(Random(), b))
    assert not Random().needs_gradient
    assert Dominant().needs_gradient
    assert Importance().needs_gradient


@pytest.mark.parametrize(
    ("at", "total_steps", "step"), [(7, None, 7), (0, None, 0), (0.25, 40, 10), (1.0, 40, 40), (0.0, 40, 0)]
)
def test_switch_switches_at_a_step_or_a_share(at, total_steps, step):
    """first before the switch, second from it on; a float is a share of the run."""
    (G,) = gradients((32, 32), 1)
    switch = Switch(Dominant(), Random(), at=at, total_steps=total_steps)
    for now in {max(step - 1, 0), step, step + 1}:
        expected = Dominant() if now < step else Random()
        key = Key(0, "w", now)
        assert torch.equal(basis(switch, G, key), basis(expected, G, key))


def test_a_share_needs_the_length_of_the_run():
    """The error names the argument to pass, when the optimizer is built."""
    with pytest.raises(ValueError, match="pass total_steps"):
        Switch(Dominant(), Random()).init(torch.zeros(8, 8), 2)


def test_switch_needs_the_gradient_if_one_of_its_parts_does():
    """needs_gradient of a switch is that of its parts."""
    assert Switch(Dominant(), Random()).needs_gradient
    assert not Switch(Random(), Random()).needs_gradient


@pytest.mark.parametrize("selector", [Dominant(), Dominant("svd"), Importance()], ids=repr)
def test_signs_follow_the_old_basis(selector):
    """A refresh never flips a column against its predecessor; a start from the negated basis ends at the negated basis."""
    first, second = gradients((48, 20), 2)
    state = selector.init(first, RANK)
    basis(selector, first, state=state)
    assert (selector.refresh_(second, state, Key(0, "w", 5)).diagonal() >= 0).all()
    again = selector.init(first, RANK)
    once = basis(selector, first, state=again)
    again["basis"].neg_()
    torch.testing.assert_close(basis(selector, first, state=again), -once, rtol=0, atol=1e-12)


@shapes
@pytest.mark.parametrize("kind", [Dominant, Importance])
def test_svd_and_gram_agree(shape, kind):
    """Both methods give the same basis, signs included."""
    (G,) = gradients(shape, 1)
    torch.testing.assert_close(basis(kind(method="svd"), G), basis(kind(method="gram"), G), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Dominant("qr"), "method='qr'"),
        (lambda: Importance(power=-1.0), "power=-1.0"),
        (lambda: Importance(power=float("nan")), "power=nan"),
        (lambda: Importance(floor=1.5), "floor=1.5"),
        (lambda: Switch(Dominant(), Random(), at=1.5), "at=1.5"),
        (lambda: Switch(Dominant(), Random(), at=-1), "at=-1"),
    ],
)
def test_settings_check_themselves(make, words):
    """The error shows the bad value."""
    with pytest.raises(ValueError, match=words):
        make()


def test_the_change_across_a_switch():
    """The refresh that switches returns Q_oldᵀ Q_new like any other, with the basis before and after read from the state."""
    switch, generator = Switch(Dominant(), Random(), at=3), torch.Generator().manual_seed(0)
    G = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    state = switch.init(G, 3)
    switch.refresh_(G, state, Key(0, "w", 0))
    for step, switched in ((2, 0), (3, 1), (9, 1)):
        old = state["basis"].clone()
        change = switch.refresh_(G, state, Key(0, "w", step))
        torch.testing.assert_close(change, old.mT @ state["basis"])
        assert state["switched"] == switched
