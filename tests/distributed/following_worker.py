"""One rank of runs whose optimizer is built before ``fully_shard``: each is compared with one that is built after.

Its arguments: the recipe, its settings as JSON, whether the layers are backward-side ("backward" or "plain"), how the
parameters reach the groups ("swapped" or "left"), how many steps come before, and the path of what it writes.
"""

import copy
import json

import torch
import torch.distributed as dist
from support.processes import joined
from support.sharded_model import RANK, batches, build, loss_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import subspan


def make(recipe, settings, model):
    return subspan.create(recipe, model, **{"lr": 1e-2, "rank": RANK, "update_proj_gap": 4, **settings})


def prepared(execution):
    model = build()
    if execution == "backward":
        subspan.project_backward(model, rank=RANK, share="none", select_from="mean")
    return model


def shard(model, mesh):
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def swap_as_accelerate(model, optimizer, mesh):
    """What ``Accelerator.prepare`` does under FSDP2: placeholders with the old addresses, then the new parameters."""
    addresses = {p.data_ptr(): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for number, p in enumerate(group["params"]):
            group["params"][number] = torch.empty(1, dtype=p.dtype)
            group["params"][number].data_ptr = p.data_ptr()
    shard(model, mesh)
    new = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[addresses[p.data_ptr]] for p in group["params"]]


def step(model, optimizer, x, y):
    rank, world = dist.get_rank(), dist.get_world_size()
    loss_of(model, x.chunk(world)[rank], y.chunk(world)[rank]).backward()
    optimizer.step()
    optimizer.zero_grad()


def main(recipe, settings, execution, how, before, path):
    settings, before = json.loads(settings), int(before)
    with joined():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        first = prepared(execution)
        optimizer = make(recipe, settings, first)
        for x, y in batches()[:before]:  # every rank takes the whole batch
            loss_of(first, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        last = prepared(execution)
        last.load_state_dict(first.state_dict())
        saved = copy.deepcopy(optimizer.state_dict())
        if how == "swapped":
            swap_as_accelerate(first, optimizer, mesh)
        else:
            shard(first, mesh)
        shard(last, mesh)
        for x, y in batches()[before : before + 10]:
            step(first, optimizer, x, y)
        reference = make(recipe, settings, last)
        if before:
            reference.load_state_dict(saved)
        for x, y in batches()[before : before + 10]:
            step(last, reference, x, y)
        optimizer.load_state_dict(optimizer.state_dict())
        torch.save(
            [{key: value.full_tensor() for key, value in model.state_dict().items()} for model in (first, last)],
            f"{path}.{dist.get_rank()}.pt",
        )
