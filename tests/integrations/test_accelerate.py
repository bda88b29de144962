"""Accelerate: a prepared optimizer trains, accumulates, clips, and resumes from ``save_state`` with the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from support.frameworks import PROJECTED, STEPS, projected
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

import subspan


@pytest.fixture(autouse=True)
def fresh_state() -> None:
    """Accelerate keeps its settings in singletons."""
    for singleton in (AcceleratorState, GradientState, PartialState):
        singleton._reset_state()


def prepare(llama: Any, text: Any, name: str, accumulate: int = 1) -> tuple[Any, ...]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = llama()
    optimizer = subspan.create(name, model, lr=1e-2, rank=4, update_proj_gap=4, total_steps=STEPS)
    scheduler = LinearLR(optimizer, total_iters=4)
    loader = DataLoader(text, batch_size=8)
    return accelerator, *accelerator.prepare(model, optimizer, loader, scheduler)


def train(accelerator: Any, model: Any, optimizer: Any, loader: Any, scheduler: Any, steps: int) -> list[float]:
    batches = list(loader)
    losses = []
    for step in range(steps):
        with accelerator.accumulate(model):
            loss = model(**batches[step % len(batches)]).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["sara_adamw", "sara_adamw_8bit", "fira_sara_adamw"])
def test_trains(llama: Any, text: Any, name: str) -> None:
    run = prepare(llama, text, name)
    losses = train(*run, steps=2 * STEPS)
    assert losses[-1] < losses[0] - 1
    assert projected(run[2].optimizer) == PROJECTED


def test_accumulation(llama: Any, text: Any) -> None:
    """Steps are taken only at the boundaries."""
    run = prepare(llama, text, "sara_adamw", accumulate=4)
    train(*run, steps=8)
    assert {group["clock"] for group in run[2].optimizer.param_groups} == {2}


def test_resume_is_exact(llama: Any, text: Any, tmp_path: Path) -> None:
    """Six steps, saved, and six more: the same bits from the saved state."""
    run = prepare(llama, text, "sara_adamw")
    train(*run, steps=6)
    run[0].save_state(str(tmp_path))
    train(*run, steps=6)
    again = prepare(llama, text, "sara_adamw")
    again[0].load_state(str(tmp_path))
    train(*again, steps=6)
    for p, q in zip(run[1].parameters(), again[1].parameters(), strict=True):
        assert torch.equal(p, q)
