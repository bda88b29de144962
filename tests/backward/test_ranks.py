"""Ranks that are asked for and ranks that share a basis: neither is guessed."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import subspan
from subspan import project_backward
from subspan.utils.errors import SettingError


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 12))


def with_carriers(rank=4, **settings):
    model = layers()
    project_backward(model, rank=rank, share="none", **settings)
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda model: subspan.create("sara_adamw", model, rank=8),
        lambda model: subspan.create("sara_adamw", model, rank=128),
        lambda model: subspan.SubspaceAdamW(model, rank=8),
        lambda model: subspan.SubspaceAdamW(model.named_parameters(), rank=8),
        lambda model: subspan.SubspaceAdamW([{"params": list(model.named_parameters()), "rank": 8}]),
    ],
    ids=["create", "create with the default's number", "module", "names", "groups"],
)
def test_another_rank_than_that_of_the_layers_is_refused(build):
    with pytest.raises(SettingError, match=r"rank=\d+: the backward-side layer of 0.weight was made with rank=4"):
        build(with_carriers())


def test_an_override_of_the_rank_is_refused():
    with pytest.raises(SettingError, match=r"overrides\['0'\]: rank=8, but the backward-side layer .* rank=4"):
        subspan.create("sara_adamw", with_carriers(), overrides={"0": {"rank": 8}})


def test_no_rank_takes_that_of_the_layers():
    optimizer = subspan.create("sara_adamw", with_carriers())
    assert {group["rank"] for group in optimizer.param_groups} == {4, None}
    assert optimizer.defaults["rank"] == 4
    assert subspan.create("sara_adamw", with_carriers(), rank=4).defaults["rank"] == 4
    assert type(subspan.create("sara_adamw", layers()).defaults["rank"]) is int


@pytest.fixture
def world():
    """Process groups that this process knows of and nobody else has joined: a collective over the world is counted."""
    dist.init_process_group("fake", rank=0, world_size=2, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def steps(model, optimizer, count=5):
    for step in range(count):
        x = torch.randn(7, 16, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["sara_adamw", "rso_adamw"])
def test_a_model_of_this_process_alone_sends_nothing(name, world):
    """A member of an ensemble, or a stage of a pipeline: other processes exist, and train something else."""
    from subspan.costs.collectives import CountCollectives

    model = with_carriers()
    optimizer = subspan.create(name, model, update_proj_gap=2)
    with CountCollectives() as counted:
        steps(model, optimizer)
    assert counted.sent.bytes == {}


def test_who_averages_gradients_alone_names_the_ranks(world):
    from subspan.costs.collectives import CountCollectives

    model = with_carriers(process_group=dist.group.WORLD)
    optimizer = subspan.create("sara_adamw", model, update_proj_gap=2)
    with CountCollectives() as counted:
        steps(model, optimizer)
    assert counted.sent.bytes.get("broadcast", 0) > 0


def test_a_plain_model_of_this_process_alone_steps_in_the_backward_pass(world):
    model = layers()
    optimizer = subspan.SubspaceAdamW(model, rank=4)
    optimizer.enable_step_in_backward(model)
    before = model[0].weight.detach().clone()
    steps(model, optimizer, 2)
    assert not torch.equal(before, model[0].weight)


def test_a_model_inside_of_ddp_is_refused_when_it_runs():
    """The model itself does not show that it is wrapped; its forward pass does."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = layers()
        wrapped = nn.parallel.DistributedDataParallel(model)
        subspan.SubspaceAdamW(model, rank=4).enable_step_in_backward(model)
        with pytest.raises(SettingError, match="before it has been averaged over the ranks"):
            wrapped(torch.ones(3, 16))
    finally:
        del wrapped
        dist.destroy_process_group()
