"""One rank of a data-parallel run: trains a small LLaMA on its half of each batch and writes what happened.

Arguments: optimizer's name, "dense" or "backward", where its gradients select from, output file.
"""

import json

import torch
import torch.distributed as dist
from support.processes import joined
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import subspan
from subspan.factory import residual_of

STEPS, RANK = 8, 8


def build():
    set_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).double()


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(64, (4, 12), generator=generator) for _ in range(STEPS)]


def optimizer_of(name, model, execution, select_from):
    if execution == "backward":
        subspan.project_backward(model, rank=RANK, select_from=select_from, residual=residual_of(name))
    return subspan.create(name, model, lr=1e-2, rank=RANK, update_proj_gap=3, stagger=False)


def train(model, name, execution, select_from):
    """The loss and the bytes all-reduced of each step."""
    optimizer = optimizer_of(name, model, execution, select_from)
    wrapped = DistributedDataParallel(model)
    sent = []

    def counting(group, bucket):
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(group, bucket)

    wrapped.register_comm_hook(None, counting)
    losses, per_step, rank = [], [], dist.get_rank()
    for ids in batches():
        half = ids[2 * rank : 2 * rank + 2]
        sent.clear()
        loss = wrapped(input_ids=half, labels=half).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        per_step.append(sum(sent))
        losses.append(loss.item())
    return {"bytes": per_step, "losses": losses}


def main(name, execution, select_from, path):
    with joined():
        rank, model = dist.get_rank(), build()
        report = train(model, name, execution, select_from)
        torch.save({key: value.clone() for key, value in model.state_dict().items()}, f"{path}.{rank}.pt")
        if rank == 0:
            with open(f"{path}.json", "w") as file:
                json.dump(report, file)
