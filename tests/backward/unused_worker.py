"""One rank of a data-parallel run in which some layers run on one rank only, and in one step on none.

Its arguments: the recipe, settings of ``project_backward`` as JSON, and the path of what it writes.
"""

import json

import torch
import torch.distributed as dist
from support.processes import joined
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import subspan

STEPS = 12


class Branches(nn.Module):
    """Three layers; the caller says which of the last two run."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in "abc")

    def forward(self, x, use):
        y = self.a(x)
        for name in use:
            y = y + getattr(self, name)(y.tanh())
        return y


def used(step, rank):
    """The first rank alone runs b, the second alone runs c, and in every fourth step nobody runs either."""
    return "" if step % 4 == 3 else "bc"[rank]


def batch(step, rank):
    return torch.randn(48, 32, generator=torch.Generator().manual_seed(2 * step + rank), dtype=torch.float64)


def optimizer_of(name, model, settings):
    subspan.project_backward(model, **{"rank": 8, "share": "none", **settings})
    return subspan.create(name, model, lr=1e-2, update_proj_gap=3)


def train(model, name, settings):
    optimizer = optimizer_of(name, model, settings)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    refreshed = set()
    rank = dist.get_rank()
    for step in range(STEPS):
        wrapped(batch(step, rank), used(step, rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        refreshed |= {state["refresh_step"] for state in optimizer.state.values() if "refresh_step" in state}
    return refreshed


def main(name, settings, path):
    with joined():
        model = Branches().double()
        refreshed = train(model, name, json.loads(settings))
        torch.save((model.state_dict(), sorted(refreshed)), f"{path}.{dist.get_rank()}.pt")
