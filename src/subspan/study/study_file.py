"""The study file says what is compared, on which seeds, and how each learning rate is chosen.

::

    about: one line
    command: pretrain                          # or finetune; pretrain is usual
    base: {model: llama-nano, steps: 1000}     # settings of the command, of every run
    seeds: [0, 1, 2, 3, 4]
    sweep: {seed: 100, factors: [0.5, 1, 2, 4], extend: 2}
    reference: full                            # gaps are to this row
    rows:
      full: {optimizer: adamw}
      galore: {optimizer: galore_adamw}
      sara: {optimizer: sara_adamw, versus: galore}   # the pair that is tested; without it the reference
      rank: {optimizer: sara_adamw, grid: {rank: [4, 8]}}   # two rows, `rank[rank=4]` and `rank[rank=8]`

``factors`` multiply the method's own learning rate, or the ``lr`` of the row. The row takes the best of them on the
sweep's seed, which is no seed of the study. Where the best is at an end of the range, the range grows, at most
``extend`` times. Without ``sweep`` a row keeps its own learning rate.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse

from subspan.study.yaml_lines import Document
from subspan.training.config.kinds import CONFIGS, resolve_run
from subspan.training.config.parsing import check_given, plain_refusal
from subspan.training.config.settings import FinetuneConfig, PretrainConfig, names_without_effect, without_defaults
from subspan.utils.errors import InputError, UserError
from subspan.utils.suggestions import near_names

_KEYS = ("about", "command", "base", "seeds", "sweep", "reference", "rows")
_NOT_COMPUTED = names_without_effect()
"""Settings that are no part of a cell's key, since they do not change what a run computes, except for rounding."""
_AS_GIVEN = ("model", "data", "validation_data", "tokenizer", "precision")
"""Settings whose resolved value depends on the machine."""


@dataclass(frozen=True)
class Sweep:
    """How a learning rate is chosen."""

    seed: int
    """The seed of its runs, which is no seed of the study."""
    factors: tuple[float, ...]
    """Rising factors of the row's learning rate."""
    extend: int = 0
    """How often the range may grow where the best factor is at its end."""


@dataclass(frozen=True)
class Row:
    """A method with its settings."""

    name: str
    config: PretrainConfig | FinetuneConfig
    versus: str | None
    """The row that it is tested against; ``None`` stands for the reference."""
    lr: float
    """The learning rate before any factor of the sweep."""

    @property
    def is_as_published(self) -> bool:
        """Whether it pretrains with no part or factor of the recipe changed, at the period of the preset."""
        changed = without_defaults(asdict(self.config)).keys() & {"optim", "scale", "backward_side", "update_proj_gap"}
        return isinstance(self.config, PretrainConfig) and not changed

    def cell(self, lr: float, seed: int) -> "Cell":
        """Return the run of this row at a learning rate and a seed."""
        return Cell(self.name, replace(self.config, lr=lr, seed=seed))


@dataclass(frozen=True)
class Cell:
    """One run."""

    row: str
    config: PretrainConfig | FinetuneConfig

    @property
    def key(self) -> str:
        """A hash of settings, seed and learning rate, equal for runs of any study that compute the same.

        A setting that a later version adds leaves the keys of old runs as they are.
        """
        settings = asdict(resolve_run(self.config)) | {name: getattr(self.config, name) for name in _AS_GIVEN}
        if (pattern := settings["rank_pattern"]) is not None:  # its order counts, and keys are sorted below
            settings["rank_pattern"] = list(pattern.items())
        if "tokens" in settings["evaluation"]:  # in fine-tuning ``every`` decides which checkpoint is the best
            settings["evaluation"] = {"tokens": settings["evaluation"]["tokens"]}
        kept = without_defaults({key: value for key, value in settings.items() if key not in _NOT_COMPUTED})
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Study:
    """A study file that has been checked."""

    name: str
    about: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    sweep: Sweep | None
    reference: str
    results: Path
    """The file of its records, ``results/NAME.jsonl`` beside the folder of the study file."""


