"""Fill in every blank of the settings of a run, and check them."""

import glob
import importlib.util
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from subspan.groups import check_rank
from subspan.parts import Rule
from subspan.recipes import Recipe, find
from subspan.training.config.settings import (
    EvaluationConfig,
    FinetuneConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    ScheduleConfig,
)
from subspan.training.data.streams import STREAMS
from subspan.training.models.build import own_tokenizer, preset_of
from subspan.training.models.presets import Preset
from subspan.utils.errors import InputError
from subspan.utils.ranks import Rank

T = TypeVar("T")
_MOST_THREADS = 1024  # with far more, OpenMP ends the process
_MOST_TOKENS = 2**28  # a batch is read whole: this is 4 GiB of token ids, a hundred times what anyone trains with


@dataclass(frozen=True)
class ResolvedSchedule(ScheduleConfig):
    warmup_steps: int = 0


@dataclass(frozen=True)
class ResolvedEvaluation(EvaluationConfig):
    every: int = 1


@dataclass(frozen=True)
class Resolved(RunConfig):
    """A ``RunConfig`` in which no number is left to a default of the model or the method."""

    tokenizer: str = ""
    steps: int = 0
    batch_size: int = 0
    micro_batch_size: int = 0
    lr: float = 0.0
    rank: Rank = 0
    backward_side: bool = False
    update_proj_gap: int = 0
    schedule: ResolvedSchedule = ResolvedSchedule()
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16-mixed", "bf16", "fp16"] = "fp32"


@dataclass(frozen=True)
class ResolvedConfig(Resolved, PretrainConfig):
    """A ``PretrainConfig`` in which no number is left to a default of the model or the method."""

    sequence_length: int = 0
    evaluation: ResolvedEvaluation = ResolvedEvaluation()


@dataclass(frozen=True)
class Defaults:
    """Values that the model and the method give where the user gives none."""

    tokenizer: str
    steps: int
    warmup_steps: int
    batch_size: int
    lr: float
    scale: float
    rank: Rank
    update_proj_gap: int


