"""Ranks that are asked for and ranks that share a basis: neither is guessed."""

import copy
import gc

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
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
        lambda model: subspan.SubspaceAdamW([nn.Parameter(torch.zeros(5))]).add_param_group(
            {"params": [model[0].carrier, model[2].carrier], "rank": 8}
        ),
    ],
    ids=["create", "create with the default's number", "module", "names", "groups", "a later group"],
)
def test_another_rank_than_that_of_the_layers_is_refused(build):
    with pytest.raises(SettingError, match=r"rank=\d+: the backward-side layer of 0.weight was made with rank=4"):
        build(with_carriers())


def test_the_side_of_a_group_is_that_of_the_layers_too():
    with pytest.raises(SettingError, match=r"proj_type='left': would compress the rows of 0.weight"):
        subspan.SubspaceAdamW([{"params": list(with_carriers().named_parameters()), "rank": 4, "proj_type": "left"}])


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


@pytest.fixture
def alone():
    """A real group of this process only, for wrappers that run."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()  # wrappers go before their group does
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


@pytest.mark.parametrize(("name", "count"), [("sara_adamw", 1), ("rso_adamw", 0)])
def test_who_may_have_forgotten_to_name_the_ranks_is_told_once(name, count, world, caplog):
    """Where a gradient chooses a basis, processes that train one model would drift apart; random bases are alike."""
    model = with_carriers()
    steps(model, subspan.create(name, model, update_proj_gap=2))
    assert caplog.text.count("pass project_backward(..., process_group=...)") == count


def test_a_copy_asks_its_own_wrapper(alone):
    """The group that was given belongs to the model that it was given for."""
    model = with_carriers(process_group=dist.group.WORLD)
    twin = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(twin)
    with torch.no_grad():
        wrapped(torch.ones(3, 16))
    assert twin[0].projection.process_group is wrapped.process_group


def test_a_wrapper_of_another_model_says_nothing(alone):
    """A forward pass that failed may leave its wrapper as the one that runs."""
    model, other = with_carriers(), nn.parallel.DistributedDataParallel(layers())
    optimizer = subspan.create("sara_adamw", model)
    with other._inside_ddp_forward():
        steps(model, optimizer, 1)
    assert model[0].projection.process_group is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_in_a_wrapper_keeps_its_ranks(reentrant, alone):
    """The forward pass is repeated in the backward pass, where no wrapper runs."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = with_carriers()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=reentrant)

    model = Checkpointed()
    optimizer = subspan.create("sara_adamw", model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(torch.ones(3, 16, requires_grad=True)).square().mean().backward()
    optimizer.step()
    assert model.inner[0].projection.process_group is wrapped.process_group


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


def test_a_model_inside_of_ddp_is_refused_when_it_runs(alone):
    """The model itself does not show that it is wrapped; its forward pass does."""
    model = layers()
    wrapped = nn.parallel.DistributedDataParallel(model)
    subspan.SubspaceAdamW(model, rank=4).enable_step_in_backward(model)
    with pytest.raises(SettingError, match="before it has been averaged over the ranks"):
        wrapped(torch.ones(3, 16))


def test_a_copy_that_no_longer_steps_in_the_backward_pass_is_not_refused(alone):
    model = layers()
    optimizer = subspan.SubspaceAdamW(model, rank=4)
    optimizer.enable_step_in_backward(model)
    twin, other = copy.deepcopy((model, optimizer))
    other._in_backward.remove()
    nn.parallel.DistributedDataParallel(twin)(torch.ones(3, 16)).sum().backward()
