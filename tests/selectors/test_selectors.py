"""Each selector's choice against singular vectors, exact probabilities and the laws of the protocol."""

import pytest
import torch
from support.helpers import EVERY_SELECTOR, RANK, SHAPES, NoSync, assert_same, gradients, matrix_of, part_of

import subspan
from subspan.parts import Key, Momentum
from subspan.selectors import (
    Coordinates,
    Cyclic,
    Dominant,
    Gaussian,
    Importance,
    Lazy,
    OnlinePCA,
    PowerIteration,
    Random,
    Stratified,
    Switch,
)

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
    """Columns are orthonormal if it says so. refresh_ returns Q_oldᵀ Q_new. project is linear, and project_back its
    adjoint, a fresh tensor.
    """
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
    terms = first * selector.project_back(R, state)  # what they sum to may be near zero
    torch.testing.assert_close(inner, terms.sum(), rtol=0, atol=1e-12 * float(terms.abs().sum()))
    selector.project_back(R, state).zero_()
    assert torch.equal(matrix_of(selector, state, shape[1]), new)


@pytest.mark.parametrize("selector", EVERY_SELECTOR, ids=repr)
def test_the_result_depends_on_gradient_state_and_key_alone(selector):
    """Equal keys give the same state, bit for bit, whatever the process's generator has done, and leave that generator
    as it is.
    """
    grads, states = gradients((32, 32), 3), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        state = selector.init(grads[0], RANK)
        for step, G in enumerate(grads[:2]):
            selector.refresh_(G, state, Key(0, "w", 5 * step))
        selector.track_(grads[2], state, None)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(state)
    assert_same(*states)


DRAWN = [Importance(), Random(), Gaussian(), Coordinates(), Coordinates("norm"), Coordinates("norm", scaled=True)]


@pytest.mark.parametrize("selector", DRAWN, ids=repr)
def test_matrices_of_a_stack_draw_apart(selector):
    """A gradient that stands twice in a stack leads to two bases (contract R12)."""
    (G,) = gradients((32, 32), 1)
    state = selector.init(torch.stack([G, G]), RANK)
    selector.refresh_(torch.stack([G, G]), state, KEY)
    first, second = selector.project(torch.eye(32, dtype=G.dtype).expand(2, 32, 32), state)
    assert (projector(first) - projector(second)).abs().max() > 0.01


UNDRAWN = [
    Dominant(), Dominant("svd"), Coordinates("top"), OnlinePCA(), OnlinePCA(orthonormalise=False), PowerIteration(),
    Lazy(Dominant()), Switch(Dominant(), Coordinates("top"), at=3), Switch(OnlinePCA(), PowerIteration(), at=3),
]  # fmt: skip


@shapes
@pytest.mark.parametrize("selector", UNDRAWN, ids=repr)
def test_a_stack_is_separate_matrices(shape, selector):
    """Selectors without a draw choose and follow for each matrix of a stack as they do for it alone (contract R12)."""

    def walk(grads):
        state = selector.init(grads[0], RANK)
        changes = [selector.refresh_(G, state, Key(0, "w", 5 * step)) for step, G in enumerate(grads[:2])]
        for G in grads[2:]:
            M = G[..., :RANK]
            changes.append(selector.track_(G, state, Momentum(M, 2 * M, 1.0)))
        n = shape[1]
        return [
            *changes,
            selector.project(torch.eye(n, dtype=grads[0].dtype).expand(*grads[0].shape[:-2], n, n), state),
        ]

    first, second = gradients(shape, 5), gradients(shape, 5, seed=1)
    together = walk([torch.stack(pair) for pair in zip(first, second, strict=True)])
    for index, grads in enumerate((first, second)):
        for found, expected in zip(together, walk(grads), strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                torch.testing.assert_close(found[index], expected, rtol=0, atol=1e-10)


MATRICES = [Dominant(), Importance(), Importance(floor=0.2), OnlinePCA(), PowerIteration()]


@pytest.mark.parametrize("selector", MATRICES, ids=repr)
def test_an_idle_matrix_of_a_stack(selector):
    """One whose gradient is zero starts with some orthonormal basis, so that it can learn later, and keeps any it
    has.
    """
    a, b, c, d = gradients((48, 20), 4)
    state = selector.init(torch.stack([a, a]), RANK)
    for step, pair in enumerate(([a, 0 * a], [b, 0 * a], [c, a], [0 * a, d])):
        held = state["basis"].clone()
        selector.refresh_(torch.stack(pair), state, Key(0, "w", step))
        for index, G in enumerate(pair):
            Q = state["basis"][index]
            torch.testing.assert_close(Q.T @ Q, torch.eye(RANK, dtype=Q.dtype), rtol=0, atol=1e-12)
            assert torch.equal(Q, held[index]) == (step > 0 and not G.any())


def test_weights_of_a_zero_matrix_are_even():
    """Where no singular value is positive there is nothing to go by; the other matrices of the stack are not touched
    by it.
    """
    sigma = torch.tensor([[0.0, 0.0, 0.0], [3.0, 1.0, 0.0]], dtype=torch.float64)
    for selector in (Importance(), Importance(power=2.0), Importance(power=0.5)):
        even, weights = selector.log_weights(sigma).exp()
        torch.testing.assert_close(even, torch.full_like(even, 1 / 3), rtol=1e-12, atol=0)
        expected = sigma[1] ** selector.power / (sigma[1] ** selector.power).sum()
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)


