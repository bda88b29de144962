"""Adam-mini against a loop over its blocks, and against Adam where a block is one entry."""

import pytest
import torch
from support.helpers import RANK, SHAPES, feed, gradients, matrix_of, oriented_side, parameter

from subspan import SubspaceOptimizer
from subspan.residuals import Discard
from subspan.rules import AdamMini, AdamW
from subspan.selectors import Dominant

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def build(p, rule, **settings):
    return SubspaceOptimizer([p], 1e-2, selector=Dominant(), rule=rule, residual=Discard(), **settings)


def reference(R_of, steps, blocks, beta1=0.9, beta2=0.95, eps=1e-8):
    """Directions, given low-rank gradients and for each entry the name of its block."""
    directions, M, V = [], None, {}
    for t in range(1, steps + 1):
        R = R_of(t - 1)
        M = (1 - beta1) * R if M is None else beta1 * M + (1 - beta1) * R
        U = torch.empty_like(R)
        for block in sorted({blocks(i, j) for i in range(R.shape[0]) for j in range(R.shape[1])}):
            members = [(i, j) for i in range(R.shape[0]) for j in range(R.shape[1]) if blocks(i, j) == block]
            mean = sum(R[i, j].item() ** 2 for i, j in members) / len(members)
            V[block] = beta2 * V.get(block, 0.0) + (1 - beta2) * mean
            for i, j in members:
                U[i, j] = M[i, j] / (1 - beta1**t) / ((V[block] / (1 - beta2**t)) ** 0.5 + eps)
        directions.append(U)
    return directions


@shapes
@pytest.mark.parametrize("proj_type", ["std", "left", "right"])
def test_blocks_inside_the_subspace(shape, proj_type):
    """A right basis keeps the rows of the weight, so each is a block; a left one leaves the
    coordinates of the basis.
    """
    grads, p = gradients(shape, 6), parameter(shape)
    side = oriented_side(shape, proj_type)
    optimizer = build(p, AdamMini(), rank=RANK, proj_type=proj_type, scale=0.5)
    W = p.detach().clone()
    feed(optimizer, p, grads[:1])
    Q = matrix_of(Dominant(), optimizer.state[p], shape[1] if side == "right" else shape[0])
    after = feed(optimizer, p, grads[1:])
    low = [(G if side == "right" else G.T) @ Q for G in grads]
    blocks = (lambda i, j: i) if side == "right" else (lambda i, j: j)
    for U in reference(lambda t: low[t], 6, blocks):
        D = U @ Q.T
        W = W - 1e-2 * 0.5 * (D if side == "right" else D.T)
    torch.testing.assert_close(after, W, rtol=0, atol=1e-12)
    assert optimizer.state[p]["exp_avg_sq"].numel() == (shape[0] if side == "right" else RANK)


@shapes
def test_full_rank_has_a_block_for_each_row(shape):
    grads, p = gradients(shape, 5), parameter(shape)
    W = p.detach().clone()
    for U in reference(lambda t: grads[t], 5, lambda i, j: i):
        W = W - 1e-2 * U
    torch.testing.assert_close(feed(build(p, AdamMini()), p, grads), W, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(17,), (), (30, 1)], ids=str)
def test_blocks_of_one_entry_are_adam(shape):
    """Vectors, and rows of one column: torch's Adam with the same betas."""
    grads, a, b = gradients(shape, 20), parameter(shape), parameter(shape)
    ours = feed(build(a, AdamMini((0.9, 0.95))), a, grads)
    theirs = feed(torch.optim.Adam([b], 1e-2, betas=(0.9, 0.95)), b, grads)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_transport_leaves_row_blocks_and_moves_basis_blocks():
    """Under ``moments`` a V of rows does not depend on the basis; one of coordinates moves by means."""
    C = torch.linalg.qr(torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    for rows in (-2, -1):
        rule = AdamMini()
        state = rule.init(torch.zeros(1, dtype=torch.float64), (9, RANK), rows)
        for R in gradients((9, RANK), 7):
            rule.update_(R, state)
        M, V = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
        rule.transfer_(state, C, "moments")
        torch.testing.assert_close(state["exp_avg"], M @ C)
        if rows == -2:
            assert torch.equal(state["exp_avg_sq"], V)
        else:
            mean, c2 = M / (1 - 0.9**7), 1 - 0.95**7
            expected = ((V / c2 - mean.square().mean(0)) @ C.square() + (mean @ C).square().mean(0)).abs() * c2
            torch.testing.assert_close(state["exp_avg_sq"], expected)


def test_it_is_not_adam():
    assert AdamMini().blocks((9, RANK), -2) == (9, 1)
    assert AdamMini().blocks((9, RANK), -1) == (1, RANK)
    assert AdamMini().blocks((3, 9, RANK), -1) == (3, 1, RANK)
    assert AdamW().blocks((9, RANK), -2) == (9, RANK)
