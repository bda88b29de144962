"""Subspaces entered by hand, with a second-order solver of torch's inside: against closed forms."""

import itertools

import pytest
import torch
from torch import nn

import subspan
from subspan.selectors import Coordinates, Gaussian, Importance, Random


def problem() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 5, bias=False)).double()
    x = torch.randn(40, 12, dtype=torch.float64)
    return model, x, x @ torch.randn(12, 5, dtype=torch.float64) + 0.1 * torch.randn(40, 5, dtype=torch.float64)


@pytest.mark.parametrize("selector", [Random(scaled=True), Random(), Gaussian(), Coordinates("uniform")], ids=repr)
def test_lbfgs_solves_the_subproblem(selector: Random) -> None:
    """L-BFGS on the carrier ends at the least-squares solution within the subspace, subspace after subspace; the weight
    is that of the whole after merging, and the loss falls to that of full least squares.
    """
    model, x, y = problem()
    handle = subspan.project_backward(model, rank=4, share="none")
    losses = []
    for outer in range(80):
        carriers = handle.enter(selector, step=outer)
        before = model[0].weight.detach().clone()
        inner = torch.optim.LBFGS(
            carriers, max_iter=60, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
        )

        def closure(inner: torch.optim.LBFGS = inner) -> torch.Tensor:
            inner.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        inner.step(closure)
        Q = model[0].projection.down(torch.eye(12, dtype=torch.float64))
        B = torch.linalg.lstsq(x @ Q, y - x @ before.T).solution.T
        torch.testing.assert_close(carriers[0].detach(), B, rtol=0, atol=1e-6)
        handle.merge()
        torch.testing.assert_close(model[0].weight.detach(), before + B @ Q.T, rtol=0, atol=1e-6)
        losses.append((x @ model[0].weight.T - y).square().mean().item())
    best = (x @ torch.linalg.lstsq(x, y).solution - y).square().mean().item()
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(losses))
    assert losses[-1] < 1.05 * best


def test_a_selector_that_needs_a_gradient_is_refused() -> None:
    model, _, _ = problem()
    handle = subspan.project_backward(model, rank=4, share="none")
    with pytest.raises(ValueError, match=r"selector=Importance.*chooses from a gradient; give one that draws"):
        handle.enter(Importance())
