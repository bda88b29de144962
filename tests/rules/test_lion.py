"""Lion against its equations, and MSGD against SGD."""

import pytest
import torch
from support.helpers import RANK, SHAPES, feed, gradients, matrix_of, oriented_side, parameter

from subspan import SubspaceOptimizer
from subspan.residuals import Discard
from subspan.rules import MSGD, SGD, Lion
from subspan.selectors import Dominant

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def build(p, rule, **settings):
    return SubspaceOptimizer([p], 1e-2, selector=Dominant(), rule=rule, residual=Discard(), **settings)


@shapes
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.5)])
def test_lion(shape, betas):
    """U = sign(beta1 M + (1 - beta1) R), then M <- beta2 M + (1 - beta2) R; decoupled decay."""
    grads, p = gradients(shape, 8), parameter(shape)
    optimizer = build(p, Lion(betas), rank=RANK, scale=0.5, weight_decay=0.1)
    W, M = p.detach().clone(), 0.0
    side = oriented_side(shape, "std")
    for G in grads:
        feed(optimizer, p, [G])
        Q = matrix_of(Dominant(), optimizer.state[p], min(shape))
        R = (G if side == "right" else G.T) @ Q
        D = torch.sign(betas[0] * M + (1 - betas[0]) * R) @ Q.T
        M = betas[1] * M + (1 - betas[1]) * R
        W = W * (1 - 1e-2 * 0.1) - 1e-2 * 0.5 * (D if side == "right" else D.T)
    torch.testing.assert_close(p.detach(), W, rtol=0, atol=1e-12)


def test_lion_at_full_rank():
    grads, p = gradients((12, 8), 8), parameter((12, 8))
    W, M = p.detach().clone(), torch.zeros(12, 8, dtype=torch.float64)
    for G in grads:
        W, M = W - 1e-2 * torch.sign(0.9 * M + 0.1 * G), 0.99 * M + 0.01 * G
    torch.testing.assert_close(feed(build(p, Lion()), p, grads), W, rtol=0, atol=1e-12)


@shapes
@pytest.mark.parametrize("beta1", [0.1, 0.7, 1.0])
def test_both_spellings_of_sgd(shape, beta1):
    """MSGD's beta1 weighs the new gradient: MSGD(b) is SGD(1 - b, 1 - b)."""
    grads, a, b = gradients(shape, 12), parameter(shape), parameter(shape)
    settings = {"rank": RANK, "update_proj_gap": 5, "transfer": "rotate"}
    ours = feed(build(a, MSGD(beta1), **settings), a, grads)
    theirs = feed(build(b, SGD(1 - beta1, 1 - beta1), **settings), b, grads)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Lion((0.9, 1.0)), "betas="),
        (lambda: MSGD(0.0), "beta1=0.0: expected a number above 0"),
        (lambda: MSGD(1.5), "beta1=1.5"),
    ],
)
def test_settings_check_themselves(make, words):
    with pytest.raises(ValueError, match=words):
        make()
