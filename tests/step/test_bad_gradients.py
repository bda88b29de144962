"""Zero, non-finite and rank-deficient gradients, and factorisations that fail (contract R4, R11)."""

from itertools import product

import pytest
import torch
from support.helpers import (
    EVERY_SELECTOR,
    RANK,
    SHAPES,
    assert_same,
    feed,
    gradients,
    matrix_of,
    oriented_side,
    parameter,
    part_of,
)  # fmt: skip
from support.pairs import every_pair

from subspan import SubspaceAdamW
from subspan.residuals import Discard, ErrorFeedback, Fira
from subspan.selectors import Dominant, Importance, PowerIteration, Random

RESIDUALS = [Discard(), Fira(), Fira("official"), ErrorFeedback()]
residuals = pytest.mark.parametrize("residual", RESIDUALS, ids=repr)


def together(*axes):
    """Every selector with every residual that goes with it, and with all values of ``axes``."""
    rows = product(EVERY_SELECTOR, RESIDUALS, *axes)
    return [row for row in rows if row[0].orthonormal or not row[1].needs_orthonormal]


def fill(value, shape, everywhere):
    """A gradient that is ``value`` everywhere or at one entry."""
    G = torch.full(shape, value, dtype=torch.float64)
    if not everywhere:
        (G,) = gradients(shape, 1)
        G[3, 5] = value
    return G


BAD = {
    "zero": (0.0, True), "nan": (torch.nan, True), "one nan": (torch.nan, False), "inf": (torch.inf, True),
    "one inf": (torch.inf, False), "one -inf": (-torch.inf, False),
}  # fmt: skip


def build(p, selector, residual=None, **settings):
    return SubspaceAdamW(
        [p], 1e-2, RANK, selector=selector, residual=residual or Discard(), update_proj_gap=5, **settings
    )


def remembered(optimizer, p):
    """What a bad gradient must not touch: the selector's and the residual's state."""
    parts = (optimizer.selector.init(p, RANK), optimizer.residual.init(p))
    return part_of(optimizer.state[p], [key for part in parts for key in part])


@every_pair("selector, residual, shape, bad", together(SHAPES, BAD))
def test_no_refresh_from_a_bad_gradient(selector, residual, shape, bad):
    """Basis, limiter and error stay, a refresh is counted as skipped, and the next good gradient makes up for it."""
    shape, bad = SHAPES[shape], BAD[bad]
    p, good = parameter(shape), gradients(shape, 11)
    optimizer = build(p, selector, residual)
    state = optimizer.state[p]
    feed(optimizer, p, good[:5])
    if isinstance(residual, ErrorFeedback) and bad[0] == 0:
        optimizer.state[p][
            "error"
        ].zero_()  # else a gradient of zero brings what was left out before, and that is a good one
    held = remembered(optimizer, p)
    period = selector.period(5, state)
    assert state["refresh_step"] == 0
    for count in (1, 2):
        feed(optimizer, p, [fill(bad[0], shape, bad[1])])
        assert_same(remembered(optimizer, p), held)
        if period is not None:
            assert (state["refresh_step"], state["skipped_refreshes"]) == (0, count)
    feed(optimizer, p, good[5:6])
    after = remembered(optimizer, p)
    if isinstance(selector, PowerIteration) and bad[0] != 0 and not isinstance(residual, ErrorFeedback):
        assert_same(after, held)  # it follows the momentum, which is no number from then on, as in torch
        return
    assert any(not torch.equal(torch.as_tensor(after[key]), torch.as_tensor(held[key])) for key in held)
    assert all(value.isfinite().all() for value in after.values() if isinstance(value, torch.Tensor))
    if period is None:
        return
    assert (state["refresh_step"], state["skipped_refreshes"]) == (7, 2)
    feed(optimizer, p, good[6:9])
    assert state["refresh_step"] == 10


@residuals
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_limiter_between_refreshes(residual, bad):
    """A bad gradient at an ordinary step changes neither basis nor limiter, and skips no refresh."""
    p = parameter((48, 20))
    optimizer = build(p, Dominant(), residual)
    state = optimizer.state[p]
    feed(optimizer, p, gradients((48, 20), 2))
    basis, norm = state["basis"].clone(), state.get("residual_norm", torch.ones(())).clone()
    feed(optimizer, p, [fill(bad[0], (48, 20), bad[1])])
    assert torch.equal(state["basis"], basis)
    assert torch.equal(state.get("residual_norm", torch.ones(())), norm)
    assert state["skipped_refreshes"] == 0


@every_pair("selector, residual", together())
def test_a_first_step_on_zeros_is_no_step(selector, residual):
    """What checkpointing code does to a fresh optimizer, step() on zero gradients, leaves weight, basis and moments as
    they are.
    """
    p = parameter((48, 20))
    optimizer = build(p, selector, residual)
    before, held = p.detach().clone(), remembered(optimizer, p)
    after = feed(optimizer, p, [torch.zeros(48, 20, dtype=torch.float64)])
    assert torch.equal(after, before)
    state = optimizer.state[p]
    assert_same(remembered(optimizer, p), held)
    assert not any(state[key].any() for key in ("exp_avg", "exp_avg_sq"))
    assert (state["refresh_step"], state["skipped_refreshes"]) == (-1, 1)
    feed(optimizer, p, gradients((48, 20), 1))
    assert state["refresh_step"] == 1


