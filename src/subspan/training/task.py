"""What the loop asks of the task it trains. Pretraining is one task, and each way to fine-tune is another."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from subspan.training.data.batches import Batch, DataSource
from subspan.training.processes import Processes


class Task(Protocol):
    """A model to train, data to train it on, and measurements of the result."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, which is saved with the model."""

    @property
    def data(self) -> DataSource:
        """The source of the batches."""

    @property
    def keeps_best(self) -> bool:
        """Whether the best checkpoint is kept beside the newest."""

    @property
    def largest_loss(self) -> float:
        """From this loss on a run has diverged."""

    def build_model(self) -> nn.Module:
        """The model, on the CPU. Its random weights depend only on the seed."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the losses of all targets that count, in fp32."""

    def evaluate(
        self,
        model: nn.Module,
        batch_size: int,
        autocast: AbstractContextManager[object],
        processes: Processes,
        between: Callable[[], object],
    ) -> dict[str, float]:
        """Measurements of the validation set, among them ``val_loss``. They are the same on every rank.

        ``between`` is called between batches, on every rank alike; an exception there breaks the work off.
        """

    def test(
        self,
        model: nn.Module,
        batch_size: int,
        autocast: AbstractContextManager[object],
        processes: Processes,
        between: Callable[[], object],
    ) -> dict[str, float]:
        """Measurements of the trained model on text that nothing is chosen by; none where there is no such text."""

    def words(self, measured: dict[str, float]) -> str:
        """The measurements in words for a person."""

    def score(self, measured: dict[str, float]) -> float:
        """The number that chooses the best checkpoint: the larger, the better."""
