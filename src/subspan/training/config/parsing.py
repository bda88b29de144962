"""What jsonargparse says of a wrong setting, in one line, and the wrong settings that it lets pass."""

import re
from argparse import Action
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from subspan.utils.errors import SettingError

_NAMES = {NoneType: "null", bool: "true or false", dict: "a mapping such as {name: value}"}


def plain_refusal(message: str, actions: Iterable[Action]) -> str | None:
    """Return ``NAME=VALUE: expected WHAT`` for a message of jsonargparse about a value, or ``None`` for any other.

    Args:
        message: the message, which may have several lines.
        actions: those of the parser.
    """
    text = " ".join(message.split())
    names = re.findall(r'Parser key "([^"]+)"', text)
    given = re.search(r".*(?:Given|Got) value: (.*)", text) or re.search(r"Unable to load config '(.*?)'(?: -|$)", text)
    if not names or not given:
        return None
    name, value = names[-1], "null" if given[1] == "None" else given[1]
    kind = next((getattr(action, "_typehint", action.type) for action in actions if action.dest == name), None)
    expected = "a mapping of settings, or a YAML file of one" if kind is None else allowed(kind)
    return f"{name}={value}: expected {expected}"


def allowed(kind: Any) -> str:
    """Return in words what a setting of this type may be.

    >>> allowed(tuple[float, float] | None), allowed(Literal["mean", "owner"]), allowed(list[str])
    ('[float, float] or null', "'mean', 'owner'", 'a list of str')
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return allowed(inner[0])
    if origin is Literal:
        return ", ".join(map(repr, inner))
    if origin is tuple:
        return f"a list of {allowed(inner[0])}" if inner[1:] == (...,) else f"[{', '.join(map(allowed, inner))}]"
    if origin is list:
        return f"a list of {allowed(inner[0])}"
    if origin is dict or is_dataclass(kind):
        return _NAMES[dict]
    if inner:  # a union
        return " or ".join(map(allowed, inner))
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))


def check_given(kind: type, settings: Mapping[str, Any], within: str = "") -> None:
    """Raise for what jsonargparse lets pass: a null without a meaning, and a group of settings that is none.

    Args:
        kind: the class of the settings, a dataclass.
        settings: those that were given, as nested dicts.
        within: the group that they are in, with a dot, for the message.

    Raises:
        SettingError: a setting cannot have its value.
    """
    hints = get_type_hints(kind)
    for name, value in settings.items():
        hint = hints.get(name)
        if is_dataclass(hint) and isinstance(hint, type):
            if not isinstance(value, Mapping):
                shown = "null" if value is None else repr(value)
                raise SettingError(f"{within}{name}={shown}: expected a mapping of settings")
            check_given(hint, value, f"{within}{name}.")
        elif value is None and hint is not None and NoneType not in get_args(hint):
            raise SettingError(f"{within}{name}=null: expected {allowed(hint)}; leave it out for the default")
