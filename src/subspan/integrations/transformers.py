"""Any optimizer by name in transformers' ``Trainer``, with the settings of its ``TrainingArguments``.

Trainer(model=model, args=args, optimizer_cls_and_kwargs=(Subspace, dict(name="sara_adamw", rank=128)), ...)
"""

import inspect
import logging
from dataclasses import fields
from types import FrameType
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
    """The factory that ``Trainer`` calls to make its optimizer.

    It takes these settings from ``TrainingArguments``:

    - ``learning_rate``;
    - ``weight_decay``, for the parameters that the Trainer would decay;
    - ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon``, where they are not at their defaults and the rule has them (a
      recipe such as ``sara_adam_mini`` has defaults of its own);
    - ``seed``;
    - ``max_steps``, which the hybrid needs.
    """

    def __init__(self, groups: object = None, **settings: Any) -> None:
        if groups is not None or settings:
            raise SettingError(
                "this version of transformers hands its optimizers parameter groups and no model; install "
                "transformers>=5"
            )

    def __call__(
        self, model: nn.Module, name: str, args: TrainingArguments | None = None, **settings: Any
    ) -> torch.optim.Optimizer:
        """Return the optimizer of that name for ``model``.

        Args:
            model: the model that the Trainer trains.
            name: one of ``subspan.list_optimizers()``.
            args: the settings of the Trainer. Without them they are taken from the Trainer that makes this call.
            settings: arguments of ``subspan.create``; these win over ``args``.

        Raises:
            ValueError: as ``create`` raises it, or ``args`` is missing and the caller is no Trainer.
        """
        if args is None:
            trainer = _calling_trainer(inspect.currentframe())
            if trainer is None:
                raise SettingError(
                    "args=None: no Trainer is calling; pass its TrainingArguments, for example "
                    "(Subspace, dict(name=..., args=args))"
                )
            args, decayed = trainer.args, trainer.get_decay_parameter_names(model)
        else:
            # The Trainer's own rule, which reads the model and nothing of the Trainer.
            decayed = Trainer.get_decay_parameter_names(None, model)
        given: dict[str, Any] = {
            "lr": args.learning_rate,
            "weight_decay": args.weight_decay,
            "decayed": decayed,
            "seed": args.seed,
            "total_steps": args.max_steps if args.max_steps > 0 else None,
        }
        return create(name, model, **{**given, **_changed(name, args), **settings})


def _changed(name: str, args: TrainingArguments) -> dict[str, Any]:
    """Those settings of Adam that were changed, if the rule of the optimizer means the same by them."""
    defaults, rule = {field.name: field.default for field in fields(TrainingArguments)}, find(name).rule
    changed: dict[str, Any] = {}
    for key, arguments in _ADAM.items():
        values = tuple(getattr(args, argument) for argument in arguments)
        if values == tuple(defaults[argument] for argument in arguments):
            continue
        if hasattr(rule, "betas") and hasattr(rule, key):
            changed[key] = values if len(values) > 1 else values[0]
        else:
            logger.warning(
                "%s of TrainingArguments: not used by %r; set what it has in rule={...}", " and ".join(arguments), rule
            )
    return changed


def _calling_trainer(factory: FrameType | None) -> Trainer | None:
    """Return the Trainer whose method calls the factory that runs in this frame, or None for any other caller.

    ``Trainer.create_optimizer`` calls ``optimizer_cls()(model, **kwargs)``. It passes neither itself nor its arguments,
    and neither the model nor the dict leads to them, so its frame is the only place that has them. Nothing beyond the
    direct caller is looked at: a Trainer farther up may be another one. ``args=`` needs no frame.
    """
    caller = factory.f_back if factory is not None else None
    found = caller.f_locals.get("self") if caller is not None else None
    return found if isinstance(found, Trainer) else None
