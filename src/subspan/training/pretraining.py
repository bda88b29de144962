"""Pretraining: a model learns the next token of documents."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from subspan.storage.allocation import state_bytes
from subspan.training.config.resolve import ResolvedConfig, resolve
from subspan.training.config.settings import PretrainConfig
from subspan.training.data.batches import Batch, DataSource
from subspan.training.data.documents import find_documents
from subspan.training.data.streams import STREAMS, TokenStream
from subspan.training.data.token_cache import TokenWindows, tokenise
from subspan.training.data.tokenizer import load_tokenizer
from subspan.training.evaluation import evaluate, trained_losses
from subspan.training.loop import RunDivergedError as RunDivergedError
from subspan.training.loop import Training
from subspan.training.models.build import build_model, dtype_of
from subspan.training.processes import ALONE, Processes
from subspan.utils.errors import InputError


@dataclass(frozen=True)
class Summary:
    """The report of a finished pretraining run."""

    optimizer: str
    model: str
    steps: int
    tokens: int
    val_loss: float
    val_ppl: float
    state_bytes: int
    seconds: float
    out: str
    seed: int
    test_loss: float | None = None
    """The loss on the test documents; ``None`` where the data has none."""
    data_form: str = ""
    """The forms of the files and the column that was read; empty for streams."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def words(self) -> str:
        """The report as a line for a person."""
        test = "" if self.test_loss is None else f"; test loss {self.test_loss:.4f}"
        return f"validation loss {self.val_loss:.4f}, perplexity {self.val_ppl:.2f}{test}; saved under {self.out}"


class LanguageModelling:
    """A causal language model on documents; see ``Task``."""

    keeps_best = False
    largest_loss = 700.0  # from here on the perplexity is no longer a number

    def __init__(self, config: ResolvedConfig) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(config.tokenizer)
        self.data = _open_data(config, self.tokenizer)
        self._validation: Batch | None = None

    def build_model(self) -> nn.Module:
        config = self.config
        dtype = dtype_of(config.precision)
        return build_model(config.model, self.tokenizer, config.sequence_length, config.seed, dtype=dtype)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return trained_losses(model, batch)

    def evaluate(
        self,
        model: nn.Module,
        batch_size: int,
        autocast: AbstractContextManager[object],
        processes: Processes,
        between: Callable[[], object],
    ) -> dict[str, float]:
        if self._validation is None:
            self._validation = self.data.validation()
        return {"val_loss": evaluate(model, self._validation, batch_size, autocast, processes, between)}

    def test(
        self,
        model: nn.Module,
        batch_size: int,
        autocast: AbstractContextManager[object],
        processes: Processes,
        between: Callable[[], object],
    ) -> dict[str, float]:
        batch = self.data.test()
        return {} if batch is None else {"test_loss": evaluate(model, batch, batch_size, autocast, processes, between)}

    def words(self, measured: dict[str, float]) -> str:
        return f"validation loss {measured['val_loss']:.4f}, perplexity {math.exp(measured['val_loss']):.2f}"

    def score(self, measured: dict[str, float]) -> float:
        return -measured["val_loss"]


class Pretraining(Training[Summary]):
    """A pretraining run; see ``Training``."""

    command = "pretrain"

    def __init__(self, config: PretrainConfig, processes: Processes = ALONE) -> None:
        resolved = resolve(config)
        super().__init__(resolved, lambda: LanguageModelling(resolved), processes)

    def summarise(self, measured: dict[str, float], checkpoint: Path) -> Summary:
        return Summary(
            optimizer=self.config.optimizer,
            model=self.config.model,
            steps=self.step,
            tokens=self.tokens,
            val_loss=measured["val_loss"],
            val_ppl=math.exp(measured["val_loss"]),
            state_bytes=state_bytes(self.optimizer),
            seconds=round(self.seconds, 3),
            out=str(self.out),
            seed=self.config.seed,
            test_loss=measured.get("test_loss"),
            data_form=getattr(self.data, "form", ""),
        )


def _open_data(config: ResolvedConfig, tokenizer: Any) -> DataSource:
    if config.data.partition(":")[0] in STREAMS:
        for name in ("validation_data", "test_data", "text_column", "encoding"):
            if (given := getattr(config, name)) is not None:
                raise InputError(
                    f"{name}={given!r}: {config.data} has a training and a validation half, and no other text is "
                    "read; leave it out"
                )
        return TokenStream(config.data, tokenizer, config.sequence_length, config.evaluation.tokens, config.packing)
    if not config.packing:
        raise InputError(
            f"packing=False: only streamed data ({', '.join(STREAMS)}) can be left unpacked; data is {config.data!r}"
        )
    documents = find_documents(
        config.data, config.validation_data, config.test_data, config.text_column, config.encoding
    )
    return TokenWindows(tokenise(documents, tokenizer), config.sequence_length, config.seed, config.evaluation.tokens)
