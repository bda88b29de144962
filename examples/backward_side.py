"""Fine-tune with SARA in the backward pass: linear layers make their low-rank gradient, and save no input for it.

    python examples/backward_side.py --steps 60
    python examples/backward_side.py --model OWNER/NAME     # or a checkpoint's directory; default: a small random LLaMA

The only change is one call, ``project_backward``, before the optimizer is built. The script prints the bytes of
gradients, states and saved activations, and the losses, next to those of AdamW on the same model and text.
"""

import argparse
import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import subspan

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "README.md")
parser.add_argument("--model")
args = parser.parse_args()
torch.manual_seed(0)
if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(args.model)(args.text.read_text(), return_tensors="pt").input_ids[0]
else:
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    model, tokens = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape)), torch.tensor(list(args.text.read_bytes()))
pieces = tokens.unfold(0, 128, 128)


def train(title, model, build):
    optimizer, losses, saved = build(model), [], {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for step in range(args.steps):
        batch = pieces[torch.arange(8 * step, 8 * step + 8) % len(pieces)]
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        held = [*model.parameters(), *(x for s in optimizer.state.values() for x in s.values() if torch.is_tensor(x))]
        activations = sum(saved.values()) - sum(saved.pop(x.untyped_storage().data_ptr(), 0) for x in held)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    line = f"{title:20s} {gradients:14,} {subspan.state_bytes(optimizer):14,} {activations:14,}"
    print(f"{line}   loss {losses[0]:.3f} before, {losses[-1]:.3f} after")


print(f"{'bytes of':20s} {'gradients':>14s} {'states':>14s} {'activations':>14s}")
train("AdamW", copy.deepcopy(model), lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3))
subspan.project_backward(model, rank=16)
train("SARA, backward side", model, lambda m: subspan.create("sara_adamw", m, lr=1e-2, rank=16, update_proj_gap=50))
