"""A backward-side layer takes the inputs that ``nn.Linear`` takes."""

import contextlib

import pytest
import torch
from torch import nn

import subspan


@pytest.mark.parametrize("layer", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_dtype_of_an_input(layer: torch.dtype, given: torch.dtype, autocast: bool, training: bool) -> None:
    plain, ours = (nn.Sequential(nn.Linear(16, 8, dtype=layer)) for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    subspan.project_backward(ours, rank=4, share="none")
    optimizer = subspan.create("sara_adamw", ours)
    x = torch.randn(4, 16, dtype=given)
    around = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.set_grad_enabled(training), around:
        try:
            expected = plain(x)
        except RuntimeError as error:
            with pytest.raises(RuntimeError, match=str(error)[:20]):
                ours(x)
            return
        torch.testing.assert_close(ours(x), expected)
    assert optimizer.state
