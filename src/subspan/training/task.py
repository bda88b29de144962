"""What the loop asks of what it trains: pretraining is one such task, each way to fine-tune another."""

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from subspan.training.data.batches import Batch, DataSource
from subspan.training.processes import Processes


class Task(Protocol):
    """A model to train, data to train it on, and what is measured of it."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Is saved with the model."""

    @property
    def data(self) -> DataSource:
        """What the batches come from."""

    @property
    def selects(self) -> bool:
        """Whether the best checkpoint is kept beside the newest."""

    @property
    def largest_loss(self) -> float:
        """From here on a loss is that of a run that has diverged."""

    def build_model(self) -> nn.Module:
        """The model, on the CPU; what is drawn for it depends on the seed alone."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the losses of all targets that count, in fp32."""

    def evaluate(
        self, model: nn.Module, batch_size: int, autocast: AbstractContextManager[object], ranks: Processes
    ) -> dict[str, float]:
        """Measurements of the validation set, ``val_loss`` among them; the same on every rank."""

    def words(self, measured: dict[str, float]) -> str:
        """The measurements for a person."""

    def worth(self, measured: dict[str, float]) -> float:
        """The larger, the better; chooses the best checkpoint."""
