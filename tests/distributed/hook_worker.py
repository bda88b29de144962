"""One rank of a data-parallel run with the low-rank hook. Arguments: recipe, settings as JSON, output path."""

import json

import torch
import torch.distributed as dist
from support.processes import joined
from support.sharded_model import RANK, batches, build, loss_of
from torch.nn.parallel import DistributedDataParallel

import subspan


def train(model, recipe, settings, group=None):
    optimizer = subspan.create(recipe, model, **{"lr": 1e-2, "rank": RANK, "update_proj_gap": 7, **settings})
    wrapped = DistributedDataParallel(model, process_group=group)
    sending = subspan.ddp.register(wrapped, optimizer)
    sent = []
    for x, y in batches():
        sending.reset()
        loss_of(wrapped, *(part.chunk(dist.get_world_size())[dist.get_rank()] for part in (x, y))).backward()
        before = [state.get("refresh_step") for state in optimizer.state.values()]
        optimizer.step()
        optimizer.zero_grad()
        refreshed = before != [state.get("refresh_step") for state in optimizer.state.values()]
        sent.append((refreshed, sending.bytes, sending.dense_bytes))
    return sent


def alone(path):
    with joined():
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        model = build()
        train(model, "sara_adamw", {}, groups[dist.get_rank()])
        torch.save(dict(model.state_dict()), f"{path}.{dist.get_rank()}.pt")


def main(recipe, settings, path):
    with joined():
        model = build()
        sent = train(model, recipe, json.loads(settings))
        torch.save({"weights": dict(model.state_dict()), "sent": sent}, f"{path}.{dist.get_rank()}.pt")
