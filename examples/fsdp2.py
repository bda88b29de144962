"""Train with sharded weights and sharded moments: SARA under FSDP2 (``fully_shard``), on GPUs, or on CPUs with gloo.

    torchrun --nproc-per-node 2 examples/fsdp2.py --steps 100

Shard the model first, then build the optimizer. Only a refresh adds to what FSDP sends: one Gram matrix per weight.
"""

import argparse
import gc
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import subspan


def train(steps: int, text_file: Path, device: torch.device) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    text = torch.tensor(list(text_file.read_bytes()), device=device)
    torch.manual_seed(0)  # the same weights on every rank
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape)).to(device)
    for module in [*model.model.layers, model]:
        fully_shard(module)
    optimizer = subspan.create("sara_adamw", model, lr=1e-2, rank=16, update_proj_gap=50)

    def loss_of(step: int) -> torch.Tensor:  # on the pieces of text that this rank trains on at this step
        starts = torch.randint(len(text) - 64, (8 * ranks,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([text[start : start + 64] for start in starts[rank::ranks]])
        return model(input_ids=batch, labels=batch).loss

    before = loss_of(0).detach()
    for step in range(steps):
        loss_of(step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    mean = torch.stack([before, loss_of(0).detach()])
    dist.all_reduce(mean)
    if rank == 0:
        held, adamw = subspan.state_bytes(optimizer), sum(8 * p.numel() + 4 for p in model.parameters())
        print(f"state: {held:,} bytes on each of {ranks} ranks; AdamW would hold {adamw:,} in all")
        print(f"loss {mean[0] / ranks:.3f} before, {mean[1] / ranks:.3f} after {steps} steps")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "README.md")
args = parser.parse_args()
gpu = torch.cuda.is_available()
if gpu:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
train(args.steps, args.text, torch.device("cuda" if gpu else "cpu"))
gc.collect()  # free the model before its process group: else gloo's threads sometimes abort the interpreter at exit
dist.destroy_process_group()
