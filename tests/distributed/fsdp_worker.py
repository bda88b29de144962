"""One rank of a fully_shard run: trains the small model by each of the methods named, writes what came of it; the first
also what it sent.

Its argument: a JSON object with "names" {label: [recipe, settings]}, "mesh" (sizes), "out" (path), and "backward" and
"in_backward" (settings of project_backward and of enable_step_in_backward, or null).
"""

import json

import torch
import torch.distributed as dist
from support.processes import joined
from support.sharded_model import RANK, SMALLEST, batches, build, loss_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

import subspan
from subspan.factory import residual_of


class Silent:
    """In place of ``CommDebugMode``, which takes as long as the step it watches."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def get_comm_counts(self):
        return {}


def train(recipe, settings, mesh, backward, in_backward):
    watch = CommDebugMode if dist.get_rank() == 0 else Silent
    model = build()
    if backward is not None:
        residual = residual_of(recipe, settings.get("residual"))
        subspan.project_backward(model, **{"rank": RANK, "residual": residual, **backward})
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to("cpu")  # makes other parameters of those that fully_shard has made
    given = {"lr": 1e-2, "rank": RANK, "update_proj_gap": 7, "min_8bit_size": SMALLEST, **settings}
    optimizer = subspan.create(recipe, model, **given)
    if in_backward is not None:
        optimizer.enable_step_in_backward(model, **in_backward)
    sent, refreshes, losses, norms = [], [], [], []
    for number, (x, y) in enumerate(batches()):
        # Every third step has fewer micro-batches, as at the end of an epoch.
        parts = 1 if in_backward is None or number % 3 == 2 else in_backward.get("accumulate", 1)
        x, y = x.chunk(dist.get_world_size())[dist.get_rank()], y.chunk(dist.get_world_size())[dist.get_rank()]
        for part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = loss_of(model, *part) / parts
            with watch() as backward_sent:
                loss.backward()
        if in_backward is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")).full_tensor().item())
        before = [state.get("refresh_step") for state in optimizer.state.values()]
        with watch() as comm:
            optimizer.step()
        refreshes.append(before != [state.get("refresh_step") for state in optimizer.state.values()])
        sent.append(
            [{str(op): count for op, count in mode.get_comm_counts().items()} for mode in (comm, backward_sent)]
        )
        optimizer.zero_grad()
        losses.append(loss.item())
    states = {}
    named = [
        pair for group in optimizer.param_groups for pair in zip(group["param_names"], group["params"], strict=True)
    ]
    for name, p in named:
        for key, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor):
                states[f"{name}.{key}"] = value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
    weights = {key: value.full_tensor().clone() for key, value in model.state_dict().items()}
    report = {"sent": sent, "refreshes": refreshes, "losses": losses, "norms": norms}
    return {"weights": weights, "states": states}, report


def main(asked):
    asked = json.loads(asked)
    names = ("copies", "shards")[-len(asked["mesh"]) :]
    with joined():
        mesh = init_device_mesh("cpu", tuple(asked["mesh"]), mesh_dim_names=names)
        for label, (recipe, settings) in asked["names"].items():
            tensors, report = train(recipe, settings, mesh, asked["backward"], asked["in_backward"])
            torch.save(tensors, f"{asked['out']}.{label}.{dist.get_rank()}.pt")
            with open(f"{asked['out']}.{label}.{dist.get_rank()}.json", "w") as file:
                json.dump(report, file)
