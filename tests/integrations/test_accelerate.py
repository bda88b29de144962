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
from subspan.integrations.accelerate import create
from subspan.utils.errors import SettingError


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


@pytest.mark.parametrize("name", ["sara_adamw", "fira_adamw"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_step_in_backward(llama: Any, text: Any, name: str, accumulate: int) -> None:
    """The weights of stepping afterwards, over epochs that end with fewer micro-batches, and the norm of gradients."""
    ended, norms = [], []
    for in_backward in (True, False):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model, loader = accelerator.prepare(llama(), DataLoader(text, batch_size=8))
        settings = {"lr": 1e-2, "rank": 4, "update_proj_gap": 4, "step_in_backward": in_backward}
        optimizer = accelerator.prepare(create(accelerator, name, model, **settings))
        schedule = accelerator.prepare(LinearLR(optimizer.optimizer, total_iters=4))
        found = []
        for _ in range(2):
            for batch in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch).loss)
                    if accelerator.sync_gradients:
                        found.append(float(accelerator.clip_grad_norm_(model.parameters(), float("inf"))))
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
        assert len(found) == optimizer.optimizer.param_groups[0]["clock"] == 2 * -(-8 // accumulate)
        ended.append(list(model.parameters()))
        norms.append(found)
    for p, q in zip(*ended, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-5)
    if name == "fira_adamw":  # whose residual needs the whole gradient
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_step_in_backward_clips(llama: Any, text: Any) -> None:
    """By the norm of the step before; the loop's own clipping to the same norm changes nothing."""
    ended = []
    for asked in (True, False):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model, loader = accelerator.prepare(llama(), DataLoader(text, batch_size=8))
        settings = {"lr": 1e-2, "rank": 4, "step_in_backward": True, "max_norm": 0.5}
        optimizer = accelerator.prepare(create(accelerator, "sara_adamw", model, **settings))
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if asked and accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    assert norm > 0.5
                optimizer.step()
                optimizer.zero_grad()
        ended.append(list(model.parameters()))
    assert optimizer.optimizer.param_groups[0]["lagged_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert all(torch.equal(p, q) for p, q in zip(*ended, strict=True))


def test_a_scaler_is_refused(llama: Any) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(SettingError, match="with fp16 a GradScaler looks at all gradients before a step"):
        create(accelerator, "sara_adamw", llama(), rank=4, step_in_backward=True)
    with pytest.raises(SettingError, match="AdamW is torch's own"):
        create(accelerator, "adamw", llama(), step_in_backward=True)
