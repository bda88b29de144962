"""Any optimizer by name in transformers' ``Trainer``, with the settings of its ``TrainingArguments``.

Trainer(model=model, args=args, optimizer_cls_and_kwargs=(Subspace, dict(name="sara_adamw", rank=128)), ...)

After ``register()`` the names are values of ``TrainingArguments(optim=...)`` too, in any script that builds on the
Trainer. ``python -m subspan.integrations.transformers script.py ...`` registers them and runs the script.
"""

import ast
import functools
import inspect
import logging
import re
import runpy
import sys
from dataclasses import fields
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import check_target_module_exists
from transformers.training_args import OptimizerNames

from subspan.factory import create
from subspan.integrations.step_in_backward import enable
from subspan.recipes import Recipe, find, list_optimizers
from subspan.utils.errors import SettingError

logger = logging.getLogger(__name__)
_ADAM = {"betas": ("adam_beta1", "adam_beta2"), "eps": ("adam_epsilon",)}
_OURS = "subspan_"
"""What stands before the names that transformers gives to optimizers of its own."""


class Subspace:
    """The factory that ``Trainer`` calls to make its optimizer.

    It takes these settings from ``TrainingArguments``:

    - ``learning_rate``;
    - ``weight_decay``, for the parameters that the Trainer would decay;
    - ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon``, where they are not at their defaults and the rule has them (a
      recipe such as ``sara_adam_mini`` has defaults of its own);
    - ``seed``;
    - ``max_steps``, which the hybrid needs;
    - ``optim_args``, such as ``"rank=8,update_proj_gap=7"``;
    - ``optim_target_modules``, which chooses ``nn.Linear`` layers as it does for transformers' own GaLore;
    - ``gradient_accumulation_steps`` and ``max_grad_norm``, for steps in the backward pass.

    transformers 5 makes the factory without arguments and calls it with the model. transformers 4.57 calls the class
    with parameter groups, or with what the dict has as ``model``; then the optimizer is made at once.
    """

    def __new__(cls, model: object = None, /, **settings: Any) -> Any:
        """Return the factory, or the optimizer where transformers 4.57 asks for it.

        Raises:
            SettingError: there are parameter groups, and the caller is no Trainer that has their model.
        """
        given = settings.pop("model", model)
        if given is None and not settings:
            return super().__new__(cls)
        trainer = _calling_trainer(inspect.currentframe())
        of_trainer: Any = given if isinstance(given, nn.Module) or trainer is None else trainer.model
        if not isinstance(of_trainer, nn.Module):
            raise SettingError(
                "params: parameter groups do not lead to their model, and no Trainer is calling; add the model to the "
                "dict, as in (Subspace, dict(name=..., model=model, args=args))"
            )
        return _optimizer(trainer, of_trainer, **settings)

    def __call__(
        self, model: nn.Module, /, name: str, args: TrainingArguments | None = None, **settings: Any
    ) -> torch.optim.Optimizer:
        """Return the optimizer of that name for ``model``.

        Args:
            model: the model that the Trainer trains.
            name: one of ``subspan.list_optimizers()``.
            args: the settings of the Trainer. Without them they are taken from the Trainer that makes this call.
            settings: arguments of ``subspan.create``; these win over ``args``. Three more are allowed.
                ``lr="recipe"`` stands for the recipe's own rate, in place of ``learning_rate``.
                ``step_in_backward=True`` steps in the backward pass, with ``gradient_accumulation_steps``
                micro-batches. ``clip`` says how ``max_grad_norm`` clips then: ``"lagged_global"`` is the default.

        Raises:
            SettingError: as ``create`` raises it, or ``args`` is missing and the caller is no Trainer.
        """
        settings.pop("model", None)  # what transformers 4.57 needs
        return _optimizer(_calling_trainer(inspect.currentframe()), model, name=name, args=args, **settings)


