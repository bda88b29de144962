"""Adafactor against a loop from the paper. (``test_parity_galore`` holds it against GaLore's published class.)"""

import pytest
import torch
from helpers import RANK, SHAPES, feed, gradients, parameter

from subspan import SubspaceOptimizer
from subspan.residuals import Discard
from subspan.rules import Adafactor
from subspan.selectors import Dominant

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
        U = torch.tensor([[G[i, j].item() / (row[i] * col[j] / mean) ** 0.5 for j in range(columns)] for i in range(rows)])
        U = U.double() / max(1.0, U.double().square().mean().item() ** 0.5)
        M = beta1 * M + (1 - beta1) * U
        W = W - 1e-2 * M
    torch.testing.assert_close(feed(build(p, Adafactor(beta1=beta1)), p, grads), W, rtol=0, atol=1e-8)


def test_vectors_keep_a_whole_second_moment():
    """The same without factors: V <- b V + (1 - b) (g² + eps)."""
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
    grads = [torch.stack([G, 50 * H]) for G, H in zip(gradients((12, 8), 6), gradients((12, 8), 6, seed=1), strict=True)]
    stack = torch.nn.Parameter(torch.zeros(2, 12, 8, dtype=torch.float64))
    together = feed(build(stack, Adafactor()), stack, grads)
    for index in range(2):
        p = torch.nn.Parameter(torch.zeros(12, 8, dtype=torch.float64))
        alone = feed(build(p, Adafactor()), p, [G[index] for G in grads])
        torch.testing.assert_close(together[index], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", ["rotate", "moments"])
def test_transfer(how):
    """The momentum turns with the basis; under ``moments`` the columns' means of squares move with C², the rows' stay."""
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
