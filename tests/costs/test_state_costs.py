"""The bytes that a rank holds, from shapes alone, against the shards of a real ``fully_shard``ed model."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import subspan
from subspan.costs.state_costs import ParameterShape, StateCosts
from subspan.step.carriers import layer_of
from subspan.storage.allocation import state_bytes

WORLD, RANK = 8, 24
SMALLEST = 1200  # moments of 50 x 24 are in 8 bits, though no shard is that large; those of 40 x 24 are not


RANKS: list[dict[str, Any]] = [{"rank": RANK}, {"rank": 0.3, "rank_pattern": {r"1\.0": 0.5, r"0\.2": 11}}]


def build() -> nn.Module:
    """A model whose rows eight ranks do not divide: of 50 rows the last rank has one, of 9 none."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Linear(40, 50), nn.LayerNorm(50), nn.Linear(50, 40)),
        nn.Sequential(nn.Linear(40, 300), nn.Tanh(), nn.Linear(300, 9)),
    )


def local_bytes(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


@pytest.mark.parametrize("ranks", RANKS, ids=["a number", "shares"])
@pytest.mark.parametrize("index", [0, 5, 7])
@pytest.mark.parametrize("backward_side", [False, True])
@pytest.mark.parametrize(
    "name",
    ["sara_adamw", "sara_adamw_8bit", "galore_adafactor", "sara_adam_mini", "golore_adamw", "fira_adamw", "adamw"],
)
def test_shards(name: str, backward_side: bool, index: int, ranks: dict[str, Any]) -> None:
    """The shapes say how many bytes one rank of eight holds of weights, carriers, gradients, states and bases."""
    costs = StateCosts.of_recipe(name)
    if backward_side and "carrier" not in costs.formulas():
        pytest.skip(f"{name} has no backward-side form")
    dist.init_process_group("fake", rank=index, world_size=WORLD, store=FakeStore())
    try:
        model = build()
        if backward_side:
            subspan.project_backward(model, share="none", **ranks)
        mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
        for module in (*model, model):
            fully_shard(module, mesh=mesh)
        settings: dict[str, Any] = {} if name == "adamw" else {**ranks, "min_8bit_size": SMALLEST}
        optimizer = subspan.create(name, model, **settings)
        model(torch.randn(6, 40)).square().mean().backward()
        held = costs.bytes_held(optimizer.param_groups, parallel="fsdp", world=WORLD, index=index)
        params = list(model.parameters())
        carriers = [p for p in params if layer_of(p) is not None]
        measured = {
            "carriers": sum(map(local_bytes, carriers)),
            "weights": sum(map(local_bytes, params)) - sum(map(local_bytes, carriers)),
            "gradients": sum(local_bytes(p.grad) for p in params if p.grad is not None),
            "bases": sum(local_bytes(state["basis"]) for state in optimizer.state.values() if "basis" in state),
        }
        optimizer.step()  # torch's own AdamW makes its state now; and ranks without rows have nothing to step on
        measured["states"] = state_bytes(optimizer) - measured["bases"]
        assert held == measured
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("ranks", RANKS, ids=["a number", "shares"])
@pytest.mark.parametrize("proj_type", ["std", "right", "left", "reverse_std"])
@pytest.mark.parametrize("name", ["sara_adamw", "sara_adamw_8bit", "sara_adafactor", "sara_adam_mini"])
def test_whole_copies(name: str, proj_type: str, ranks: dict[str, Any]) -> None:
    """Data-parallel ranks hold everything, whatever the side and the world. Shapes without memory say the same."""
    model = build()
    optimizer = subspan.create(name, model, min_8bit_size=SMALLEST, proj_type=proj_type, **ranks)
    costs = StateCosts.of_recipe(name)
    held = costs.bytes_held(optimizer.param_groups, parallel="ddp", world=WORLD, index=3)
    assert held["states"] + held["bases"] == state_bytes(optimizer)
    assert held["bases"] == sum(local_bytes(state["basis"]) for state in optimizer.state.values() if "basis" in state)
    assert held["weights"] == held["gradients"] == sum(map(local_bytes, model.parameters()))
    for form in (lambda p: p.detach().to("meta"), ParameterShape.of):
        groups = [group | {"params": [form(p) for p in group["params"]]} for group in optimizer.param_groups]
        assert costs.bytes_held(groups) == held


@pytest.mark.parametrize("backward_side", [False, True])
def test_a_proximal_term(backward_side: bool) -> None:
    """Its displacement counts."""
    model = build()
    if backward_side:
        subspan.project_backward(model, rank=RANK, share="none")
    optimizer = subspan.create("rso_adamw", model, rank=RANK, eta=2.0)
    held = StateCosts.of_recipe("rso_adamw").bytes_held(optimizer.param_groups)
    assert held["states"] + held["bases"] == state_bytes(optimizer)
    plain = [{**group, "eta": None} for group in optimizer.param_groups]
    assert StateCosts.of_recipe("rso_adamw").bytes_held(plain)["states"] < held["states"]


class Experts(nn.Module):
    """Stacks of matrices, tall and wide, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(3, *shape)) for shape in ((50, 40), (40, 50)))
        self.filter = nn.Conv2d(8, 60, 3)


@pytest.mark.parametrize("rank", [RANK, 40])
@pytest.mark.parametrize("name", ["sara_adamw", "sara_adamw_8bit", "sara_adafactor", "galore_sgd", "fira_adamw"])
def test_stacks_of_matrices(name: str, rank: int) -> None:
    """Each matrix of a stack has moments and a basis of its own, or at rank 40 none."""
    model = Experts()
    optimizer = subspan.create(name, model, rank=rank, targets=["up", "down", "filter.weight"], min_8bit_size=SMALLEST)
    held = StateCosts.of_recipe(name).bytes_held(optimizer.param_groups)
    assert held["states"] + held["bases"] == state_bytes(optimizer)
    assert held["bases"] == sum(local_bytes(state["basis"]) for state in optimizer.state.values() if "basis" in state)


def test_the_parts_of_all_ranks_are_the_whole() -> None:
    groups = subspan.create("sara_adamw", build(), rank=RANK, proj_type="right").param_groups
    costs = StateCosts.of_recipe("sara_adamw")
    ranks = [costs.bytes_held(groups, parallel="fsdp", world=WORLD, index=i) for i in range(WORLD)]
    whole = costs.bytes_held(groups)
    assert sum(rank["weights"] for rank in ranks) == whole["weights"]
    assert {rank["bases"] for rank in ranks} == {whole["bases"]}


def test_refusals() -> None:
    groups = [{"params": [torch.empty(8, 6, device="meta")], "rank": 2, "proj_type": "left"}]
    costs = StateCosts.of_recipe("sara_adamw")
    for settings, words in (
        ({"parallel": "tp"}, "parallel='tp': expected 'ddp' or 'fsdp'"),
        ({"world": 0}, "world=0: expected a number of ranks >= 1"),
        ({"world": 4, "index": 4}, "index=4: expected a rank from 0 to 3, below world=4"),
        (
            {"parallel": "fsdp", "world": 2},
            "proj_type='left': compresses the rows, which fsdp shards over ranks; use 'std' or 'right'",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            costs.bytes_held(groups, **settings)
