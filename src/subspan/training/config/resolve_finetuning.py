"""Fill in every blank of the settings of a fine-tuning run, and check them.

A pretrained model gets the settings of the command for MRPC and RoBERTa-base in the README of GaLore's code
(arXiv 2403.03507). GoLore's scripts (arXiv 2410.11289) use them for all of GLUE:

    rank 4, scale 4, period 500, batch 16, 30 epochs, learning rate 3e-5, which falls linearly to 0

A model with random weights gets the settings of pretraining.

Deviations:

- Examples are cut at 128 tokens, and there at 512.
- A run of fewer than 5,000 steps has a period of a tenth of its length. Otherwise it would choose few bases.
- Methods whose basis has ``E[Q Qᵀ] = I`` (RSO, FLora) keep scale 1, since their step already has the size of full rank.
- The learning rate of SGD is that of GoLore's scripts, 1e-3, and that of Lion a third of Adam's.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from subspan.recipes import Recipe, find
from subspan.rules import SGD, Lion
from subspan.selectors import Gaussian, Random
from subspan.training.config.resolve import (
    Defaults,
    Resolved,
    absolute,
    check,
    check_batch,
    check_names,
    fill,
    first,
    fresh_lr,
)
from subspan.training.config.settings import FinetuneConfig, SelectionConfig
from subspan.training.data.task_specs import find_task
from subspan.training.models.build import brings_weights, own_tokenizer, preset_of
from subspan.training.models.presets import Preset
from subspan.utils.errors import InputError

_LR: dict[type, float] = {SGD: 1e-3, Lion: 1e-5}
_LONGEST_PERIOD = 500
_BASES = 10
"""How many bases a shorter run chooses."""


@dataclass(frozen=True)
class ResolvedSelection(SelectionConfig):
    every: int = 1


@dataclass(frozen=True)
class ResolvedFinetune(Resolved, FinetuneConfig):
    """A ``FinetuneConfig`` in which no number is left open, except for those that ``with_length`` decides."""

    epochs: int = 0
    evaluation: ResolvedSelection = ResolvedSelection()


def resolve_finetune(config: FinetuneConfig) -> ResolvedFinetune:
    """Fill in what the model, the method, the papers and the machine decide.

    ``steps``, ``update_proj_gap`` and ``evaluation.every`` are 0 where they depend on the number of examples.

    Raises:
        InputError: a number is out of range, or settings contradict each other; the message names them.
        SettingError: the optimizer or the model is unknown.
    """
    check_names(config)
    method, spec, preset = find(config.optimizer), find_task(config.task), preset_of(config.model)
    fresh = not brings_weights(config.model)
    known = preset or Preset(0, 0, 0, 0)  # for the run's settings; its shape is the model's own
    defaults = Defaults(
        tokenizer="" if config.tokenizer else preset.tokenizer if preset else own_tokenizer(config.model),
        steps=0,
        warmup_steps=0,
        batch_size=16,
        lr=fresh_lr(preset, method) if fresh else _LR.get(type(method.rule), 3e-5),
        scale=method.scale if fresh else _paper_scale(method),
        rank=known.rank if fresh else 4,
        update_proj_gap=known.update_proj_gap if fresh else 0,
    )
    filled: dict[str, Any] = fill(config, method, defaults) | {
        "model": config.model if preset else absolute(config.model),
        "data": config.data and absolute(config.data),
        "validation_data": config.validation_data and absolute(config.validation_data),
        "chat_template": config.chat_template and absolute(config.chat_template, ("plain",)),
        "text_column": config.text_column or spec.text,
        "pair_column": config.pair_column or spec.pair,
        "label_column": config.label_column or spec.label,
        "epochs": first(config.epochs, spec.epochs),
        "evaluation": ResolvedSelection(first(config.evaluation.every, 0), config.evaluation.patience),
    }
    resolved = ResolvedFinetune(**filled)
    given = {
        "steps": config.steps,
        "update_proj_gap": config.update_proj_gap,
        "evaluation.every": config.evaluation.every,
        "evaluation.patience": config.evaluation.patience,
        "lora.rank": config.lora.rank,
    }
    if resolved.schedule.warmup_steps < 0:
        raise InputError(f"schedule.warmup_steps={resolved.schedule.warmup_steps}: expected a whole number >= 0")
    # Where the length is still 0, ``with_length`` checks it, and the warmup against it.
    schedule = resolved.schedule if resolved.steps else replace(resolved.schedule, warmup_steps=0)
    check(
        replace(resolved, steps=max(1, resolved.steps), schedule=schedule),
        given | {"epochs": resolved.epochs, "max_length": resolved.max_length},
    )
    check_batch(resolved.batch_size, resolved.max_length, "max_length")
    _check_lora(resolved)
    for name in ("chat_template", "learn_prompts", "packing"):
        if (given := getattr(config, name)) and spec.kind != "lm":
            raise InputError(f"{name}={given!r}: belongs to the task lm; the task is {config.task!r}; leave it out")
    own_files = config.task in ("classification", "regression", "lm")
    if own_files and not config.data:
        raise InputError(
            f"data=None: the task {config.task!r} is of your own files; give --data FILE.jsonl, .csv or another"
        )
    if config.task == "bundled" and config.data:
        raise InputError(
            f"data={config.data!r}: the bundled task has its own; for files use --task classification, regression or lm"
        )
    if config.validation_data and not config.data:
        raise InputError(
            f"validation_data={config.validation_data!r}: belongs to files; give the training ones with --data"
        )
    return resolved


def with_length(config: ResolvedFinetune, examples: int) -> ResolvedFinetune:
    """Fill in what depends on the number of examples in the training set.

    Raises:
        InputError: the warmup is longer than the run.
    """
    steps = config.steps or math.ceil(config.epochs * examples / config.batch_size)
    every = config.evaluation.every or max(1, steps // 10)
    period = config.update_proj_gap or min(_LONGEST_PERIOD, max(1, steps // _BASES))
    known = replace(config, steps=steps, update_proj_gap=period, evaluation=replace(config.evaluation, every=every))
    check(known, {})
    return known


def _paper_scale(method: Recipe) -> float:
    """The scale for pretrained weights; see the deviations above."""
    unit = isinstance(method.selector, Gaussian) or (isinstance(method.selector, Random) and method.selector.scaled)
    return 1.0 if unit or method.selector is None else 4.0


def _check_lora(config: ResolvedFinetune) -> None:
    lora = config.lora
    if not 0 < lora.alpha < math.inf:
        raise InputError(f"lora.alpha={lora.alpha}: expected a number > 0; 16 is usual")
    if not 0 <= lora.dropout < 1:
        raise InputError(f"lora.dropout={lora.dropout}: expected a share from 0 to below 1")
    if lora.rank is not None and find(config.optimizer).selector is not None:
        raise InputError(
            f"lora.rank={lora.rank}: {config.optimizer} would project what LoRA has frozen; use a full-rank "
            "optimizer, such as --optimizer adamw"
        )
    if lora.rank is not None and config.parallel == "fsdp":
        raise InputError("parallel='fsdp': adapters of LoRA cannot be sharded here; use --parallel ddp, or no LoRA")
