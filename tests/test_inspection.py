"""Measures of subspaces against explicit projectors and scipy, and what ``subspaces`` shows of an optimizer."""

import pytest
import torch
from scipy.linalg import subspace_angles
from support.helpers import net, walk
from torch import nn

from subspan import SubspaceAdamW, create, project_backward, subspaces
from subspan.inspection import angles, captured, overlap
from subspan.linalg import orthonormalise
from subspan.selectors import Gaussian


def bases(n=12, r=4, stack=()):
    generator = torch.Generator().manual_seed(0)
    return [orthonormalise(torch.randn(*stack, n, r, generator=generator, dtype=torch.float64)) for _ in range(2)]


def test_overlap_is_the_trace_of_the_product_of_projectors():
    U, V = bases()
    assert overlap(U, V) == pytest.approx(float(torch.trace(U @ U.T @ V @ V.T)) / 4, rel=1e-12)
    # The paper's form: the mean over i of the squared norm of U^T v_i.
    assert overlap(U, V) == pytest.approx(sum(float((U.T @ V[:, i]).norm() ** 2) for i in range(4)) / 4, rel=1e-12)
    assert overlap(U, U) == pytest.approx(1.0)
    assert overlap(torch.eye(12, dtype=torch.float64)[:, :4], torch.eye(12, dtype=torch.float64)[:, 4:8]) == 0
    A, B = bases(stack=(3,))
    assert overlap(A, B) == pytest.approx(sum(overlap(a, b) for a, b in zip(A, B, strict=True)) / 3)


def test_random_bases_overlap_by_r_over_n():
    generator = torch.Generator().manual_seed(1)
    Q = orthonormalise(torch.randn(400, 2, 12, 4, generator=generator, dtype=torch.float64))
    found = torch.tensor([overlap(U, V) for U, V in Q])
    assert abs(float(found.mean()) - 4 / 12) < 5 * float(found.std()) / 20


def test_angles_are_scipys_and_small_ones_are_exact():
    U, V = bases()
    expected = torch.rad2deg(torch.tensor(subspace_angles(U.numpy(), V.numpy())[::-1].copy()))
    torch.testing.assert_close(angles(U, V), expected, rtol=0, atol=1e-10)
    tiny = 1e-9
    turned = U.clone()
    rest = orthonormalise(torch.eye(12, dtype=torch.float64)[:, :1] - U @ U.T[:, :1])
    turned[:, 0] = torch.cos(torch.tensor(tiny)) * U[:, 0] + torch.sin(torch.tensor(tiny)) * rest[:, 0]
    assert float(angles(U, turned)[-1]) == pytest.approx(float(torch.rad2deg(torch.tensor(tiny))), rel=1e-4)


def test_captured_is_pythagoras():
    Q, _ = bases()
    G = torch.randn(7, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rest = G - G @ Q @ Q.T
    assert captured(G, Q) == pytest.approx(1 - float(rest.norm() ** 2 / G.norm() ** 2), rel=1e-12)
    assert captured(G @ Q @ Q.T, Q) == pytest.approx(1.0)


@pytest.mark.parametrize("selector", ["dominant", Gaussian(), "coordinates"], ids=str)
def test_the_subspaces_of_an_optimizer(selector):
    model = net(torch.float64)
    optimizer = SubspaceAdamW(model, rank=4, selector=selector, update_proj_gap=2, targets=["up", "down"])
    assert [(s.name, s.refreshed_at) for s in subspaces(optimizer)] == [("up.weight", -1), ("down.weight", -1)]
    walk(model, optimizer, range(3))
    for subspace, p in zip(subspaces(optimizer), (model.up.weight, model.down.weight), strict=True):
        assert subspace.refreshed_at == 2
        Q, G = subspace.basis(), subspace.gradient()
        torch.testing.assert_close(Q.T @ Q, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-12)
        expected = p.grad if p.shape[0] >= p.shape[1] else p.grad.T
        assert torch.equal(G, expected)
        if selector == "dominant":
            sigma = torch.linalg.svdvals(G)
            assert captured(G, Q) == pytest.approx(float(sigma[:4].square().sum() / sigma.square().sum()), rel=1e-9)


def test_backward_side_layers_have_a_subspace_each_projection():
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 12))
    project_backward(model, rank=4, targets=["0", "1"])
    optimizer = create("sara_adamw", model, update_proj_gap=1, stagger=False)
    model(torch.randn(32, 16)).square().mean().backward()
    optimizer.step()
    found = list(subspaces(optimizer))
    assert [s.name for s in found] == ["0.weight", "1.weight"]
    assert [tuple(s.basis().shape) for s in found] == [(16, 4), (24, 4)]
    assert all(s.gradient() is None and s.refreshed_at == 0 for s in found)
