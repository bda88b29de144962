"""Train a small LLaMA with SARA in a plain PyTorch loop, with warmup, clipping and a checkpoint.

    python examples/loop.py --steps 100
    python examples/loop.py --steps 200     # continues the same run from step 100

It learns a text file byte by byte, and ends by printing the bytes of optimizer state, and the loss before and after.
"""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import subspan

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "README.md")
parser.add_argument("--checkpoint", type=Path, default=Path("runs/loop.pt"))
args = parser.parse_args()
text = torch.tensor(list(args.text.read_bytes()))


def batch(step: int) -> torch.Tensor:
    """Eight pieces of the text. They depend only on the step, so a run that continues needs no place in the data."""
    starts = torch.randint(len(text) - 64, (8,), generator=torch.Generator().manual_seed(step))
    return torch.stack([text[start : start + 64] for start in starts])


torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape))
optimizer = subspan.create("sara_adamw", model, lr=1e-2, rank=16, update_proj_gap=50)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)
parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
step, first = 0, None
args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
if args.checkpoint.exists():
    saved = torch.load(args.checkpoint, weights_only=True)
    step, first = saved["step"], saved["first"]
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    print(f"goes on at step {step}")
while step < args.steps:
    loss = model(input_ids=batch(step), labels=batch(step)).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    step, first = step + 1, loss.item() if first is None else first
    if step % 50 == 0 or step == args.steps:
        print(f"step {step}: loss {loss.item():.3f}")
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save(states | {"step": step, "first": first}, args.checkpoint)
last = model(input_ids=batch(0), labels=batch(0)).loss.item()
adamw = sum(8 * p.numel() + 4 for p in model.parameters())
print(f"state: {subspan.state_bytes(optimizer):,} bytes; AdamW would hold {adamw:,}")
print(f"loss {first:.3f} before, {last:.3f} after {step} steps")
