"""Use SARA with Lightning: the optimizer is built in ``configure_optimizers``.

    python examples/lightning_module.py --steps 100

Clipping and checkpoints are Lightning's own. The model learns a text file byte by byte. The script ends by printing
the bytes of optimizer state, and the loss before and after.
"""

import argparse
from pathlib import Path

import lightning
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import subspan

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "README.md")
parser.add_argument("--out", default="runs/lightning", help="folder for the checkpoint")
args = parser.parse_args()


class Llama(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.llama = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.llama(input_ids=batch, labels=batch).loss

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("loss", self.llama(input_ids=batch, labels=batch).loss)

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = subspan.create("sara_adamw", self, lr=1e-2, rank=16, update_proj_gap=50)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)
        return [optimizer], [{"scheduler": warmup, "interval": "step"}]


lightning.seed_everything(0)
pieces = torch.tensor(list(args.text.read_bytes())).unfold(0, 64, 64)
train = torch.utils.data.DataLoader(pieces, batch_size=8, shuffle=True)
held = torch.utils.data.DataLoader(pieces[:32], batch_size=32)
model = Llama()
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": args.out}
trainer = lightning.Trainer(max_steps=args.steps, max_epochs=-1, gradient_clip_val=1.0, limit_val_batches=0, **quiet)
judge = lightning.Trainer(**quiet)

before = judge.validate(model, held, verbose=False)[0]["loss"]
trainer.fit(model, train)
after = judge.validate(model, held, verbose=False)[0]["loss"]
state, adamw = subspan.state_bytes(trainer.optimizers[0]), sum(8 * p.numel() + 4 for p in model.parameters())
print(f"state: {state:,} bytes; AdamW would hold {adamw:,}")
print(f"loss {before:.3f} before, {after:.3f} after {trainer.global_step} steps")
