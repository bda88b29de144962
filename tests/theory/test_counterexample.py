"""GoLore's counterexample: where GaLore does not converge, and the others do (arXiv 2410.11289, section 4).

    min f(X) = ||A X||² / 2 + <B, X>,      A = [I 0],  B = [[D, 0], [0, 0]]
    stochastic gradient  grad f(X) + xi C,  C = [[0, 0], [0, I_r]],  xi = +-1

Near the optimum the r directions of the noise exceed the gradient, and the dominant subspace is the noise.
"""

import pytest
import torch

from subspan import SubspaceOptimizer
from subspan.residuals import Discard
from subspan.rules import SGD
from subspan.selectors import Dominant, Importance, Random, Switch

N, R, STEPS, LR = 10, 4, 20_000, 3e-3
K = N - R
SELECTORS = {
    "galore": Dominant(),
    "golore": Random(),
    "hybrid": Switch(Dominant(), Random(), at=0.5, total_steps=STEPS),
    "sara": Importance(),
}


def distance_to_the_optimum(method: str, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    D = torch.randn(K, K, generator=generator, dtype=torch.float64)
    X = torch.nn.Parameter(torch.zeros(N, N, dtype=torch.float64))
    with torch.no_grad():
        X[:K, :K] = 0.5 * torch.eye(K)
        X[K:] = torch.randn(R, N, generator=generator, dtype=torch.float64)
    noise = torch.diag(torch.tensor([0.0] * K + [1.0] * R, dtype=torch.float64))
    signs = torch.randint(0, 2, (STEPS,), generator=generator) * 2 - 1
    if method == "full":
        optimizer = torch.optim.SGD([X], lr=LR, momentum=0.9, dampening=0.9)
    else:
        optimizer = SubspaceOptimizer(
            [X], LR, R, selector=SELECTORS[method], rule=SGD(0.9, 0.9), residual=Discard(), transfer="rotate",
            update_proj_gap=100, scale=1.0, proj_type="left",
        )  # fmt: skip
    for sign in signs:
        G = sign * noise
        G[:K] += X.detach()[:K]
        G[:K, :K] += D
        X.grad = G
        optimizer.step()
    top = X.detach()[:K]
    return (0.5 * top.square().sum() + (D * top[:, :K]).sum() + 0.5 * D.square().sum()).item()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("method", "least", "most"),
    [
        ("full", -1e-9, 1e-6),
        ("galore", 1.0, 10.0),
        ("golore", -1e-9, 0.05),
        ("hybrid", -1e-9, 0.05),
        ("sara", -1e-9, 0.05),
    ],
)
def test_who_converges(method, least, most, seed):
    """The dominant subspace stays more than 1.0 above the optimum. The others reach it."""
    assert least <= distance_to_the_optimum(method, seed) < most
