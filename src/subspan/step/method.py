"""``Method``: the parts of a step, which are chosen once for all parameters of an optimizer."""

import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from subspan.parts import Key, Residual, Rule, Selector, Transfer, check_part
from subspan.utils.errors import SettingError


@dataclass(frozen=True)
class Method:
    """The parts of a method and the settings that all parameters share. It holds no state.

    Args:
        selector: chooses the subspace.
        rule: takes the step inside it.
        residual: uses the rest of the gradient.
        transfer: what becomes of the moments at a refresh.
        seed: seed of every random choice. A choice depends only on the seed, the parameter's name and the step.
        stagger: whether the refreshes of different matrices are spread over the period.

    Raises:
        SettingError: a part is none or is not complete, the transfer is unknown, or the parts do not go together.
    """

    selector: Selector
    rule: Rule
    residual: Residual
    transfer: Transfer = "keep"
    seed: int = 0
    stagger: bool = False

    def __post_init__(self) -> None:
        if self.transfer not in typing.get_args(Transfer):
            raise SettingError(
                f"transfer={self.transfer!r}: expected one of {', '.join(typing.get_args(Transfer))}; 'keep' is usual"
            )
        check_part(self.selector, Selector, "selector", "selectors.Importance()")
        check_part(self.rule, Rule, "rule", "rules.AdamW()")
        check_part(self.residual, Residual, "residual", "residuals.Discard()")
        if self.residual.needs_orthonormal and not self.selector.orthonormal:
            raise SettingError(
                f"residual={self.residual!r}: needs an orthonormal basis, and that of {self.selector!r} is not; use "
                "residuals.Discard(), or a selector such as selectors.Random()"
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise SettingError(f"seed={self.seed!r}: expected a whole number")

    @property
    def kinds(self) -> str:
        """The classes of the parts, which a checkpoint must share: moments mean nothing in another method's basis."""
        parts = {"selector": self.selector, "rule": self.rule, "residual": self.residual}
        return ", ".join(f"{what} {_kind(part)}" for what, part in parts.items()) + f", transfer {self.transfer}"

    @property
    def parts(self) -> str:
        """The parts with their settings, in words; a rule's own settings are keys of the parameter groups."""
        return f"{self.selector!r}, {self.residual!r}"

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """Return the rule with the settings of ``group``, which schedulers may change. Raises if one is bad."""
        rule: Any = self.rule
        return replace(rule, **{own.name: group[own.name] for own in fields(rule)})

    def key(self, name: str, clock: int) -> Key:
        """Return what the random choices of a parameter depend on at this time of the schedule."""
        return Key(self.seed, name, clock)


def _kind(part: object) -> str:
    """Name the classes of a part: ``Switch(Dominant, Random)``. Settings may change between runs, classes may not."""
    inner = [_kind(value) for value in vars(part).values() if is_dataclass(value)]
    return type(part).__name__ + (f"({', '.join(inner)})" if inner else "")
