"""Fine-tuning: the tasks as the loop knows them, and the report of a run."""

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import AutoConfig, PreTrainedTokenizerBase

from subspan.checkpoints import directory as checkpoints
from subspan.costs.state_costs import StateCosts
from subspan.storage.allocation import state_bytes
from subspan.training.config.resolve_finetuning import ResolvedFinetune, resolve_finetune, with_length
from subspan.training.config.settings import FinetuneConfig
from subspan.training.data.batches import Batch
from subspan.training.data.bundled_task import read_authors
from subspan.training.data.continuations import set_chat_template
from subspan.training.data.labelled_batches import Examples
from subspan.training.data.labelled_files import Columns, Row, class_names, read_examples, read_glue, set_aside
from subspan.training.data.task_specs import find_task
from subspan.training.data.tokenizer import load_tokenizer
from subspan.training.evaluation import evaluate, evaluating, trained_losses
from subspan.training.loop import Training
from subspan.training.models.build import UNUSABLE, brings_weights, build_model, cannot_load, check_packs, dtype_of
from subspan.training.models.lora import add_lora
from subspan.training.processes import ALONE, Processes
from subspan.training.run_state import Best
from subspan.training.scores import SCORES
from subspan.utils.atomic_files import written


@dataclass(frozen=True)
class FinetuneSummary:
    """The report of a finished fine-tuning run. The scores are those of the best evaluation."""

    task: str
    model: str
    optimizer: str
    metric: str
    """The score that chose the best checkpoint."""
    scores: dict[str, float]
    majority: float | None
    """Accuracy of always predicting the most common label; ``None`` without labels."""
    val_loss: float
    state_bytes: int
    state_bytes_formula: int
    """Bytes of the optimizer's state by the closed form of the method, from the shapes only."""
    saved_activation_bytes: int | None
    """Bytes that a forward pass saves for the backward pass, for the first part of the second batch."""
    trainable: int
    """Number of trained parameters."""
    seconds: float
    steps: int
    best_step: int
    best: str
    """The best checkpoint, as a directory that ``from_pretrained`` loads."""
    tokens: int
    out: str
    seed: int
    data_form: str = ""
    """The form of the files and the columns that were read; empty where the task has its own data."""

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in vars(self).items():
            found |= value if key == "scores" else {key: value}
        return found

    def words(self) -> str:
        """The report as a line for a person."""
        scores = ", ".join(f"{name} {value:.4f}" for name, value in self.scores.items())
        guess = "" if self.majority is None else f" (most common label: {self.majority:.4f})"
        return f"{self.task}: {scores}{guess}, best of {self.steps} steps at step {self.best_step}; saved under {self.best}"


class _Labelled:
    """The examples of a run, which are read before its length is known."""

    def __init__(self, config: ResolvedFinetune) -> None:
        self.config, self.spec = config, find_task(config.task)
        columns = Columns(config.text_column or "", config.pair_column, config.label_column or "")
        self.form, self.notes = "", list[str]()
        self.train, self.validation = self._rows(columns)
        self.labels = class_names(self.train, self.spec) if self.spec.kind == "classification" else ()
        self._encoded: tuple[PreTrainedTokenizerBase, Examples] | None = None

    def count(self) -> int:
        """Return the number of sequences in an epoch."""
        return len(self.encoded()[1].train) if self.config.packing else len(self.train)

    def encoded(self) -> tuple[PreTrainedTokenizerBase, Examples]:
        """Return the tokenizer, and the examples in its tokens."""
        if self._encoded is None:
            self._encoded = self._encode()
        return self._encoded

    def _rows(self, columns: Columns) -> tuple[list[Row], list[Row]]:
        config, spec = self.config, self.spec
        if not config.data:
            return read_glue(spec, columns) if spec.glue else read_authors()
        found = read_examples(config.data, "data", spec, columns, config.encoding)
        self.form, self.notes = found.form, found.notes
        train = [row for row in found.rows if row.part != "validation"]
        held = [row for row in found.rows if row.part == "validation"]
        if config.validation_data:
            other = read_examples(config.validation_data, "validation_data", spec, columns, config.encoding)
            self.notes += [note for note in other.notes if note not in self.notes]
            return train or found.rows, other.rows
        return (train, held) if train and held else set_aside(found.rows, spec)

    def _encode(self) -> tuple[PreTrainedTokenizerBase, Examples]:
        config, notes = self.config, list(self.notes)
        if brings_weights(config.model):
            # Read before the tokenizer, because a missing tokenizer would say less.
            try:
                AutoConfig.from_pretrained(config.model)
            except UNUSABLE as error:
                raise cannot_load(config.model, error) from error
        tokenizer = load_tokenizer(config.tokenizer, needs_end=self.spec.kind == "lm")
        if self.spec.kind == "lm" and config.data:
            talks = any(row.turns for row in self.train)
            template = f", by {set_chat_template(tokenizer, config.chat_template)}" if talks else ""
            if not talks and all(row.label is None for row in self.train):
                learnt = "texts are learnt as a whole"
            elif config.learn_prompts:
                learnt = "prompts and answers are learnt"
            else:
                learnt = "only the answers are learnt; --learn_prompts learns the prompts too"
            notes.insert(0, f"data: {self.form}{template}; {learnt}")
        examples = Examples(
            self.train,
            self.validation,
            self.spec,
            self.labels,
            tokenizer,
            config.max_length,
            config.seed,
            learn_prompts=config.learn_prompts,
            packing=config.packing,
            notes=notes,
        )
        return tokenizer, examples


