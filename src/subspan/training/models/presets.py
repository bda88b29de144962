"""Named models, each with the settings of its run.

The shapes are those that GaLore published, and two that are small enough for two CPU cores.
"""

from dataclasses import dataclass

from subspan.costs.llama import Llama


@dataclass(frozen=True)
class Preset:
    """The shape of a LLaMA, and the settings that its run uses where the user sets none."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    tokenizer: str = "t5-base"
    sequence_length: int = 512
    batch_size: int = 512
    steps: int = 10_000
    warmup_steps: int | None = None
    """Steps of the warmup; ``None`` means a tenth of the run."""
    rank: int = 128
    update_proj_gap: int = 200
    adamw_lr: float = 1e-3
    """Learning rate of the full-rank baseline. The recipes of subspace methods have their own."""


PRESETS: dict[str, Preset] = {
    "llama-nano": Preset(
        64, 172, 4, 2, "bytes", sequence_length=128, batch_size=32, steps=1500, rank=16, update_proj_gap=50, adamw_lr=2.5e-3
    ),
    "llama-tiny": Preset(
        192, 512, 4, 4, "embedded", sequence_length=128, batch_size=16, steps=300, rank=48, update_proj_gap=50, adamw_lr=2.5e-3
    ),
    "llama-9m": Preset(128, 352, 4, 4, rank=32, adamw_lr=2.5e-3),
    # SARA, Table 5 and section 4.1: batch and sequence 512, tokens 1.5B, 2.2B, 6B and 13.4B.
    "llama-60m": Preset(512, 1376, 8, 8, steps=5722, warmup_steps=1000, adamw_lr=2.5e-3),
    "llama-130m": Preset(768, 2048, 12, 12, steps=8392, warmup_steps=2000, rank=256),
    "llama-350m": Preset(1024, 2736, 24, 16, steps=22888, warmup_steps=6000, rank=256),
    "llama-1b": Preset(2048, 5461, 24, 32, steps=51117, warmup_steps=10_000, rank=512),
    # GaLore's 7B run: batch 512, sequence 256.
    "llama-7b": Preset(4096, 11008, 32, 32, sequence_length=256, steps=150_000, rank=1024, update_proj_gap=500),
}  # fmt: skip


def llama_of(preset: Preset) -> Llama:
    """Return the shapes of a preset."""
    return Llama(preset.hidden, preset.mlp, preset.layers, preset.heads, kv=preset.hidden)
