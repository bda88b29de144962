"""Settings with every blank filled in, and checked."""

import glob
import importlib.util
import math
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from subspan.parts import Rule
from subspan.recipes import find
from subspan.training.config import EvaluationConfig, OptimConfig, PretrainConfig, ScheduleConfig
from subspan.training.errors import InputError
from subspan.training.model import own_tokenizer, preset_of
from subspan.training.presets import Preset
from subspan.training.streams import STREAMS

T = TypeVar("T")
_MOST_THREADS = 1024  # far beyond, OpenMP ends the process
_MOST_TOKENS = 2**28  # a batch is read whole: 4 GiB of token ids, and a hundred times what anyone trains with


@dataclass(frozen=True)
class ResolvedSchedule(ScheduleConfig):
    warmup_steps: int = 0


@dataclass(frozen=True)
class ResolvedEvaluation(EvaluationConfig):
    every: int = 1


@dataclass(frozen=True)
class ResolvedConfig(PretrainConfig):
    """A ``PretrainConfig`` in which no number is left to a default of the model or the method."""

    tokenizer: str = ""
    steps: int = 0
    batch_size: int = 0
    micro_batch_size: int = 0
    sequence_length: int = 0
    lr: float = 0.0
    rank: int = 0
    backward_side: bool = False
    update_proj_gap: int = 0
    schedule: ResolvedSchedule = ResolvedSchedule()
    evaluation: ResolvedEvaluation = ResolvedEvaluation()
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16-mixed", "bf16"] = "fp32"


def resolve(config: PretrainConfig) -> ResolvedConfig:
    """Fill in what the preset, the method and the machine decide.

    Raises:
        InputError: a number out of range; the message names it.
        ValueError: an unknown optimizer or model.
    """
    _check_names(config)
    method = find(config.optimizer)
    own_lr, projects = method.lr, method.selector is not None
    preset = preset_of(config.model)
    if preset and config.optimizer in ("adamw", "adamw_8bit"):
        own_lr = preset.adamw_lr
    known = preset or Preset(0, 0, 0, 0, batch_size=32)  # for the run's settings; its shape is the model's own
    steps = _first(config.steps, known.steps)
    batch_size = _first(config.batch_size, known.batch_size)
    # A preset's warmup belongs to the preset's number of steps.
    warmup = known.warmup_steps if steps == known.steps and known.warmup_steps is not None else max(1, steps // 10)
    device: Literal["cpu", "cuda"] = "cuda" if config.device == "cuda" else "cpu"
    if config.device == "auto" and torch.cuda.is_available():
        device = "cuda"
    tokenizer = config.tokenizer or (preset.tokenizer if preset else own_tokenizer(config.model))
    filled: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(config)} | {
        "tokenizer": _absolute(tokenizer, ("bytes", "embedded")),
        "steps": steps,
        "batch_size": batch_size,
        "micro_batch_size": _first(config.micro_batch_size, batch_size),
        "sequence_length": _first(config.sequence_length, known.sequence_length),
        "lr": _first(config.lr, own_lr),
        "scale": _first(config.scale, method.scale) if projects else config.scale,
        "optim": replace(
            config.optim,
            transfer=_first(config.optim.transfer, method.transfer) if projects else config.optim.transfer,
            **_rule_settings(config.optim, method.rule),
            # Where rows are spread over ranks, columns are compressed: written down for who goes on in one process.
            proj_type="right"
            if projects and config.parallel == "fsdp" and config.optim.proj_type == "std"
            else config.optim.proj_type,
            state_dtype=_first(config.optim.state_dtype, method.state_dtype),
        ),
        "model": _absolute(config.model) if preset is None else config.model,
        "data": _absolute(config.data, ("embedded", *STREAMS)),
        "validation_data": config.validation_data and _absolute(config.validation_data, ("embedded",)),
        "rank": _first(config.rank, known.rank),
        "backward_side": _first(config.backward_side, method.backward_side),
        "update_proj_gap": _first(config.update_proj_gap, known.update_proj_gap),
        "schedule": ResolvedSchedule(_first(config.schedule.warmup_steps, warmup), config.schedule.min_lr_ratio),
        "evaluation": ResolvedEvaluation(_first(config.evaluation.every, max(1, steps // 5)), config.evaluation.tokens),
        "device": device,
        "precision": ("bf16-mixed" if device == "cuda" else "fp32") if config.precision == "auto" else config.precision,
    }
    resolved = ResolvedConfig(**filled)
    _check(resolved)
    return resolved


def _rule_settings(optim: OptimConfig, rule: Rule) -> dict[str, Any]:
    """``betas`` and ``eps``, where the rule has them and they are not among its settings."""
    given = {"betas": optim.betas, "eps": optim.eps}
    return {
        key: getattr(rule, key) if value is None and hasattr(rule, key) and key not in (optim.rule or {}) else value
        for key, value in given.items()
    }


def _first(given: T | None, otherwise: T) -> T:
    return otherwise if given is None else given


def _absolute(name: str, known: Collection[str] = ()) -> str:
    """A path as one that holds from any directory, so that a run continues from any; ``known`` and other names stay."""
    stream, colon, path = name.partition(":")
    if name in known:
        return name
    if colon and stream in STREAMS:
        return f"{stream}:{_absolute(path)}"
    path_like = glob.has_magic(name) or Path(name).expanduser().exists()
    return str(Path(name).expanduser().absolute()) if path_like else name


def _check_names(config: PretrainConfig) -> None:
    """Refuse blank names of models, data and directories: the path of nothing is the working directory."""
    for name in ("model", "data", "validation_data", "tokenizer", "out", "resume"):
        value: str | None = getattr(config, name)
        stream, colon, path = (value or "").partition(":")
        if value is not None and not (path if colon and stream in STREAMS else value).strip():
            expected = f"a path after {stream}:, or {stream} alone" if colon and stream in STREAMS else "a name or a path"
            raise InputError(f"{name}={value!r}: is blank; expected {expected}, or leave it out")


def _check(config: ResolvedConfig) -> None:
    at_least_one = {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "micro_batch_size": config.micro_batch_size,
        "sequence_length": config.sequence_length,
        "rank": config.rank,
        "update_proj_gap": config.update_proj_gap,
        "log_every": config.log_every,
        "threads": config.threads,
        "evaluation.every": config.evaluation.every,
        "evaluation.tokens": config.evaluation.tokens,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
    }
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise InputError(f"{name}={value}: expected a whole number >= 1")
    if config.threads is not None and config.threads > _MOST_THREADS:
        raise InputError(f"threads={config.threads}: expected at most {_MOST_THREADS:,}; null leaves it to torch")
    if config.batch_size * config.sequence_length > _MOST_TOKENS:
        raise InputError(
            f"batch_size={config.batch_size}: with sequence_length={config.sequence_length} a step would read "
            f"{config.batch_size * config.sequence_length:,} tokens; expected at most {_MOST_TOKENS:,}"
        )
    if config.batch_size % config.micro_batch_size:
        raise InputError(f"micro_batch_size={config.micro_batch_size}: expected a divisor of batch_size={config.batch_size}")
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
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device='cuda': torch finds no CUDA device; use --device cpu, or auto")