def test_overlap_of_a_stack_is_the_mean():
    """Lazy's period grows where the overlap, averaged over the stack, reaches the threshold: here one of two stands
    still.
    """
    still, moving = gradients((48, 20), 1)[0], gradients((48, 20), 1, seed=5)[0]
    for threshold, stretch in ((0.45, 2), (0.9, 1)):
        selector = Lazy(Dominant(), threshold)
        state = selector.init(torch.stack([still, still]), RANK)
        for step, second in enumerate((still, moving.flip(1))):
            selector.refresh_(torch.stack([still, second]), state, Key(0, "w", step))
        assert state["stretch"] == stretch


def test_after_a_switch_the_second_follows():
    """Before the switch a refresh is due and nothing is followed; from there on the second does as it would alone."""
    grads, switch, second = gradients((48, 20), 3), Switch(Dominant(), PowerIteration(), at=3), PowerIteration()
    state, alone = switch.init(grads[0], RANK), second.init(grads[0], RANK)
    switch.refresh_(grads[0], state, Key(0, "w", 0))
    assert switch.track_(grads[1], state, None) is None
    assert switch.period(7, state) == 7
    for selector, held in ((switch, state), (second, alone)):
        held["basis"].copy_(state["basis"])
        selector.refresh_(grads[1], held, Key(0, "w", 3))
        assert selector.period(7, held) is None
        assert selector.track_(grads[2], held, None) is not None
    assert torch.equal(state["basis"], alone["basis"])


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("selector", EVERY_SELECTOR, ids=repr)
def test_following_a_bad_gradient_changes_nothing(selector, value, momentum):
    """``track_`` on a gradient that is zero or not finite leaves every entry of the state, and waits for nothing. In a
    stack the other matrices move on as they would by themselves.
    """
    good, bad = gradients((48, 20), 4), torch.zeros(48, 20, dtype=torch.float64)
    bad[3, 5] = value
    M = Momentum(good[3][:, :RANK], good[3][:, :RANK], 1.0) if momentum else None
    state = selector.init(good[0], RANK)
    selector.refresh_(good[0], state, KEY)
    selector.track_(good[1], state, M)
    held = part_of(state, state)
    with NoSync():
        change = selector.track_(bad, state, M)
    assert_same(state, held)
    if change is None:
        return
    Q = matrix_of(selector, state, 20)
    torch.testing.assert_close(change, Q.T @ Q, rtol=0, atol=1e-12)
    stack = selector.init(torch.stack(good[:2]), RANK)
    both = None if M is None else Momentum(M.value.expand(2, 48, RANK), M.mean.expand(2, 48, RANK), 1.0)
    selector.refresh_(torch.stack([good[0], good[0]]), stack, KEY)
    for second in (bad, good[2]):
        selector.track_(torch.stack([good[1], second]), stack, both)
    alone = selector.init(good[0], RANK)
    selector.refresh_(good[0], alone, KEY)
    selector.track_(good[2], alone, M)
    torch.testing.assert_close(stack["basis"][1], alone["basis"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("value", [1e-30, 1e30])
@pytest.mark.parametrize("selector", [OnlinePCA(), PowerIteration()], ids=repr)
def test_following_gradients_of_extreme_magnitude(selector, value, momentum):
    """In fp32 a tiny or huge gradient, whose square leaves the range, moves the basis as any multiple of it does."""
    found = []
    for factor in (1.0, value):
        first, second = (G * factor for G in gradients((48, 20), 2, dtype=torch.float32))
        state = selector.init(first, RANK)
        selector.refresh_(first, state, KEY)
        before = state["basis"].clone()
        M = first[:, 4 : 4 + RANK]
        selector.track_(second, state, Momentum(M, M, 1.0) if momentum else None)
        assert (state["basis"] - before).abs().max() > 1e-3
        found.append(state["basis"])
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


FACTORISING = [
    Dominant(), Dominant("svd"), Importance(), OnlinePCA(), PowerIteration(), Random(), Lazy(Importance()),
    Switch(Dominant(), Random(), at=3), Switch(Coordinates(), Importance(), at=3), Switch(Gaussian(), OnlinePCA(), at=3),
]  # fmt: skip


@pytest.mark.parametrize("selector", FACTORISING, ids=repr)
def test_a_refresh_that_raises_changes_nothing(monkeypatch, selector):
    """With every factorisation failing, also at the step of a switch, the state keeps every bit (contract R11)."""

    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("no convergence")

    first, second = gradients((48, 20), 2)
    state = selector.init(first, RANK)
    selector.refresh_(first, state, KEY)
    held = part_of(state, state)
    for name in ("eigh", "svd", "qr"):
        monkeypatch.setattr(torch.linalg, name, fail)
    with pytest.raises(torch.linalg.LinAlgError):
        selector.refresh_(second, state, Key(0, "w", 5))
    assert_same(state, held)


@pytest.mark.parametrize("selector", DRAWN, ids=repr)
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
    """With ``power=0`` every direction is included with probability r/n, also those of singular value zero."""
    observed = frequencies(Importance(power=0.0), [9.0, 3.0, 1.0, 0.0, 0.0], 2, 2000)
    assert (observed - 2 / 5).abs().max() < 5 * (2 / 5 * 3 / 5 / 2000) ** 0.5


def test_large_power_is_dominant():
    """As power goes to infinity, the leading subspace is selected, without underflow."""
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


@pytest.mark.parametrize("rank", [4, 6, 20])
def test_stratified_takes_one_of_each_part_of_the_spectrum(rank):
    """Every direction of a part is taken equally often, within five standard errors; there are 20 directions."""
    (G,) = gradients(SHAPES["tall"], 1)
    V, draws = right_vectors(G), 400
    parts = [range(-(-j * 20 // rank), -(-(j + 1) * 20 // rank)) for j in range(rank)]
    assert [i for part in parts for i in part] == list(range(20))
    counts = torch.zeros(20)
    for number in range(draws):
        chosen = (V.mT @ basis(Stratified(), G, Key(0, "w", number), rank)).abs()
        assert chosen.amax(0).min() > 1 - 1e-9
        index = chosen.argmax(0).tolist()
        assert all(i in part for i, part in zip(index, parts, strict=True))
        counts[index] += 1
    for part in parts:
        share = 1 / len(part)
        error = (draws * share * (1 - share)) ** 0.5
        assert (counts[list(part)] - draws * share).abs().max() <= 5 * error


@pytest.mark.parametrize("rank", [4, 6, 20])
def test_cyclic_visits_every_direction_once_in_a_cycle(rank):
    """On a gradient that stays each of 20 directions is taken once a cycle, except for the few that fill up the last
    refresh. The next cycle has another order, and the steps between refreshes do not matter.
    """
    (G,) = gradients(SHAPES["tall"], 1)
    V, turns, orders = right_vectors(G), -(-20 // rank), []
    state = Cyclic().init(G, rank)
    for cycle in range(5):
        visits = torch.zeros(20, dtype=torch.long)
        for turn in range(turns):
            Q = basis(Cyclic(), G, Key(0, "w", 7 * turn + cycle**2), rank, state)
            index = (V.mT @ Q).abs().argmax(0)
            assert (V.mT @ Q).abs().amax(0).min() > 1 - 1e-9
            assert index.tolist() == sorted(set(index.tolist()))
            visits[index] += 1
            orders.append(tuple(index.tolist()))
        assert visits.min() == 1
        assert (visits - 1).sum() == turns * rank - 20
    assert rank == 20 or len(set(orders[::turns])) > 1


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
    """``first`` chooses before the switch and ``second`` from it on; a float is a share of the run."""
    (G,) = gradients((32, 32), 1)
    switch = Switch(Dominant(), Random(), at=at, total_steps=total_steps)
    for now in {max(step - 1, 0), step, step + 1}:
        expected = Dominant() if now < step else Random()
        key = Key(0, "w", now)
        assert torch.equal(basis(switch, G, key), basis(expected, G, key))


def test_a_share_that_is_no_whole_number_in_floats():
    """A refresh at step 55 is at the switch, although 0.55 * 100 is 55.00000000000001."""
    assert Switch(Dominant(), Random(), at=0.55, total_steps=100)._step() == 55


def test_a_switch_within_another_selector_is_told_the_length_of_the_run():
    chosen = Lazy(Switch(Dominant(), Random()))
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    optimizer = subspan.create("galore_adamw", model, rank=4, selector=chosen, total_steps=100)
    assert optimizer.selector.selector.total_steps == 100


def test_a_share_needs_the_length_of_the_run():
    """The error names the argument to pass, when the optimizer is built."""
    with pytest.raises(ValueError, match="pass total_steps"):
        Switch(Dominant(), Random()).init(torch.zeros(8, 8), 2)


def test_switch_needs_the_gradient_if_one_of_its_parts_does():
    """``needs_gradient`` of a switch is that of its parts."""
    assert Switch(Dominant(), Random()).needs_gradient
    assert not Switch(Random(), Random()).needs_gradient


@pytest.mark.parametrize("selector", [Dominant(), Dominant("svd"), Importance()], ids=repr)
def test_signs_follow_the_old_basis(selector):
    """A refresh never flips a column against its predecessor; a start from the negated basis ends at the negated
    basis.
    """
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
    """The refresh that switches returns Q_oldᵀ Q_new like any other, with the basis before and after read from the
    state.
    """
    switch, generator = Switch(Dominant(), Random(), at=3), torch.Generator().manual_seed(0)
    G = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    state = switch.init(G, 3)
    switch.refresh_(G, state, Key(0, "w", 0))
    for step, switched in ((2, 0), (3, 1), (9, 1)):
        old = state["basis"].clone()
        change = switch.refresh_(G, state, Key(0, "w", step))
        torch.testing.assert_close(change, old.mT @ state["basis"])
        assert state["switched"] == switched
