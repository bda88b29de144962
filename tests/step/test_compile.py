"""``optimizer.compile()`` changes how the rule's step is computed, and not what comes of it."""

import copy

import pytest
import torch
from support.helpers import net, set_gradients

import subspan

NAMES = [
    "sara_adamw",
    "galore_adafactor",
    "galore_adam_mini",
    "galore_lion",
    "golore_sgd",
    "fira_sara_adamw",
    "sara_adamw_8bit",
]


def train(model: torch.nn.Module, name: str, backend: str | None) -> tuple[list[torch.Tensor], int]:
    """Seven steps with three refreshes under a schedule; the weights, and how many graphs were compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    optimizer = subspan.create(name, model, rank=4, update_proj_gap=3, weight_decay=0.1)
    if backend is not None:
        optimizer.compile(backend=backend)
    for seed in range(7):
        set_gradients(model, seed)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()
    return [p.detach() for p in model.parameters()], torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_weights(name: str, backend: str) -> None:
    model = net()
    other = copy.deepcopy(model)
    plain, none = train(model, name, None)
    compiled, graphs = train(other, name, backend)
    assert none == 0
    assert graphs > 0
    for p, q in zip(plain, compiled, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-7)


def test_a_schedule_does_not_compile_anew() -> None:
    """A graph for each shape at most, whatever the steps."""
    model = net()
    shapes = {(p.shape, p.dtype) for p in model.parameters()}
    _, graphs = train(model, "galore_adam_mini", "aot_eager")
    assert graphs <= len(shapes)
