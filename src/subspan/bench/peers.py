"""Optimizers of other packages that a user would pick instead.

Each is built on the same weights, through its package's own interface. The extra ``bench`` installs them, except for
apollo-torch, whose licence forbids commercial use: install it yourself if you may use it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

Parameters = list[nn.Parameter]
LR = 1e-3


@dataclass(frozen=True)
class Peer:
    """An optimizer of another package."""

    distribution: str
    """The name by which pip installs it."""
    module: str
    build: Callable[[Any, Parameters, int, int], torch.optim.Optimizer]
    """Makes the optimizer of the module, the weights, the rank, and the steps between refreshes."""
    refreshes: bool = False
    """Whether it has a subspace that it chooses again from time to time."""
    lifts: bool = False
    """Whether a matrix product projects its step back."""
    ours: str = "sara_adamw"
    """The method of this library that does the same work."""

    @property
    def installed(self) -> bool:
        """Whether its module can be imported."""
        return find_spec(self.module) is not None

    def make(self, weights: Parameters, rank: int, gap: int) -> torch.optim.Optimizer:
        """Build the optimizer on these weights."""
        return self.build(import_module(self.module), weights, rank, gap)


def _galore_torch(module: Any, weights: Parameters, rank: int, gap: int) -> Any:
    group = {"params": weights, "rank": rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
    return module.GaLoreAdamW([group], lr=LR, no_deprecation_warning=True)


def _pytorch_optimizer(module: Any, weights: Parameters, rank: int, gap: int) -> Any:
    group = {"params": weights, "rank": rank, "update_proj_gap": gap, "scale": 0.25, "projection_type": "std"}
    return module.GaLore([group], lr=LR)


def _fira(module: Any, weights: Parameters, rank: int, gap: int) -> Any:
    group = {"params": weights, "rank": rank, "update_proj_gap": gap, "alpha": 0.25, "proj_type": "std"}
    return module.FiraAdamW([group], lr=LR, no_deprecation_warning=True)


def _apollo_torch(module: Any, weights: Parameters, rank: int, gap: int) -> Any:
    group = {
        "params": weights, "rank": rank, "proj": "random", "scale_type": "channel", "scale": 1, "update_proj_gap": gap,
        "proj_type": "std",
    }  # fmt: skip
    return module.APOLLOAdamW([group], lr=LR)


PEERS = {
    "adamw_fused": Peer("torch", "torch", lambda module, weights, *_: module.optim.AdamW(weights, lr=LR, fused=True)),
    "galore_torch": Peer("galore-torch", "galore_torch", _galore_torch, refreshes=True, lifts=True),
    "pytorch_optimizer_galore": Peer(
        "pytorch-optimizer", "pytorch_optimizer", _pytorch_optimizer, refreshes=True, lifts=True
    ),
    "fira": Peer("fira", "fira", _fira, refreshes=True, lifts=True, ours="fira_adamw"),
    "apollo_torch": Peer("apollo-torch", "apollo_torch", _apollo_torch, refreshes=True),
    "bitsandbytes_8bit": Peer(
        "bitsandbytes", "bitsandbytes", lambda module, weights, *_: module.optim.AdamW8bit(weights, lr=LR)
    ),
}
