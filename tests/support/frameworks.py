"""A text that a small model can learn, and what is projected of it."""

import torch
from torch.utils.data import Dataset

STEPS = 12
PROJECTED = {
    f"model.layers.{layer}.{name}.weight"
    for layer in range(2)
    for name in (
        *(f"self_attn.{head}_proj" for head in "qkvo"),
        *(f"mlp.{side}_proj" for side in ("gate", "up", "down")),
    )
}
"""What all-linear means: every linear layer of the blocks, and neither embeddings nor the head."""


class Text(Dataset[dict[str, torch.Tensor]]):
    """Sequences of sixteen bytes of one sentence, each from another place in it."""

    def __init__(self) -> None:
        letters = b"the quick brown fox jumps over the lazy dog and runs away from it "
        self.tokens = torch.tensor(list(letters * 20)) % 128

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= len(self):
            raise IndexError(index)
        piece = self.tokens[index * 5 : index * 5 + 16]
        return {"input_ids": piece, "labels": piece.clone()}


def projected(optimizer: torch.optim.Optimizer) -> set[str]:
    """Names of the parameters that hold a basis."""
    state = optimizer.state
    return {
        name
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
        if "basis" in state[p]
    }
