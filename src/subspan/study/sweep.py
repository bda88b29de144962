"""How the settings of a row are chosen: in stages, one setting after the other, on seeds that are not reported.

::

    sweep:
      seeds: [100, 101, 102]
      within: 0.02
      stages:
        - {lr: [1, 2, 4], extend: 2}               # factors of the learning rate so far, at first of the row's own
        - {optim.lr_full: [0.5, 1, 2], extend: 2}  # factors of the learning rate that was chosen
        - {optim.betas: [[0.9, 0.99], [0.9, 0.999]]}
        - {weight_decay: [0.0, 0.1]}

Every value of a stage is run with the first seed. Those whose validation loss is at most ``within`` above the lowest
are run with the other seeds too, and the lowest mean wins. Where the best of a list of factors is at its end, the list
grows by the ratio of its last two, at most ``extend`` times. The winner stays for the stages that follow.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeGuard, TypeVar

from subspan.study.yaml_lines import Document
from subspan.training.config.settings import FinetuneConfig, PretrainConfig
from subspan.utils.errors import InputError
from subspan.utils.suggestions import near_names

C = TypeVar("C", bound=PretrainConfig | FinetuneConfig)
FACTORS = ("lr", "optim.lr_full")
"""Settings whose values in a stage are factors of the learning rate."""


@dataclass(frozen=True)
class Stage:
    """The choice of one setting."""

    setting: str
    """The name of the setting, with dots."""
    values: tuple[Any, ...]
    """Its values, or rising factors of the learning rate."""
    extend: int = 0
    """How often a list of factors may grow where the best is at its end."""

    @property
    def is_factor(self) -> bool:
        """Whether the values are factors of the learning rate."""
        return self.setting in FACTORS

    def apply(self, config: C, value: Any) -> C:
        """Return ``config`` with a value of this stage in its place; its ``lr`` is a number."""
        return with_setting(config, self.setting, config.lr * value if self.is_factor else value)


@dataclass(frozen=True)
class Sweep:
    """How the settings of every row are chosen."""

    seeds: tuple[int, ...]
    """The seeds of its runs, which are no seeds of the study."""
    stages: tuple[Stage, ...]
    """The stages, in their order."""
    within: float = 0.0
    """How far above the lowest loss of the first seed a value may be, to be run with the other seeds too."""


def with_setting(config: C, name: str, value: Any) -> C:
    """Return ``config`` with the setting ``name``, which may have dots, in place of its own."""
    first, _, rest = name.partition(".")
    return replace(config, **{first: with_setting(getattr(config, first), rest, value) if rest else value})


def read_sweep(document: Document, given: Any, seeds: list[int], kind: type) -> Sweep:
    """Check what a study file says of its sweep.

    Args:
        document: the study file.
        given: the value of its key ``sweep``.
        seeds: the seeds of the study.
        kind: the class of the settings of its runs.

    Raises:
        InputError: a key or a value is wrong; the message names file, line and key.
    """
    if not isinstance(given, dict) or not {"seeds", "stages"} <= given.keys() <= {"seeds", "stages", "within"}:
        raise InputError(
            f"{document.place('sweep')}: sweep={given!r}: expected seeds, stages and, if wanted, within, such as "
            "{seeds: [100, 101, 102], within: 0.02, stages: [{lr: [1, 2, 4], extend: 2}]}"
        )
    own, within, stages = given["seeds"], given.get("within", 0.0), given["stages"]
    if not are_seeds(own) or set(own) & set(seeds):
        raise InputError(
            f"{document.place('sweep', 'seeds')}: sweep.seeds={own!r}: expected a list of different whole numbers >= 0, "
            f"none of which is among seeds={seeds}"
        )
    if isinstance(within, bool) or not isinstance(within, int | float) or not 0 <= within < math.inf:
        raise InputError(f"{document.place('sweep', 'within')}: sweep.within={within!r}: expected a loss >= 0")
    if not isinstance(stages, list) or not stages:
        raise InputError(
            f"{document.place('sweep', 'stages')}: sweep.stages={stages!r}: expected a list, such as [{{lr: [1, 2, 4]}}]"
        )
    return Sweep(tuple(own), tuple(_stage(document, stage, kind) for stage in stages), float(within))


def stages_of(sweep: Sweep | None, names: Any, where: str) -> tuple[Stage, ...]:
    """Return the stages that a row takes: those that it names, or all.

    Raises:
        InputError: a name is that of no stage.
    """
    if names is None:
        return sweep.stages if sweep else ()
    known = [stage.setting for stage in sweep.stages] if sweep else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}.sweep={names!r}: expected a list of settings that have a stage: {', '.join(known)}")
    for name in names:
        if name not in known:
            raise InputError(f"{where}.sweep: {name!r} has no stage in the sweep; {near_names(name, known)}")
    return tuple(stage for stage in sweep.stages if stage.setting in names) if sweep else ()


def _stage(document: Document, given: Any, kind: type) -> Stage:
    where = f"{document.place('sweep', 'stages')}: sweep.stages: {given!r}"
    settings = [key for key in given if key != "extend"] if isinstance(given, dict) else []
    if len(settings) != 1:
        raise InputError(f"{where}: expected one setting with its values and, if wanted, extend")
    (name,), extend = settings, given.get("extend", 0)
    known = list(_names(kind()))
    if name not in known:
        raise InputError(f"{where}: {name!r} is no setting; {near_names(str(name), known)}")
    values = given[name]
    if not isinstance(values, list) or len(values) < 2:
        raise InputError(f"{where}: expected two or more values")
    if not isinstance(extend, int) or isinstance(extend, bool) or extend < 0 or (extend and name not in FACTORS):
        raise InputError(f"{where}: extend={extend!r}: expected a whole number >= 0, for {' or '.join(FACTORS)} only")
    if name in FACTORS:
        good = all(isinstance(f, int | float) and not isinstance(f, bool) and 0 < f < math.inf for f in values)
        if not good or sorted(set(values)) != values:
            raise InputError(f"{where}: expected two or more rising numbers > 0, which are factors")
        values = [float(f) for f in values]
    return Stage(name, tuple(values), extend)


def _names(settings: Any, before: str = "") -> Iterator[str]:
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            yield from _names(value, f"{before}{field.name}.")
        else:
            yield before + field.name


def are_seeds(given: Any) -> TypeGuard[list[int]]:
    """Whether ``given`` is a list of different whole numbers >= 0."""
    is_list = isinstance(given, list) and len(given) > 0
    return is_list and all(type(seed) is int and seed >= 0 for seed in given) and len(set(given)) == len(given)


def chosen_of(config: Mapping[str, Any], stages: tuple[Stage, ...]) -> dict[str, Any]:
    """Return the settings that ``stages`` choose, as they are in ``config``, a nested dict."""
    found = {}
    for stage in stages:
        value: Any = config
        for name in stage.setting.split("."):
            value = value[name]
        found[stage.setting] = value
    return found
