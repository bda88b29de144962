"""Use SARA with transformers' Trainer: one argument takes the optimizer's name and rank.

    python examples/trainer.py --steps 100

All other settings are ``TrainingArguments``: the learning rate, weight decay and which parameters it applies to,
betas, seed, schedule, clipping and checkpoints. The model learns a text file byte by byte. The script ends by printing
the bytes of optimizer state, and the loss before and after.
"""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import subspan
from subspan.integrations.transformers import Subspace

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "README.md")
parser.add_argument("--out", default="runs/trainer", help="folder for the checkpoints")
parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint there")
args = parser.parse_args()

pieces = torch.tensor(list(args.text.read_bytes())).unfold(0, 64, 64)
train = [{"input_ids": piece, "labels": piece} for piece in pieces]

set_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
trainer = Trainer(
    model=LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape)),
    args=TrainingArguments(
        args.out,
        max_steps=args.steps,
        learning_rate=1e-2,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=min(10, args.steps // 4),
        save_steps=50,
        report_to="none",
        disable_tqdm=True,
    ),
    train_dataset=train,
    eval_dataset=train[:32],
    optimizer_cls_and_kwargs=(Subspace, {"name": "sara_adamw", "rank": 16, "update_proj_gap": 50}),
)
before = trainer.evaluate()["eval_loss"]
trainer.train(resume_from_checkpoint=args.resume)
after = trainer.evaluate()["eval_loss"]

adamw = sum(8 * p.numel() + 4 for p in trainer.model.parameters())
print(f"state: {subspan.state_bytes(trainer.optimizer.optimizer):,} bytes; AdamW would hold {adamw:,}")
print(f"loss {before:.3f} before, {after:.3f} after {trainer.state.global_step} steps")
