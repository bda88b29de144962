"""A CUDA device computes what the CPU computes."""

import copy

import pytest
import torch
from support.helpers import METHODS, SETTINGS, net, set_gradients

import subspan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", METHODS)
def test_the_same_steps(name: str, compiled: bool) -> None:
    """Twelve steps with three refreshes: same draws, same bases, weights equal to rounding; state
    stays on its device.
    """
    cpu = net()
    gpu = copy.deepcopy(cpu).cuda()
    optimizers = [
        subspan.create(name, model, rank=4, update_proj_gap=5, seed=1, **SETTINGS.get(name, {})) for model in (cpu, gpu)
    ]
    if compiled:
        optimizers[1].compile()
    for seed in range(12):
        set_gradients(cpu, seed)
        for p, q in zip(cpu.parameters(), gpu.parameters(), strict=True):
            q.grad = p.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(cpu.parameters(), gpu.parameters(), strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=1e-3, atol=1e-4)
    assert all(state["exp_avg"].is_cuda for state in optimizers[1].state.values())
