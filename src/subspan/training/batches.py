"""What the loop asks of its data."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

IGNORED = -100
"""A target that counts neither in the loss nor in the number of tokens."""


@dataclass(frozen=True)
class Batch:
    """Token ids: ``inputs (b, l)``, and for each position the token that follows, ``targets (b, l)``, or ``IGNORED``."""

    inputs: Tensor
    targets: Tensor

    def tokens(self) -> int:
        """How many targets count."""
        return int((self.targets != IGNORED).sum())

    def split(self, size: int) -> "list[Batch]":
        """In pieces of ``size`` sequences."""
        return [Batch(*pair) for pair in zip(self.inputs.split(size), self.targets.split(size), strict=True)]

    def part(self, rank: int, ranks: int) -> "Batch":
        """The sequences of ``rank``: of ``ranks`` equal parts, one."""
        return Batch(self.inputs.chunk(ranks)[rank], self.targets.chunk(ranks)[rank])

    def ignored(self) -> "Batch":
        """The same sequences, of which nothing counts."""
        return Batch(self.inputs, torch.full_like(self.targets, IGNORED))

    def to(self, device: Any) -> "Batch":
        return Batch(self.inputs.to(device), self.targets.to(device))


class DataSource(Protocol):
    """Training batches in an order that depends on the seed alone, and a fixed validation set.

    It knows nothing of ranks: each reads the same and takes its part of a batch. So the cursor holds for any number of them.
    """

    def next_batch(self, size: int) -> Batch:
        """The next ``size`` sequences."""

    def validation(self) -> Batch:
        """The fixed validation set."""

    def state_dict(self) -> dict[str, Any]:
        """The exact cursor. Law: after ``load_state_dict`` the batches continue as if nothing had happened."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def describe(self) -> str:
        """One line: how much there is."""
