"""Adafactor against a loop from the paper and torch's own. (``test_parity_galore``: against GaLore's published
class.)
"""

import pytest
import torch
from support.helpers import RANK, SHAPES, feed, gradients, oriented_side, parameter

from subspan import SubspaceOptimizer
from subspan.residuals import Discard
from subspan.rules import Adafactor
from subspan.selectors import Dominant, Random

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def build(p, rule, **settings):
    return SubspaceOptimizer([p], 1e-2, selector=Dominant("svd"), rule=rule, residual=Discard(), **settings)


@shapes
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_full_rank_against_the_paper(shape, beta1):
    """Algorithm 4 with beta2_t = 1 - t^-0.8, entry by entry, then the running average of the update."""
    grads, p = gradients(shape, 6), parameter(shape)
    rows, columns = shape
    W = p.detach().clone()
    row, col, M = [0.0] * rows, [0.0] * columns, torch.zeros(shape, dtype=torch.float64)
    for t, G in enumerate(grads, start=1):
        b = 1 - t**-0.8
        square = (G**2 + 1e-30).tolist()
        row = [b * row[i] + (1 - b) * sum(square[i]) / columns for i in range(rows)]
        col = [b * col[j] + (1 - b) * sum(square[i][j] for i in range(rows)) / rows for j in range(columns)]
        mean = sum(row) / rows
        U = [[G[i, j].item() / (row[i] * col[j] / mean) ** 0.5 for j in range(columns)] for i in range(rows)]
        U = torch.tensor(U, dtype=torch.float64)
        U = U / max(1.0, U.square().mean().item() ** 0.5)
        M = beta1 * M + (1 - beta1) * U
        W = W - 1e-2 * M
    torch.testing.assert_close(feed(build(p, Adafactor(beta1=beta1)), p, grads), W, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [*SHAPES.values(), (17,)], ids=str)
def test_torch_adafactor(shape):
    """The step is that of ``torch.optim.Adafactor``, whose learning rate is min(lr, 1/sqrt(t)) times the root mean
    square of the weight.
    """
    a, b = parameter(shape), parameter(shape)
    ours, theirs = build(a, Adafactor(beta1=0.0)), torch.optim.Adafactor([b], lr=0.2)
    for t, G in enumerate(gradients(shape, 40), start=1):
        ours.param_groups[0]["lr"] = min(0.2, t**-0.5) * b.detach().square().mean().item() ** 0.5
        torch.testing.assert_close(feed(ours, a, [G]), feed(theirs, b, [G]), rtol=0, atol=1e-10)


@shapes
@pytest.mark.parametrize("how", ["keep", "rotate", "moments", "reset"])
def test_across_refreshes(shape, how):
    """The step agrees inside a moving subspace and under a schedule: momentum averages updates, so lr acts at once."""
    p, left = parameter(shape), oriented_side(shape, "std") == "left"
    selector, rule = Random(), Adafactor(beta1=0.8, decay=0.6, eps=0.05, clip=0.7)
    parts = {"selector": selector, "rule": rule, "residual": Discard(), "transfer": how}
    optimizer = SubspaceOptimizer([p], 1e-2, RANK, **parts, scale=0.5, update_proj_gap=3)
    W, Q, count = p.detach().clone(), None, 0
    for t, G in enumerate(gradients(shape, 10)):
        lr = optimizer.param_groups[0]["lr"] = 1e-2 / (t + 1)
        feed(optimizer, p, [G])
        old, Q = Q, optimizer.state[p]["basis"].clone()
        R = (G.T if left else G) @ Q
        if t == 0 or (t % 3 == 0 and how == "reset"):
            count, M, row, col = 0, torch.zeros_like(R), torch.zeros(len(R)).double(), torch.zeros(RANK).double()
        elif t % 3 == 0 and how != "keep":
            C = old.T @ Q
            M, col = M @ C, col @ C**2 if how == "moments" else col
        count += 1
        b = 1 - count**-0.6
        row, col = (b * A + (1 - b) * (R.square() + 0.05).mean(dim) for A, dim in ((row, 1), (col, 0)))
        U = R / (torch.outer(row, col) / row.mean()).sqrt()
        M = 0.8 * M + 0.2 * U / max(1.0, U.square().mean().sqrt().item() / 0.7)
        D = M @ Q.T
        W = W - lr * 0.5 * (D.T if left else D)
        torch.testing.assert_close(p.detach(), W, rtol=0, atol=1e-12)


def test_momentum_that_was_not_kept():
    """A schedule that turns the momentum on where none was allocated is refused, with the remedy."""
    p = parameter((48, 20))
    optimizer = build(p, Adafactor(beta1=0.0))
    assert "exp_avg" not in optimizer.state[p]
    optimizer.param_groups[0]["beta1"] = 0.9
    with pytest.raises(ValueError, match=r"beta1=0.9: was 0 .* build the optimizer again"):
        feed(optimizer, p, gradients((48, 20), 1))


def test_vectors_keep_a_whole_second_moment():
    """Without factors the second moment is V <- b V + (1 - b) (g² + eps)."""
    grads, p = gradients((17,), 6), parameter((17,))
    W, V = p.detach().clone(), torch.zeros(17, dtype=torch.float64)
    for t, g in enumerate(grads, start=1):
        b = 1 - t**-0.8
        V = b * V + (1 - b) * (g**2 + 1e-30)
        U = g / V.sqrt()
        W = W - 1e-2 * U / max(1.0, U.square().mean().sqrt().item())
    torch.testing.assert_close(feed(build(p, Adafactor(beta1=0.0)), p, grads), W, rtol=0, atol=1e-12)


def test_stacks_are_separate_matrices():
    """Each matrix of a stack has factors and a clipping of its own."""
    grads = [
        torch.stack([G, 50 * H]) for G, H in zip(gradients((12, 8), 6), gradients((12, 8), 6, seed=1), strict=True)
    ]
    stack = torch.nn.Parameter(torch.zeros(2, 12, 8, dtype=torch.float64))
    together = feed(build(stack, Adafactor()), stack, grads)
    for index in range(2):
        p = torch.nn.Parameter(torch.zeros(12, 8, dtype=torch.float64))
        alone = feed(build(p, Adafactor()), p, [G[index] for G in grads])
        torch.testing.assert_close(together[index], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", ["rotate", "moments"])
def test_transfer(how):
    """The momentum turns with the basis; under ``moments`` the columns' means of squares move with C², the rows'
    stay.
    """
    rule = Adafactor()
    state = rule.init(torch.zeros(1, dtype=torch.float64), (9, RANK), -2)
    for R in gradients((9, RANK), 4):
        rule.update_(R, state)
    before = {key: value.clone() for key, value in state.items()}
    C = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rule.transfer_(state, C, how)
    torch.testing.assert_close(state["exp_avg"], before["exp_avg"] @ C)
    assert torch.equal(state["exp_avg_sq_row"], before["exp_avg_sq_row"])
    expected = before["exp_avg_sq_col"] @ C**2 if how == "moments" else before["exp_avg_sq_col"]
    torch.testing.assert_close(state["exp_avg_sq_col"], expected)


@pytest.mark.parametrize(
    "settings", [{"beta1": 1.0}, {"beta1": -0.1}, {"decay": 0.0}, {"eps": 0.0}, {"clip": -1.0}, {"clip": "1"}]
)
def test_settings_check_themselves(settings):
    (key,) = settings
    with pytest.raises(ValueError, match=f"{key}="):
        Adafactor(**settings)
