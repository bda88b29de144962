"""The training step that is measured: a model, an optimizer that trains it, and a batch."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from subspan.backward import Handle, project_backward
from subspan.costs.llama import VOCABULARY
from subspan.factory import create, residual_of
from subspan.groups import check_rank
from subspan.parts import Residual
from subspan.training.models.presets import PRESETS, llama_of
from subspan.utils.errors import SettingError
from subspan.utils.ranks import Rank
from subspan.utils.suggestions import near_names


@dataclass(frozen=True)
class Setting:
    """A training step to measure."""

    model: str = "llama-60m"
    """Preset of the model, from `subspan list models`."""
    tokens: int = 4096
    """Number of tokens in a step."""
    rank: Rank = 128
    """Rank of the subspaces, or its share of each compressed side, such as 0.25."""
    sequence_length: int = 256
    """Number of tokens in a sequence."""
    seed: int = 0
    """Random seed for weights and tokens."""
    threads: int | None = None
    """Number of CPU threads; null leaves the choice to torch."""
    rank_pattern: dict[str, Rank] | None = None
    """Other ranks by name, such as {q_proj: 32, mlp: 0.5}."""
    share: Literal["auto", "none"] = "auto"
    """Whether backward-side layers with one input share a basis (auto), or not (none)."""

    def __post_init__(self) -> None:
        if self.model not in PRESETS:
            raise SettingError(f"model={self.model!r}: {near_names(self.model, PRESETS)}")
        check_rank(self.rank, self.rank_pattern)
        for name in ("tokens", "sequence_length"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)}: expected a whole number >= 1")
        if self.tokens % self.sequence_length:
            raise SettingError(f"tokens={self.tokens}: expected a multiple of sequence_length={self.sequence_length}")
        if self.threads is not None and self.threads < 1:
            raise SettingError(f"threads={self.threads}: expected a whole number >= 1")

    def batch(self) -> Tensor:
        """Draw random tokens."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(
            VOCABULARY, (self.tokens // self.sequence_length, self.sequence_length), generator=generator
        )


@dataclass
class Trained:
    """A model and its optimizer, with a ``handle`` if its layers are backward-side."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    handle: Handle | None

    def forward(self, batch: Tensor) -> Tensor:
        """Compute the loss."""
        loss: Tensor = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        return loss


def build_model(
    setting: Setting,
    backward_side: bool,
    select_from: Literal["owner", "mean"] = "owner",
    residual: Residual | None = None,
) -> tuple[nn.Module, Handle | None]:
    """Build the model with fresh weights, and return the handle of its backward-side layers, if it has them, too."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(setting.seed)
    model = LlamaForCausalLM(llama_of(PRESETS[setting.model]).config(setting.sequence_length)).train()
    if not backward_side:
        return model, None
    return model, project_backward(
        model,
        rank=setting.rank,
        rank_pattern=setting.rank_pattern,
        share=setting.share,
        select_from=select_from,
        residual=residual,
    )


def build(setting: Setting, optimizer: str, backward_side: bool = False, fused: bool = False) -> Trained:
    """Build the model with fresh weights, and an optimizer by name, or torch's fused AdamW if ``fused``."""
    model, handle = build_model(setting, backward_side, residual=residual_of(optimizer))
    if fused:
        return Trained(model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True), None)
    made = create(optimizer, model, rank=setting.rank, rank_pattern=setting.rank_pattern, seed=setting.seed)
    return Trained(model, made, handle)
