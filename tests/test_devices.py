"""Whole steps on a CUDA device that is not there: nothing that is held for a parameter stays behind on another one."""

from typing import Any

import pytest
import torch
from support.fake_cuda import fake_cuda
from support.helpers import SETTINGS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import subspan
from subspan.recipes import RECIPES

NAMES = [name for name in RECIPES if name != "adamw"]  # that is torch's


def moved(x: Any, device: str) -> Any:
    """What accelerate does with the state of an optimizer when it has moved the model."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, dict):
        return {key: moved(value, device) for key, value in x.items()}
    return [moved(value, device) for value in x] if isinstance(x, list) else x


def move(model: nn.Module) -> None:
    """Does what ``model.cuda()`` does, which keeps the parameters; torch does not let fake ones go that way."""
    for p in model.parameters():
        p.fake_device = torch.device("cuda", 0)  # type: ignore[attr-defined]


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        for state in optimizer.state.values():  # a refresh reads values, which fake tensors have not
            state.update({"refresh_step": 0} if "refresh_step" in state else {})
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("how", "before"), [("moved", 0), ("prepared", 1)])
@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_is_moved_after_its_optimizer_is_built(name: str, how: str, before: int) -> None:
    """By ``model.to``, and by ``Accelerator.prepare``, which also moves and loads the state."""
    fake_cuda()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = nn.Sequential(nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 12))
        optimizer = subspan.create(name, model, **{"rank": 4, "update_proj_gap": 10**6, **SETTINGS.get(name, {})})
        train(model, optimizer, before)
        move(model)
        if how == "prepared":
            optimizer.load_state_dict(moved(optimizer.state_dict(), "cuda"))
        optimizer.follow()
        train(model, optimizer, 2)
        for p, state in optimizer.state.items():
            assert p.device.type == "cuda"
            held = {
                key: value.device.type for key, value in state.items() if isinstance(value, Tensor) and key != "step"
            }
            assert set(held.values()) <= {"cuda"}, held