def load_study(path: Path) -> Study:
    """Read and check a study file.

    Raises:
        InputError: it cannot be read, or a key or value in it is wrong; the message names file, line and key.
    """
    document = Document(path, "a study file, such as studies/table1_nano.yaml")
    found = document.value

    def wrong(message: str, *keys: str) -> NoReturn:
        raise InputError(f"{document.place(*keys)}: {message}")

    if not isinstance(found, dict):
        wrong(f"expected keys {', '.join(_KEYS)}")
    for key in found:
        if key not in _KEYS:
            wrong(f"{key!r}: no key of a study; {near_names(str(key), _KEYS)}", str(key))
    rows, base, command = found.get("rows"), found.get("base") or {}, found.get("command", "pretrain")
    if command not in list(CONFIGS):
        wrong(f"command={command!r}: expected {' or '.join(CONFIGS)}", "command")
    if not isinstance(rows, dict) or not rows:
        wrong("rows: expected a mapping of names to settings", "rows")
    if not isinstance(base, dict):
        wrong(f"base={base!r}: expected settings of subspan {command}", "base")
    rows = {str(name): given for name, given in rows.items()}
    for name in ("seed", "lr"):
        if name in base:
            wrong(f"base.{name}: belongs to " + ("seeds" if name == "seed" else "a row, or to the sweep"), "base", name)
    expanded = tuple(row for name, given in rows.items() for row in _rows(document, command, name, given, base, rows))
    names = [row.name for row in expanded]
    for name in names:
        if names.count(name) > 1:
            wrong(
                f"rows.{name}: {names.count(name)} rows have this name; let their grids or names differ",
                "rows",
                name.split("[")[0],
            )
    reference = found.get("reference", names[0])
    if reference not in names:
        wrong(f"reference={reference!r}: no row of this name; {near_names(str(reference), names)}", "reference")
    for row in expanded:
        if row.versus is not None and row.versus not in names:
            message = f"rows.{row.name}.versus={row.versus!r}: no row of this name; {near_names(row.versus, names)}"
            wrong(message, "rows", row.name.split("[")[0], "versus")
    seeds = found.get("seeds")
    if (
        not isinstance(seeds, list)
        or not seeds
        or not all(_whole(seed) for seed in seeds)
        or len(set(seeds)) < len(seeds)
    ):
        wrong(f"seeds={seeds!r}: expected a list of different whole numbers >= 0", "seeds")
    sweep = _sweep(document, found["sweep"], seeds) if found.get("sweep") is not None else None
    folder = path.resolve().parent.parent / "results"
    return Study(
        path.stem, str(found.get("about", "")), expanded, tuple(seeds), sweep, reference, folder / f"{path.stem}.jsonl"
    )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _sweep(document: Document, given: Any, seeds: list[int]) -> Sweep:
    known, where = ("seed", "factors", "extend"), document.place("sweep")
    if not isinstance(given, dict) or not {"seed", "factors"} <= given.keys() <= set(known):
        raise InputError(f"{where}: sweep={given!r}: expected seed, factors and, if wanted, extend")
    seed, factors, extend = given["seed"], given["factors"], given.get("extend", 0)
    if not _whole(seed) or seed in seeds:
        at = document.place("sweep", "seed")
        raise InputError(f"{at}: sweep.seed={seed!r}: expected a whole number >= 0 that is none of seeds={seeds}")
    good = isinstance(factors, list) and all(isinstance(f, int | float) and 0 < f < float("inf") for f in factors)
    if not good or len(factors) < 2 or sorted(set(factors)) != factors:
        raise InputError(
            f"{document.place('sweep', 'factors')}: sweep.factors={factors!r}: expected two or more rising numbers > 0"
        )
    if not _whole(extend):
        raise InputError(f"{document.place('sweep', 'extend')}: sweep.extend={extend!r}: expected a whole number >= 0")
    return Sweep(seed, tuple(map(float, factors)), extend)


def _rows(
    document: Document, command: str, name: str, given: Any, base: Mapping[str, Any], others: Mapping[str, Any]
) -> Iterator[Row]:
    where = f"{document.place('rows', name)}: rows.{name}"
    if not isinstance(given, dict):
        raise InputError(
            f"{where}={given!r}: expected settings of subspan {command}, such as {{optimizer: sara_adamw}}"
        )
    own = dict(given)
    versus, grid = own.pop("versus", None), own.pop("grid", {})
    versus = None if versus is None else str(versus)
    if "seed" in own:
        raise InputError(f"{where}.seed: belongs to seeds")
    is_mapping = isinstance(grid, dict) and all(isinstance(key, str) for key in grid)
    if not is_mapping or not all(isinstance(values, list) and values for values in grid.values()):
        raise InputError(f"{where}.grid={grid!r}: expected a list of values for each setting")
    for point in itertools.product(*grid.values()):
        settings, label = _merged(base, own), ""
        for key, value in zip(grid, point, strict=True):
            settings = _merged(settings, _nested(key, value))
        if grid:
            named = (f"{key.rpartition('.')[2]}={value}" for key, value in zip(grid, point, strict=True))
            label = f"[{','.join(named)}]"
        config = _config(f"{where}{label}", command, settings)
        try:
            lr = resolve_run(config).lr
        except UserError as error:
            raise InputError(f"{where}{label}: {error}") from error
        # It is tested against the same point of the other row's grid, where that row has one.
        other = others.get(versus) if versus is not None else None
        has_grid = isinstance(other, dict) and "grid" in other
        yield Row(name + label, config, f"{versus}{label}" if has_grid else versus, lr)


def _nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the settings of ``over`` in their place; sections are merged."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


class _Parser(jsonargparse.ArgumentParser):
    """A parser that checks the types of settings as the command line does."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(plain_refusal(message, self._actions) or " ".join(message.split())) from ex


def _config(where: str, command: str, settings: Mapping[str, Any]) -> PretrainConfig | FinetuneConfig:
    parser, kind = _Parser(), CONFIGS[command]
    parser.add_class_arguments(kind)
    try:
        check_given(kind, settings)
        return kind(**vars(parser.instantiate(parser.parse_object(dict(settings)))))
    except UserError as error:
        raise InputError(f"{where}: {error}; see subspan {command} --help") from error
