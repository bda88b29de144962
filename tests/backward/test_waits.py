"""An ordinary training step with backward-side layers waits for no device (contract R10):
forward, backward and step.
"""

from typing import Any

import pytest
import torch
from support.backward_side import backward_side
from support.helpers import METHODS, NoSync
from torch import nn

from subspan.recipes import RECIPES


def works_backward_side(name: str) -> bool:
    selector = RECIPES[name].selector
    return selector is not None and not selector.tracks and not RECIPES[name].residual.needs_gradient


@pytest.mark.parametrize("merge", ["step", "refresh"])
@pytest.mark.parametrize("name", [name for name in METHODS if works_backward_side(name)])
def test_an_ordinary_training_step_never_waits(name: str, merge: str) -> None:
    """Nor does it in the model or the optimizer's plans; a step that chooses bases does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))
    optimizer, _handle = backward_side(model, name, share="none", merge=merge)

    def step(seed: int) -> Any:
        x = torch.randn(12, 24, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    with pytest.raises(AssertionError, match="waits for the device"), NoSync():
        step(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))
    optimizer, _handle = backward_side(model, name, share="none", merge=merge)
    step(0)
    with NoSync():
        step(1)
