"""What an ordinary step costs: no wait for the device, at most one temporary of the size of the weight."""

import pytest
import torch
from support.helpers import RANK, SETTINGS, FullSizeMeter, NoSync, feed, gradients, net, parameter, set_gradients, walk

from subspan import SubspaceAdamW, SubspaceOptimizer, create
from subspan.linalg import project
from subspan.recipes import RECIPES
from subspan.residuals import Discard, Fira
from subspan.rules import SGD
from subspan.selectors import Dominant, Random

OURS = [name for name in RECIPES if name != "adamw"]  # that is torch's


def build(method, model, **settings):
    return create(
        method, model, **{"rank": RANK, "update_proj_gap": 5, "lr": 1e-2, **SETTINGS.get(method, {}), **settings}
    )


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: float(x[0]), lambda x: x.equal(x + 1), torch.nonzero,
        lambda x: x[x > 0], lambda x: x.masked_select(x > 0), torch.unique, torch.unique_consecutive, torch.argwhere,
        lambda x: x.__setitem__(x > 0, torch.ones(2)), lambda x: torch.ones(3).repeat_interleave(x.long()),
    ],
)  # fmt: skip
def test_what_waits_is_noticed(wait):
    """Each way in which a value, or a shape that depends on one, reaches the host."""
    x = torch.tensor([0.0, 1.0, 2.0])
    with pytest.raises(AssertionError, match="waits for the device"), NoSync():
        wait(x)
    with NoSync():
        torch.where(x > 0, x, 1.0)[torch.tensor([1])].topk(1).values.add_(x.norm())


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["float", "tensor"])
def test_an_ordinary_step_never_waits_for_the_device(method, lr):
    """Between refreshes no value of a tensor reaches the host (contract R10). A refresh does: the check works."""
    model = net()
    optimizer = build(method, model, lr=lr, weight_decay=0.1)
    if RECIPES[method].selector is not None:
        set_gradients(model, 0)
        with pytest.raises(AssertionError, match="waits for the device"), NoSync():
            optimizer.step()
    optimizer = build(method, model, lr=lr, weight_decay=0.1)
    walk(model, optimizer, [0])
    set_gradients(model, 1)
    with NoSync():
        optimizer.step()


def test_the_meter_counts():
    """Two full-size temporaries at once are two; one after another they are one; views and
    in-place results are none.
    """
    x = torch.ones(64, 64)
    with FullSizeMeter(4 * 64 * 64) as meter:
        y = x * 2
        y.mT.add_(1)
        del y
        y = x * 3
    assert meter.peak == 1
    with FullSizeMeter(4 * 64 * 64) as meter:
        y = x * 2
        z = x * 3
        del y, z
    assert meter.peak == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(600, 64), (64, 600)], ids=["tall", "wide"])
@pytest.mark.parametrize("residual", [Discard(), Fira(), Fira("official"), Fira(limiter=None)], ids=repr)
@pytest.mark.parametrize("selector", [Dominant(), Random()], ids=repr)
def test_one_full_size_temporary_at_a_time(dtype, shape, residual, selector):
    """An ordinary step of a projected matrix never holds two temporaries of the size of the weight, and none where the
    weight is as precise as the step, Fira's residual included.
    """
    p = parameter(shape, dtype=dtype)
    optimizer = SubspaceAdamW([p], rank=RANK, selector=selector, residual=residual, weight_decay=0.1)
    first, second = gradients(shape, 2, dtype=dtype)
    feed(optimizer, p, [first])
    p.grad = second
    with FullSizeMeter(p.numel() * 2) as meter:
        optimizer.step()
    assert meter.peak == (0 if dtype == torch.float32 else 1)


def test_momentum_sgd_needs_none_either():
    """The SGD rule holds no full-size temporary either."""
    p = parameter((600, 64))
    optimizer = SubspaceOptimizer([p], 1e-2, RANK, selector=Dominant(), rule=SGD(), residual=Discard())
    first, second = gradients((600, 64), 2)
    feed(optimizer, p, [first])
    p.grad = second
    with FullSizeMeter(p.numel() * 2) as meter:
        optimizer.step()
    assert meter.peak == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projection_copies_no_gradient(dtype):
    """``G Q`` makes no temporary of the size of ``G``, of whatever precision ``G`` is."""
    G, Q = torch.ones(2000, 64, dtype=dtype), torch.ones(64, RANK)
    with FullSizeMeter(G.numel() * 2) as meter:
        project(G, Q)
    assert meter.peak == 0