class _FinetuneTask:
    """The parts of a ``Task`` that all kinds of fine-tuning share."""

    keeps_best = True
    largest_loss = math.inf

    def __init__(self, labelled: _Labelled) -> None:
        self.config, self.spec, self.labels = labelled.config, labelled.spec, labelled.labels
        self.form = labelled.form
        self.tokenizer, self.data = labelled.encoded()
        self.adapters: Any = None

    def build_model(self) -> nn.Module:
        head = None if self.spec.kind == "lm" else self.labels or ("value",)
        config = self.config
        dtype = dtype_of(config.precision)
        model = build_model(config.model, self.tokenizer, config.max_length, config.seed, head, "max_length", dtype)
        if config.packing:
            check_packs(config.model, model)
        lora = config.lora
        if lora.rank:
            self.adapters = add_lora(model, lora.rank, lora.alpha, lora.dropout)
        return model

    def test(self, *_: object) -> dict[str, float]:
        return {}

    def words(self, measured: dict[str, float]) -> str:
        return f"validation loss {measured['val_loss']:.4f}, " + ", ".join(
            f"{name} {measured[name]:.4f}" for name in self.spec.scores
        )


class Continuation(_FinetuneTask):
    """A causal language model learns to write answers, scored by the perplexity of their tokens."""

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
        loss = evaluate(model, self.data.validation(), batch_size, autocast, processes, between)
        return {"val_loss": loss, "val_ppl": math.exp(min(loss, 700.0))}

    def score(self, measured: dict[str, float]) -> float:
        return -measured["val_loss"]


class Labelling(_FinetuneTask):
    """A model learns a class or a number for each text, or pair of texts.

    The loss is the cross entropy, or the square of the error.
    """

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._loss(self._logits(model, batch), batch.targets)

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        batch_size: int,
        autocast: AbstractContextManager[object],
        processes: Processes,
        between: Callable[[], object],
    ) -> dict[str, float]:
        """Measure the whole validation set on every rank, because a score such as F1 is no mean over parts of it."""
        device = next(model.parameters()).device
        logits, targets = [], []
        with autocast, evaluating(model):
            for batch in self.data.validation_batches(batch_size):
                between()
                logits.append(self._logits(model, batch.to(device)).cpu())
                targets.append(batch.targets)
        all_logits, all_targets = torch.cat(logits), torch.cat(targets)
        predicted = all_logits.argmax(-1) if self.labels else all_logits[:, 0]
        return {
            "val_loss": float(self._loss(all_logits, all_targets)) / len(all_targets),
            **{name: SCORES[name](predicted, all_targets) for name in self.spec.scores},
        }

    def score(self, measured: dict[str, float]) -> float:
        return measured[self.spec.scores[0]]

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        inner = getattr(model, "module", model)  # inside DDP
        kinds = (
            {"token_type_ids": batch.kinds} if "token_type_ids" in inspect.signature(inner.forward).parameters else {}
        )
        return model(input_ids=batch.inputs, attention_mask=batch.mask, **kinds).logits.float()

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.labels:
            return cross_entropy(logits, targets, reduction="sum")
        return mse_loss(logits[:, 0], targets, reduction="sum")


class Finetuning(Training[FinetuneSummary]):
    """A fine-tuning run; see ``Training``."""

    command = "finetune"
    task: Continuation | Labelling
    config: ResolvedFinetune

    def __init__(self, config: FinetuneConfig, processes: Processes = ALONE) -> None:
        resolved = resolve_finetune(config)
        with processes.one_first():
            labelled = _Labelled(resolved)
        labelled.config = with_length(resolved, labelled.count())
        kind: type[Continuation] | type[Labelling] = Continuation if labelled.spec.kind == "lm" else Labelling
        super().__init__(labelled.config, lambda: kind(labelled), processes)

    def summarise(self, measured: dict[str, float], checkpoint: Path) -> FinetuneSummary:
        best = self.best or Best(self.step, measured)
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)  # before adapters are merged
        folder = checkpoint
        if self.task.adapters is not None:
            if self.processes.first:
                self._merge(checkpoint)
            folder = self.out / checkpoints.MODEL
        state = StateCosts.of_recipe(self.config.optimizer).bytes_held(self.optimizer.param_groups)
        return FinetuneSummary(
            task=self.config.task,
            model=self.config.model,
            optimizer=self.config.optimizer,
            metric=self.task.spec.scores[0],
            scores={name: best.measured[name] for name in self.task.spec.scores},
            majority=self.task.data.majority(),
            val_loss=best.measured["val_loss"],
            state_bytes=state_bytes(self.optimizer),
            state_bytes_formula=state["states"] + state["bases"],
            saved_activation_bytes=self.saved_bytes,
            trainable=trainable,
            seconds=round(self.seconds, 3),
            steps=self.step,
            best_step=best.step,
            best=str(folder),
            tokens=self.tokens,
            out=str(self.out),
            seed=self.config.seed,
            data_form=self.task.form,
        )

    def _merge(self, checkpoint: Path) -> None:
        """Merge the best adapters into the weights, and write a model that needs no peft to ``OUT/model``."""
        checkpoints.load_weights(checkpoint, self.model)
        merged = self.task.adapters.merge_and_unload()
        size = sum(p.numel() * p.element_size() for p in merged.parameters())
        with written("model", self.out / checkpoints.MODEL, size) as scratch:
            merged.save_pretrained(scratch)
            self.tokenizer.save_pretrained(scratch)