def register() -> tuple[str, ...]:
    """Make ``TrainingArguments(optim=...)`` know the optimizers of this library, and return their names there.

    The other settings come from ``TrainingArguments``, as with ``Subspace``:

        TrainingArguments(optim="sara_adamw", optim_args="rank=8", optim_target_modules=[r".*attn.*"])

    The names are those of ``subspan.list_optimizers()``. Where transformers has an optimizer of that name, its own
    stays, and ours gets a prefix, as in ``subspan_galore_adamw``. Call this before the arguments are made or parsed; to
    call it again changes nothing.
    """
    names = {_name_in_transformers(name): name for name in list_optimizers()}
    for value in names.keys() - OptimizerNames._value2member_map_.keys():
        _add_member(value)
    theirs = Trainer.get_optimizer_cls_and_kwargs
    if not hasattr(theirs, "subspan"):

        @functools.wraps(theirs)
        def chosen(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
            name = names.get(OptimizerNames(args.optim).value)
            return theirs(args, model) if name is None else (Subspace, {"name": name})

        chosen.subspan = True  # type: ignore[attr-defined]
        Trainer.get_optimizer_cls_and_kwargs = staticmethod(chosen)
    return tuple(names)


def _name_in_transformers(name: str) -> str:
    member = OptimizerNames._value2member_map_.get(name)
    return name if member is None or hasattr(member, "subspan") else _OURS + name


def _add_member(value: str) -> None:
    """Add a value to an enumeration, which Python has no words for: ``OptimizerNames(value)`` finds it then."""
    member = str.__new__(OptimizerNames, value)
    member._name_, member._value_, member.subspan = value.upper(), value, True
    member._sort_order_ = len(OptimizerNames._member_names_)
    OptimizerNames._member_names_.append(member._name_)
    OptimizerNames._member_map_[member._name_] = member
    OptimizerNames._value2member_map_[value] = member


def _optimizer(
    trainer: Trainer | None,
    model: nn.Module,
    name: str,
    args: TrainingArguments | None = None,
    **settings: Any,
) -> torch.optim.Optimizer:
    """Return the optimizer of that name, with the settings of ``args``, or of the Trainer's where these are missing."""
    if args is None:
        if trainer is None:
            raise SettingError(
                "args=None: no Trainer is calling; pass its TrainingArguments, for example "
                "(Subspace, dict(name=..., args=args))"
            )
        args, decayed = trainer.args, trainer.get_decay_parameter_names(model)
    else:
        # The Trainer's own rule, which reads the model and nothing of the Trainer.
        decayed = Trainer.get_decay_parameter_names(None, model)
    recipe = find(name)
    given: dict[str, Any] = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "decayed": decayed,
        "seed": args.seed,
        "total_steps": args.max_steps if args.max_steps > 0 else None,
    }
    if args.optim_target_modules is not None and "targets" not in settings and recipe.selector is not None:
        given["targets"] = _targets(args.optim_target_modules, model)
    own = {**read_optim_args(args.optim_args), **settings}
    if "lr" not in own:
        _warn_of_the_rate(recipe, args)
    elif own["lr"] == "recipe":
        own["lr"] = None
    if args.optim not in (_default(args, "optim"), _name_in_transformers(name)):
        logger.warning("optim=%r of TrainingArguments: not used; the optimizer is %r", str(args.optim.value), name)
    settings = {**given, **_changed(recipe, args), **own}
    in_backward, clip = settings.pop("step_in_backward", False), settings.pop("clip", None)
    optimizer = create(name, model, **settings)
    if in_backward:
        enable(
            optimizer,
            model,
            accumulate=args.gradient_accumulation_steps,
            clip=clip,
            max_norm=args.max_grad_norm,
            scaled=args.fp16,
        )
    elif clip is not None:
        raise SettingError(f"clip={clip!r}: is for step_in_backward=True; otherwise max_grad_norm clips")
    return optimizer