def resolve(config: PretrainConfig) -> ResolvedConfig:
    """Fill in what the preset, the method and the machine decide.

    Raises:
        InputError: a number is out of range; the message names it.
        SettingError: the optimizer or the model is unknown.
    """
    check_names(config)
    method = find(config.optimizer)
    preset = preset_of(config.model)
    known = preset or Preset(0, 0, 0, 0, batch_size=32)  # for the run's settings; its shape is the model's own
    steps = first(config.steps, known.steps)
    filled = fill(
        config,
        method,
        Defaults(
            tokenizer=preset.tokenizer if preset else "" if config.tokenizer else own_tokenizer(config.model),
            steps=steps,
            # A preset's warmup belongs to the preset's number of steps.
            warmup_steps=known.warmup_steps
            if steps == known.steps and known.warmup_steps is not None
            else max(1, steps // 10),
            batch_size=known.batch_size,
            lr=fresh_lr(preset, method),
            scale=method.scale,
            rank=known.rank,
            update_proj_gap=known.update_proj_gap,
        ),
    ) | {
        "sequence_length": first(config.sequence_length, known.sequence_length),
        "model": absolute(config.model) if preset is None else config.model,
        "data": absolute(config.data, ("embedded", *STREAMS)),
        "validation_data": config.validation_data and absolute(config.validation_data, ("embedded",)),
        "test_data": config.test_data and absolute(config.test_data, ("embedded",)),
        "evaluation": ResolvedEvaluation(first(config.evaluation.every, max(1, steps // 5)), config.evaluation.tokens),
    }
    resolved = ResolvedConfig(**filled)
    sizes = {
        "sequence_length": resolved.sequence_length,
        "evaluation.every": resolved.evaluation.every,
        "evaluation.tokens": resolved.evaluation.tokens,
    }
    check(resolved, sizes)
    check_batch(resolved.batch_size, resolved.sequence_length, "sequence_length")
    return resolved


def fresh_lr(preset: Preset | None, method: Recipe) -> float:
    """The learning rate for random weights."""
    return preset.adamw_lr if preset and method.name in ("adamw", "adamw_8bit") else method.lr


def fill(config: RunConfig, method: Recipe, defaults: Defaults) -> dict[str, Any]:
    """The fields of ``config``, with the blanks of those that every run has filled in."""
    projects = method.selector is not None
    batch_size = first(config.batch_size, defaults.batch_size)
    device: Literal["cpu", "cuda"] = "cuda" if config.device == "cuda" else "cpu"
    if config.device == "auto" and torch.cuda.is_available():
        device = "cuda"
    return {field.name: getattr(config, field.name) for field in fields(config)} | {
        "tokenizer": absolute(config.tokenizer or defaults.tokenizer, ("bytes", "embedded")),
        "steps": first(config.steps, defaults.steps),
        "batch_size": batch_size,
        "micro_batch_size": first(config.micro_batch_size, batch_size),
        "lr": first(config.lr, defaults.lr),
        "scale": first(config.scale, defaults.scale) if projects else config.scale,
        "optim": replace(
            config.optim,
            transfer=first(config.optim.transfer, method.transfer) if projects else config.optim.transfer,
            **_rule_settings(config.optim, method.rule),
            # Where rows are sharded, columns are compressed. It is written down for a continuation in one process.
            proj_type="right"
            if projects and config.parallel == "fsdp" and config.optim.proj_type == "std"
            else config.optim.proj_type,
            state_dtype=first(config.optim.state_dtype, method.state_dtype),
        ),
        "rank": first(config.rank, defaults.rank),
        "backward_side": first(config.backward_side, method.backward_side),
        "update_proj_gap": first(config.update_proj_gap, defaults.update_proj_gap),
        "schedule": ResolvedSchedule(
            **asdict(config.schedule) | {"warmup_steps": first(config.schedule.warmup_steps, defaults.warmup_steps)}
        ),
        "device": device,
        "precision": ("bf16-mixed" if device == "cuda" else "fp32") if config.precision == "auto" else config.precision,
    }


def _rule_settings(optim: OptimConfig, rule: Rule) -> dict[str, Any]:
    """``betas`` and ``eps``, if the rule has them and its own settings do not hold them."""
    given = {"betas": optim.betas, "eps": optim.eps}
    return {
        key: getattr(rule, key) if value is None and hasattr(rule, key) and key not in (optim.rule or {}) else value
        for key, value in given.items()
    }


def first(given: T | None, otherwise: T) -> T:
    """Return ``given``, or ``otherwise`` if nothing is given."""
    return otherwise if given is None else given


def absolute(name: str, known: Collection[str] = ()) -> str:
    """Make a path absolute, so that a run continues from any directory. Names, among them the ``known``, stay."""
    stream, colon, path = name.partition(":")
    if name in known:
        return name
    if colon and stream in STREAMS:
        return f"{stream}:{absolute(path)}"
    path_like = glob.has_magic(name) or Path(name).expanduser().exists()
    return str(Path(name).expanduser().absolute()) if path_like else name


def check_names(config: PretrainConfig | FinetuneConfig) -> None:
    """Refuse blank names of models, data and directories, since a blank path is the working directory."""
    for name in ("model", "data", "validation_data", "test_data", "tokenizer", "out", "resume"):
        value: str | None = getattr(config, name, None)
        stream, colon, path = (value or "").partition(":")
        if value is not None and not (path if colon and stream in STREAMS else value).strip():
            expected = (
                f"a path after {stream}:, or only {stream}" if colon and stream in STREAMS else "a name or a path"
            )
            raise InputError(f"{name}={value!r}: is blank; expected {expected}, or leave it out")


def check_batch(batch_size: int, length: int, name: str) -> None:
    """Raise if a batch is larger than anyone can mean, with sequences of ``length`` tokens, the setting ``name``."""
    if batch_size * length > _MOST_TOKENS:
        raise InputError(
            f"batch_size={batch_size}: with {name}={length} a step would read {batch_size * length:,} tokens; "
            f"expected at most {_MOST_TOKENS:,}"
        )


def check(config: Resolved, counts: Mapping[str, int | None]) -> None:
    """Raise unless the settings of every run are in range, and so are the ``counts`` of this kind of run."""
    at_least_one = {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "micro_batch_size": config.micro_batch_size,
        "update_proj_gap": config.update_proj_gap,
        "log_every": config.log_every,
        "threads": config.threads,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        **counts,
    }
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise InputError(f"{name}={value}: expected a whole number >= 1")
    check_rank(config.rank, config.rank_pattern)
    if config.threads is not None and config.threads > _MOST_THREADS:
        raise InputError(f"threads={config.threads}: expected at most {_MOST_THREADS:,}; null leaves it to torch")
    if config.batch_size % config.micro_batch_size:
        raise InputError(
            f"micro_batch_size={config.micro_batch_size}: expected a divisor of batch_size={config.batch_size}"
        )
    for name, number in {"lr": config.lr, "weight_decay": config.weight_decay}.items():
        if not 0 <= number < math.inf:
            raise InputError(f"{name}={number}: expected a number >= 0")
    if not 0 <= config.seed < 2**63:
        raise InputError(f"seed={config.seed}: expected a whole number from 0 to 2^63 - 1")
    if config.clip is not None and not config.clip > 0:
        raise InputError(f"clip={config.clip}: expected a number > 0, or null to turn clipping off")
    if not 0 <= config.schedule.min_lr_ratio <= 1:
        raise InputError(f"schedule.min_lr_ratio={config.schedule.min_lr_ratio}: expected a share between 0 and 1")
    if not 0 <= config.schedule.warmup_steps <= config.steps:
        raise InputError(f"schedule.warmup_steps={config.schedule.warmup_steps}: expected 0 to steps={config.steps}")
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("tensorboard=True: the package is not installed; pip install 'subspan[tensorboard]'")
    if config.precision == "fp16" and config.parallel == "fsdp":
        raise InputError(
            "precision='fp16': the scaler of the loss does not work on sharded gradients; use --precision bf16-mixed or "
            "fp32, or --parallel ddp"
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device='cuda': torch finds no CUDA device; use --device cpu, or auto")


def plain(value: Any) -> Any:
    """``value`` with lists in place of tuples, so that settings equal what YAML and a checkpoint give back."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
