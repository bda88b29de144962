"""The settings of a parameter group: their names, types, defaults and ranges, in one place.

Every field of ``StepSettings`` is a key of a parameter group, where schedulers may change it and checkpoints keep it.
The constructors take the same names as keywords. To add a setting is to add a field here, with its type in
``StepOptions``, and to use it in the step.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, TypedDict, TypeVar

from torch import Tensor

from subspan.step.layout import PROJ_TYPES
from subspan.storage import eight_bit
from subspan.storage.allocation import StateDtype
from subspan.utils.checks import DIVISORS, LARGEST, is_divisor, is_factor
from subspan.utils.errors import SettingError
from subspan.utils.ranks import RANKS, Rank, is_rank
from subspan.utils.suggestions import near_names

Function = TypeVar("Function", bound=Callable[..., Any])


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_rate(value: object) -> bool:
    # Reading a tensor would wait for its device.
    return isinstance(value, Tensor) or is_factor(value) or (isinstance(value, float) and 0 <= value < math.inf)


def _setting(default: Any, allowed: Callable[[Any], bool], expected: str) -> Any:
    """Make a field with its default, the values that are ``allowed``, and the words for what is ``expected``."""
    return field(default=default, metadata={"allowed": allowed, "expected": expected})


def _switch(default: bool) -> Any:
    return _setting(default, lambda value: isinstance(value, bool), "True or False")


def _choice(default: str, *names: str, expected: str) -> Any:
    return _setting(default, lambda value: isinstance(value, str) and value in names, expected)


@dataclass(frozen=True)
class StepSettings:
    """The settings of the steps on a parameter group.

    Attributes:
        lr: learning rate, a float or a tensor; it is read at every step.
        rank: dimension of the subspace, >= 1, or its share of each compressed side, such as 0.25; ``None`` stands for
            full rank.
        update_proj_gap: steps between refreshes, >= 1.
        scale: factor on the step of projected matrices. ``lr * scale`` is their learning rate: halve one, double the
            other.
        proj_type: the side to compress: ``std`` (the shorter), ``reverse_std`` (the longer), ``right`` (the inputs,
            which are the columns of an ``nn.Linear``) or ``left`` (the outputs).
        weight_decay: decoupled weight decay, which is multiplied by ``lr``.
        flatten: whether parameters of three dimensions are convolutions, flattened to ``(out, -1)``, and not stacks.
        eta: strength of the proximal term of RSO, ``||B||² / (2 eta)``, where ``B`` is the way since the last refresh.
            It is > 0; ``None`` leaves the term out.
        proximal: whether the term is ``"coupled"`` into the gradient, or ``"decoupled"``; see ``step/proximal.py``.
        state_dtype: ``"float32"``, or ``"int8"`` for moments in 8 bits.
        min_8bit_size: number of entries from which on a moment is kept in 8 bits, >= 1; vectors never are.
        bf16_stochastic_round: whether updates of bf16 weights are rounded at random, so that they are right on average.
            Rounding to nearest would drop small ones.
    """

    lr: float | Tensor = _setting(1e-2, _is_rate, f"a number >= 0, as a float if beyond {LARGEST:g}")
    rank: Rank | None = _setting(None, lambda value: value is None or is_rank(value), f"{RANKS}, or None for full rank")
    update_proj_gap: int = _setting(200, _is_count, "a whole number of steps >= 1")
    scale: float = _setting(0.25, is_factor, f"a number >= 0, and at most {LARGEST:g}")
    proj_type: str = _choice("std", *PROJ_TYPES, expected=f"one of {', '.join(PROJ_TYPES)}; 'std' is usual")
    weight_decay: float = _setting(0.0, is_factor, f"a number >= 0, and at most {LARGEST:g}")
    flatten: bool = _switch(False)
    eta: float | None = _setting(
        None,
        lambda value: value is None or is_divisor(value),
        f"a number > 0, {DIVISORS}, or None for no proximal term",
    )
    proximal: Literal["coupled", "decoupled"] = _choice(
        "coupled", "coupled", "decoupled", expected="'coupled' or 'decoupled'"
    )
    state_dtype: StateDtype = _choice(
        "float32", "float32", "int8", expected="'float32', or 'int8' for moments in 8 bits"
    )
    min_8bit_size: int = _setting(eight_bit.SMALLEST, _is_count, "a whole number of entries >= 1; 4096 is usual")
    bf16_stochastic_round: bool = _switch(False)

    def __post_init__(self) -> None:
        check_settings(vars(self))

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "StepSettings":
        """Read the settings of a parameter group, which may hold other keys too. Raises if one is out of range."""
        return cls(**{name: group[name] for name in FIELDS if name in group})


FIELDS: dict[str, Field[Any]] = {own.name: own for own in fields(StepSettings)}


class StepOptions(TypedDict, total=False):
    """The settings that every constructor takes as keywords, for type checkers; see ``StepSettings``."""

    update_proj_gap: int
    proj_type: str
    weight_decay: float
    eta: float | None
    proximal: Literal["coupled", "decoupled"]
    min_8bit_size: int
    bf16_stochastic_round: bool


class AllStepOptions(StepOptions, total=False):
    """The settings of ``StepOptions``, and those for which a paper's recipe has a value of its own."""

    scale: float
    state_dtype: StateDtype


def check_settings(group: Mapping[str, Any], called: Mapping[str, str] | None = None) -> None:
    """Raise unless the settings that a group has are in range.

    Args:
        group: settings by name; other keys do not matter.
        called: the names for the message of settings that the caller knows by another name.
    """
    for name, own in FIELDS.items():
        if name in group and not own.metadata["allowed"](group[name]):
            said = (called or {}).get(name, name)
            raise SettingError(f"{said}={group[name]!r}: expected {own.metadata['expected']}")


def check_names(given: Mapping[str, Any], function: Callable[..., Any], where: str) -> None:
    """Raise the ``TypeError`` of an unexpected keyword unless ``function``, which is ``spelled_out``, has each name."""
    known = [name for name in inspect.signature(function).parameters if name != "self"]
    for name in given:
        if name not in known:
            raise TypeError(f"{where}() got an unexpected keyword argument {name!r}; {near_names(name, known)}")


def spelled_out(options: type) -> Callable[[Function], Function]:
    """Let a function that takes ``**settings: Unpack[options]`` show each of them in its signature and its docstring.

    Documentation, editors and command lines that read signatures (Lightning's, jsonargparse) then see typed keywords
    with their defaults and a description, and no ``**settings`` (contract R14).
    """

    def decorate(function: Function) -> Function:
        own = inspect.signature(function)
        named = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        chosen = [name for name in FIELDS if name in options.__optional_keys__]  # type: ignore[attr-defined]
        for name in chosen:
            default, kind = FIELDS[name].default, FIELDS[name].type
            assert default is not MISSING
            named.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind))
        function.__signature__ = own.replace(parameters=named)  # type: ignore[attr-defined]
        before, title, after = inspect.cleandoc(function.__doc__ or "Build the optimizer.\n\nArgs:").partition("Args:")
        listed, blank, rest = after.partition("\n\n")
        words = _descriptions()
        added = "".join(f"\n    {name}: {words[name]}" for name in chosen)
        function.__doc__ = before + title + listed + added + blank + rest
        return function

    return decorate


def _descriptions() -> dict[str, str]:
    """The words on each setting in the docstring of ``StepSettings``."""
    listed = inspect.cleandoc(StepSettings.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.split(r"\n(?=    \w)", "\n" + listed)[1:]
    return {name.strip(): " ".join(text.split()) for name, _, text in (entry.partition(":") for entry in entries)}