def read_optim_args(text: str | None) -> dict[str, Any]:
    """Return the settings of ``optim_args``, such as ``"rank=8,betas=(0.9,0.95),proj_type=std"``.

    Values are Python's numbers, tuples and ``None``, ``true`` and ``false``; all else is text.

    Raises:
        SettingError: a part of it is no ``name=value``.
    """
    found: dict[str, Any] = {}
    for part in re.split(r",(?![^(\[{]*[)\]}])", text or ""):  # commas inside of brackets belong to a value
        key, equals, value = (word.strip() for word in part.partition("="))
        if not part.strip():
            continue
        if not (key and equals and value):
            raise SettingError(
                f"optim_args={text!r}: {part!r} is no name=value; write it like rank=8,update_proj_gap=7"
            )
        try:
            found[key] = ast.literal_eval({"true": "True", "false": "False"}.get(value.lower(), value))
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def _targets(asked: str | list[str], model: nn.Module) -> str:
    """Return ``optim_target_modules`` as an expression for the names of the layers that transformers would take."""
    if isinstance(asked, str) and asked.replace("_", "-") == "all-linear":
        return "all-linear"
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [name for name in linear if check_target_module_exists(asked, name)]
    if not found:
        raise SettingError(
            f"optim_target_modules={asked!r}: matches no nn.Linear; their names look like "
            f"{', '.join(map(repr, linear[:4]))}. A text must match a whole name as a regular expression; of a list, each "
            "is a part of a name or such an expression"
        )
    return "|".join(re.escape(name) for name in found)


def _default(args: TrainingArguments, key: str) -> Any:
    return next(field.default for field in fields(type(args)) if field.name == key)


def _warn_of_the_rate(recipe: Recipe, args: TrainingArguments) -> None:
    """Warn if nobody has chosen the rate, which is then one for fine-tuning at full rank."""
    rate = args.learning_rate
    if recipe.selector is not None and rate == _default(args, "learning_rate") and rate < recipe.lr / 10:
        logger.warning(
            "learning_rate=%g is the default of %s; a projected weight moves by learning_rate * scale = %g, which is "
            "next to nothing. The rate of %r is %g: give it, another one, or lr='recipe' beside the name",
            rate, type(args).__name__, rate * recipe.scale, recipe.name, recipe.lr,
        )  # fmt: skip


def _changed(recipe: Recipe, args: TrainingArguments) -> dict[str, Any]:
    """Those settings of Adam that were changed, if the rule of the optimizer means the same by them."""
    rule = recipe.rule
    changed: dict[str, Any] = {}
    for key, arguments in _ADAM.items():
        values = tuple(getattr(args, argument) for argument in arguments)
        if values == tuple(_default(args, argument) for argument in arguments):
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

    ``Trainer.create_optimizer`` calls ``optimizer_cls()(model, **kwargs)``, or in transformers 4.57
    ``optimizer_cls(groups, **kwargs)``. It passes neither itself nor its arguments, and neither what it passes nor the
    dict leads to them, so its frame is the only place that has them. Nothing beyond the direct caller is looked at: a
    Trainer farther up may be another one. ``args=`` needs no frame.
    """
    caller = factory.f_back if factory is not None else None
    found = caller.f_locals.get("self") if caller is not None else None
    return found if isinstance(found, Trainer) else None


def _main() -> None:
    """Register the optimizers, and run a script or ``-m module`` with the arguments that follow."""
    if sys.argv[1:2] in ([], ["-m"], ["-h"], ["--help"]) and not sys.argv[2:]:
        raise SystemExit("usage: python -m subspan.integrations.transformers (SCRIPT | -m MODULE) [ARGUMENT ...]")
    # This file runs as __main__; what scripts import is another copy, and that is the one to register.
    from subspan.integrations import transformers

    transformers.register()
    is_module = sys.argv[1] == "-m"
    sys.argv = sys.argv[2:] if is_module else sys.argv[1:]
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    _main()