@every_pair("selector, residual, shape, rank", together(SHAPES, (1, 2)))
def test_rank_deficient_gradients(selector, residual, shape, rank):
    """With fewer directions than the rank the basis is still orthonormal, and holds those there are. A random one need
    not hold them.
    """
    m, n = shape = SHAPES[shape]
    a, b = gradients((m, rank), 7), gradients((rank, n), 7, seed=1)
    p = parameter(shape)
    optimizer = build(p, selector, residual)
    for A, B in zip(a, b, strict=True):
        after = feed(optimizer, p, [A @ B])
        assert after.isfinite().all()
        Q = matrix_of(selector, optimizer.state[p], n if oriented_side(shape, "std") == "right" else m)
        if selector.orthonormal:
            torch.testing.assert_close(Q.T @ Q, torch.eye(RANK, dtype=Q.dtype), rtol=0, atol=1e-10)
    assert optimizer.state[p]["skipped_refreshes"] == 0
    if selector in (Dominant(), Dominant("svd"), Importance()) and not isinstance(residual, ErrorFeedback):
        G = (a[5] @ b[5]) if Q.shape[0] == n else (a[5] @ b[5]).T
        torch.testing.assert_close(G @ Q @ Q.T, G, rtol=0, atol=1e-6 * G.norm().item())


@pytest.mark.parametrize("selector", [Dominant(), Dominant("svd"), Importance()], ids=repr)
@residuals
@pytest.mark.parametrize("failure", ["raises", "nan"])
def test_a_failing_factorisation_keeps_the_old_basis(monkeypatch, caplog, selector, residual, failure):
    """While eigh and svd fail the run goes on in the old subspace, says so, and refreshes once they work again."""

    def fail(A, *args, **kwargs):
        if failure == "raises":
            raise torch.linalg.LinAlgError("no convergence")
        nan = torch.full_like(A, torch.nan)
        k = min(A.shape[-2:])
        return (nan[..., :k], nan[..., 0, :k], nan[..., :k, :]) if kwargs else (nan[..., 0], nan)

    p, good = parameter((48, 20)), gradients((48, 20), 8)
    optimizer = build(p, selector, residual)
    state = optimizer.state[p]
    feed(optimizer, p, good[:5])
    basis = state["basis"].clone()
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", fail)
        patch.setattr(torch.linalg, "svd", fail)
        before = p.detach().clone()
        after = feed(optimizer, p, good[5:6])
    assert torch.equal(state["basis"], basis)
    assert (state["refresh_step"], state["skipped_refreshes"]) == (0, 1)
    assert "keeps the old basis" in caplog.text
    assert after.isfinite().all()
    assert not torch.equal(after, before)
    feed(optimizer, p, good[6:7])
    assert state["refresh_step"] == 6
    assert not torch.equal(state["basis"], basis)


@pytest.mark.parametrize("selector", [Dominant(), Importance()], ids=repr)
def test_a_factorisation_that_fails_at_the_start(monkeypatch, selector):
    """Without any basis yet the weight stays, and the first refresh comes when it can."""

    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("no convergence")

    p, good = parameter((48, 20)), gradients((48, 20), 2)
    optimizer = build(p, selector)
    before = p.detach().clone()
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", fail)
        patch.setattr(torch.linalg, "svd", fail)
        assert torch.equal(feed(optimizer, p, good[:1]), before)
    assert not torch.equal(feed(optimizer, p, good[1:]), before)
    assert (optimizer.state[p]["refresh_step"], optimizer.state[p]["skipped_refreshes"]) == (1, 1)


@pytest.mark.parametrize("selector", [Importance(), Random()], ids=repr)
def test_a_skipped_refresh_draws_nothing(selector):
    """A zero gradient between two refreshes leaves no trace in the later choices of basis."""
    good, zero = gradients((48, 20), 11), torch.zeros(48, 20, dtype=torch.float64)
    bases = []
    for grads in ([*good[:5], good[5], *good[6:]], [zero, *good[1:5], zero, *good[6:]]):
        p = parameter((48, 20))
        optimizer = build(p, selector)
        feed(optimizer, p, grads[:10])
        optimizer.state[p]["basis"].zero_()  # the next signs depend on the old basis; here only the draw is compared
        feed(optimizer, p, grads[10:])
        bases.append(optimizer.state[p]["basis"])
    assert_same(*bases)


@pytest.mark.parametrize("value", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_magnitudes_refresh(value, dtype):
    """A tiny or huge gradient is a good one: its leading subspace is found, although its square leaves fp32's range."""
    (G,) = gradients((48, 20), 1)
    p = parameter((48, 20), dtype=dtype)
    optimizer = build(p, Dominant())
    feed(optimizer, p, [(G * value).to(dtype)])
    Q = optimizer.state[p]["basis"].double()
    V = torch.linalg.svd((G * value).to(dtype).double())[2][:RANK].T
    torch.testing.assert_close(Q @ Q.T, V @ V.T, rtol=0, atol=1e-5)


def test_sparse_gradients_are_refused():
    """A sparse gradient raises with the parameter's name and the remedy."""
    embedding = torch.nn.Embedding(30, 20, sparse=True, dtype=torch.float64)
    optimizer = SubspaceAdamW([("tokens", embedding.weight)], rank=RANK)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"'tokens'.*sparse=False"):
        optimizer.step()
