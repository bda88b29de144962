"""Any optimizer by name in transformers' ``Trainer``, with the settings of its ``TrainingArguments``.

Trainer(model=model, args=args, optimizer_cls_and_kwargs=(Subspace, dict(name="sara_adamw", rank=128)), ...)
"""

import inspect
import logging
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from subspan.factory import create
from subspan.recipes import find
from subspan.utils.errors import SettingError

logger = logging.getLogger(__name__)
_ADAM = {"betas": ("adam_beta1", "adam_beta2"), "eps": ("adam_epsilon",)}


class Subspace:
    """What ``Trainer`` calls to make its optimizer.

    From ``TrainingArguments``: ``learning_rate``; ``weight_decay``, for the parameters that the Trainer would decay;
    ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` where they are not at their defaults (a recipe such as
    ``sara_adam_mini`` has its own) and the rule has them; ``seed``; ``max_steps``, which the hybrid needs.
    """

    def __init__(self, groups: object = None, **settings: Any) -> None:
        if groups is not None or settings:
            raise SettingError("this version of transformers gives its optimizers no model; install transformers>=5")

    def __call__(
        self, model: nn.Module, name: str, args: TrainingArguments | None = None, **settings: Any
    ) -> torch.optim.Optimizer:
        """The optimizer.

        Args:
            model: the Trainer's.
            name: one of ``subspan.list_optimizers()``.
            args: the Trainer's, found by itself when a Trainer calls.
            settings: the arguments of ``subspan.create``; these win over ``args``.

        Raises:
            ValueError: as ``create``; or ``args`` is missing and no Trainer is calling.
        """
        trainer = _calling_trainer()
        if args is None:
            if trainer is None:
                raise SettingError("args=None: no Trainer is calling; pass the TrainingArguments")
            args = trainer.args
        given: dict[str, Any] = {
            "lr": args.learning_rate,
            "weight_decay": args.weight_decay,
            "seed": args.seed,
            "total_steps": args.max_steps if args.max_steps > 0 else None,
        }
        if trainer is not None:
            given["decayed"] = trainer.get_decay_parameter_names(model)
        return create(name, model, **{**given, **_changed(name, args), **settings})


def _changed(name: str, args: TrainingArguments) -> dict[str, Any]:
    """Adam's settings, those that were changed, if the rule means the same by them."""
    defaults, rule = {field.name: field.default for field in fields(TrainingArguments)}, find(name).rule
    changed: dict[str, Any] = {}
    for key, names in _ADAM.items():
        values = tuple(getattr(args, name) for name in names)
        if values == tuple(defaults[name] for name in names):
            continue
        if hasattr(rule, "betas") and hasattr(rule, key):
            changed[key] = values if len(values) > 1 else values[0]
        else:
            logger.warning(
                "%s of TrainingArguments: not used by %r; set what it has in rule={...}", " and ".join(names), rule
            )
    return changed


def _calling_trainer() -> Trainer | None:
    """The Trainer that is making its optimizer: it hands a factory its model, and nothing of its arguments."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    return None
