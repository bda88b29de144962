"""Bytes that a rank holds, from shapes alone, against shards of a real ``fully_shard``ed model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import subspan
from subspan.costs.describe import describe
from subspan.costs.state_formulas import evaluate_groups
from subspan.recipes import RECIPES
from subspan.step.carriers import layer_of
from subspan.storage.allocation import state_bytes

WORLD, RANK = 8, 24
SMALLEST = 1200  # moments of 50 x 24 are in 8 bits, though no shard is that large; those of 40 x 24 are not


def build() -> nn.Module:
    """Rows that eight ranks do not divide: the last of 50 has one, of 9 none."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Linear(40, 50), nn.LayerNorm(50), nn.Linear(50, 40)),
        nn.Sequential(nn.Linear(40, 300), nn.Tanh(), nn.Linear(300, 9)),
    )


def here(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


@pytest.mark.parametrize("index", [0, 5, 7])
@pytest.mark.parametrize("backward_side", [False, True])
@pytest.mark.parametrize(
    "name",
    ["sara_adamw", "sara_adamw_8bit", "galore_adafactor", "sara_adam_mini", "golore_adamw", "fira_adamw", "adamw"],
)
def test_shards(name: str, backward_side: bool, index: int) -> None:
    """Weights, carriers, gradients, states and bases of one rank of eight are those that its shapes say."""
    formula = describe(name)["state_formula"]
    if backward_side and "carrier" not in formula:
        pytest.skip(f"{name} has no backward-side form")
    dist.init_process_group("fake", rank=index, world_size=WORLD, store=FakeStore())
    try:
        model = build()
        if backward_side:
            subspan.project_backward(model, rank=RANK, share="none")
        mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
        for module in (*model, model):
            fully_shard(module, mesh=mesh)
        settings: dict[str, Any] = {} if name == "adamw" else {"rank": RANK, "min_8bit_size": SMALLEST}
        optimizer = subspan.create(name, model, **settings)
        model(torch.randn(6, 40)).square().mean().backward()
        held = evaluate_groups(formula, optimizer.param_groups, parallel="fsdp", world=WORLD, index=index)
        params = list(model.parameters())
        carriers = [p for p in params if layer_of(p) is not None]
        measured = {
            "carriers": sum(map(here, carriers)),
            "weights": sum(map(here, params)) - sum(map(here, carriers)),
            "gradients": sum(here(p.grad) for p in params if p.grad is not None),
            "bases": sum(here(state["basis"]) for state in optimizer.state.values() if "basis" in state),
        }
        optimizer.step()  # torch's own AdamW makes its state now; and ranks without rows have nothing to step on
        measured["states"] = state_bytes(optimizer) - measured["bases"]
        assert held == measured
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("proj_type", ["std", "right", "left", "reverse_std"])
@pytest.mark.parametrize("name", ["sara_adamw", "sara_adamw_8bit", "sara_adafactor", "sara_adam_mini"])
def test_whole_copies(name: str, proj_type: str) -> None:
    """Data-parallel ranks hold all, whatever the side of the basis and the world; tensors without memory say as
    much.
    """
    model = build()
    optimizer = subspan.create(name, model, rank=RANK, min_8bit_size=SMALLEST, proj_type=proj_type)
    formula = describe(name)["state_formula"]
    held = evaluate_groups(formula, optimizer.param_groups, parallel="ddp", world=WORLD, index=3)
    assert held["states"] + held["bases"] == state_bytes(optimizer)
    assert held["bases"] == sum(here(state["basis"]) for state in optimizer.state.values() if "basis" in state)
    assert held["weights"] == held["gradients"] == sum(map(here, model.parameters()))
    meta = [group | {"params": [p.detach().to("meta") for p in group["params"]]} for group in optimizer.param_groups]
    assert evaluate_groups(formula, meta) == held


class Experts(nn.Module):
    """Stacks of matrices, tall and wide, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(3, *shape)) for shape in ((50, 40), (40, 50)))
        self.filter = nn.Conv2d(8, 60, 3)


@pytest.mark.parametrize("rank", [RANK, 40])
@pytest.mark.parametrize("name", ["sara_adamw", "sara_adamw_8bit", "sara_adafactor", "galore_sgd"])
def test_stacks_of_matrices(name: str, rank: int) -> None:
    """Each matrix of a stack has moments and a basis of its own, or at rank 40 none."""
    model = Experts()
    optimizer = subspan.create(name, model, rank=rank, targets=["up", "down", "filter.weight"], min_8bit_size=SMALLEST)
    held = evaluate_groups(describe(name)["state_formula"], optimizer.param_groups)
    assert held["states"] + held["bases"] == state_bytes(optimizer)
    assert held["bases"] == sum(here(state["basis"]) for state in optimizer.state.values() if "basis" in state)


def test_the_parts_of_all_ranks_are_the_whole() -> None:
    groups = subspan.create("sara_adamw", build(), rank=RANK, proj_type="right").param_groups
    formula = describe("sara_adamw")["state_formula"]
    ranks = [evaluate_groups(formula, groups, parallel="fsdp", world=WORLD, index=i) for i in range(WORLD)]
    whole = evaluate_groups(formula, groups)
    assert sum(rank["weights"] for rank in ranks) == whole["weights"]
    assert {rank["bases"] for rank in ranks} == {whole["bases"]}


def test_refusals() -> None:
    groups = [{"params": [torch.empty(8, 6, device="meta")], "rank": 2, "proj_type": "left"}]
    formula = describe("sara_adamw")["state_formula"]
    for settings, words in (
        ({"parallel": "tp"}, "parallel='tp': expected 'ddp' or 'fsdp'"),
        ({"world": 0}, "world=0: expected a number of ranks >= 1"),
        ({"world": 4, "index": 4}, "index=4: expected a rank from 0 to 3, below world=4"),
        (
            {"parallel": "fsdp", "world": 2},
            "proj_type='left': a basis of rows that fsdp spreads over ranks; use 'std' or 'right'",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate_groups(formula, groups, **settings)


def test_formulas_are_those_recorded() -> None:
    """Every listed optimizer prints the formulas that were recorded, character for character and in this order."""
    recorded = json.loads((Path(__file__).parent / "state_formulas.json").read_text())
    assert json.dumps({name: describe(name)["state_formula"] for name in RECIPES}) == json.dumps(recorded)
