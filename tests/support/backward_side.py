"""What the tests of backward-side layers share."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import subspan
from subspan.backward.layer import BackwardLinear
from subspan.recipes import RECIPES

RANK = 8


def batches(count: int, seed: int = 0, size: int = 4) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(64, (size, 12), generator=generator)
        yield {"input_ids": ids, "labels": ids}


def backward_side(
    model: nn.Module, name: str = "sara_adamw", share: Any = "auto", merge: str = "step", **settings: Any
) -> Any:
    """The model with backward-side layers, its optimizer and its handle."""
    own = RECIPES[name].residual
    residual = None if own.needs_gradient else own  # what is refused is refused by the optimizer
    handle = subspan.project_backward(model, rank=RANK, share=share, merge=merge, residual=residual)
    chosen = {"lr": 1e-2, "update_proj_gap": 5, "stagger": False, "total_steps": 20, **settings}
    return subspan.create(name, model, **chosen), handle


def layers_of(model: nn.Module) -> dict[str, BackwardLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BackwardLinear)}


def basis_of(layer: BackwardLinear) -> Tensor:
    """``Q (in, r)``."""
    return layer.projection.down(torch.eye(layer.in_features, dtype=layer.weight.dtype))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> list[float]:
    losses = []
    for batch in data:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
