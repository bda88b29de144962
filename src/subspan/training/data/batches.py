"""What the training loop asks of its data: batches in an order that can be restored."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

IGNORED = -100
"""A target that counts neither in the loss nor in the number of tokens."""


@dataclass(frozen=True)
class Batch:
    """Sequences, and what is to be predicted from them."""

    inputs: Tensor
    """Token ids ``(b, l)``."""
    targets: Tensor
    """For each position the token that follows, or ``IGNORED``, ``(b, l)``; for examples with labels, ``(b,)``."""
    mask: Tensor | None = None
    """For examples with labels: 1 for a token and 0 for padding, ``(b, l)``."""
    kinds: Tensor | None = None
    """For models that ask for it: 0 for the first text of an example and 1 for the second, ``(b, l)``."""
    positions: Tensor | None = None
    """For examples that are packed into one sequence: the place of each token in its own example, ``(b, l)``."""

    def weight(self) -> int:
        """Return how many targets count."""
        return int((self.targets != IGNORED).sum()) if not self.targets.is_floating_point() else len(self.targets)

    def tokens(self) -> int:
        """Return how many tokens are read; without a mask, how many targets count."""
        return self.weight() if self.mask is None else int(self.mask.sum())

    def split(self, size: int) -> "list[Batch]":
        """Cut the batch into pieces of ``size`` sequences."""
        return [self._rows(start, start + size) for start in range(0, len(self.inputs), size)]

    def _rows(self, start: int, stop: int) -> "Batch":
        return self._each(lambda A: A[start:stop])

    def part(self, rank: int, ranks: int) -> "Batch":
        """Return the share of ``rank`` where ``ranks`` processes share the batch."""
        return self._each(lambda A: A.chunk(ranks)[rank])

    def ignored(self) -> "Batch":
        """Return a copy in which no target counts."""
        return replace(self, targets=torch.full_like(self.targets, IGNORED))

    def to(self, device: Any) -> "Batch":
        return self._each(lambda A: A.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        parts = (self.inputs, self.targets, self.mask, self.kinds, self.positions)
        return Batch(*(None if A is None else change(A) for A in parts))  # type: ignore[arg-type]  # the first two are there


class Order:
    """The order in which ``count`` examples come.

    Epoch ``e`` visits each once, in the order of ``torch.randperm`` seeded by ``(seed, e)``. The cursor is
    ``(epoch, index)``.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._go_to(0, 0)

    def take(self, size: int) -> Tensor:
        """Return the numbers of the next ``size`` examples."""
        chosen: list[Tensor] = []
        while (wanted := size - sum(map(len, chosen))) > 0:
            chosen.append(self._order[self.index : self.index + wanted])
            self.index += len(chosen[-1])
            if self.index >= len(self._order):
                self._go_to(self.epoch + 1, 0)
        return torch.cat(chosen)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._go_to(state["epoch"], state["index"])

    def _go_to(self, epoch: int, index: int) -> None:
        self.epoch, self.index = epoch, index
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        self._order = torch.randperm(self.count, generator=generator)


class DataSource(Protocol):
    """Training batches in an order that depends only on the seed, and a fixed validation set.

    It knows nothing of ranks: each rank reads the same batches and takes its share of them. So the cursor holds for any
    number of ranks.
    """

    def next_batch(self, size: int) -> Batch:
        """Return the next ``size`` sequences."""

    def validation(self) -> Batch:
        """Return the fixed validation set."""

    def test(self) -> Batch | None:
        """Return the fixed test set, which nothing is chosen by, or ``None`` if there is none."""

    def state_dict(self) -> dict[str, Any]:
        """Return the exact cursor. Law: after ``load_state_dict`` the batches continue as if nothing had happened."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a cursor that ``state_dict`` has returned."""

    def describe(self) -> str:
        """Say in one line how much data there is."""

    def notes(self) -> list[str]:
        """Return lines about what was found in the data, and what of it is not used."""
