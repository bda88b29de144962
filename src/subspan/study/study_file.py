"""The study file says what is compared, on which seeds, and how each learning rate is chosen.

::

    about: one line
    command: pretrain                          # or finetune; pretrain is usual
    base: {model: llama-nano, steps: 1000}     # settings of the command, of every run
    seeds: [0, 1, 2, 3, 4]
    sweep:                                     # how the settings of each row are chosen; see subspan.study.sweep
      seeds: [100, 101, 102]
      within: 0.02
      stages:
        - {lr: [0.5, 1, 2, 4], extend: 2}
        - {optim.lr_full: [0.5, 1, 2], extend: 2}
    reference: full                            # gaps are to this row
    hashes: {data/news.jsonl: 3f2a...}         # contents that a table needs not read again
    rows:
      full: {optimizer: adamw}
      galore: {optimizer: galore_adamw}
      sara: {optimizer: sara_adamw, versus: galore}   # the pair that is tested; without it the reference
      rank: {optimizer: sara_adamw, grid: {rank: [4, 8]}}   # two rows, `rank[rank=4]` and `rank[rank=8]`
      fixed: {optimizer: sara_adamw, lr: 0.01, sweep: []}   # a row that takes no stage, or only those that it names

Without ``sweep`` a row keeps its own settings.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse

from subspan.study.meaning import key_of, meaning_of
from subspan.study.sweep import Stage, Sweep, are_seeds, read_sweep, stages_of
from subspan.study.yaml_lines import Document
from subspan.training.config.kinds import CONFIGS, resolve_run
from subspan.training.config.parsing import check_given, plain_refusal
from subspan.training.config.settings import FinetuneConfig, PretrainConfig, without_defaults
from subspan.utils.errors import InputError, UserError
from subspan.utils.suggestions import near_names

_KEYS = ("about", "command", "base", "seeds", "sweep", "reference", "hashes", "rows")


@dataclass(frozen=True)
class Row:
    """A method with its settings."""

    name: str
    config: PretrainConfig | FinetuneConfig
    versus: str | None
    """The row that it is tested against; ``None`` stands for the reference."""
    lr: float
    """The learning rate before the sweep."""
    stages: tuple[Stage, ...] = ()
    """The stages of the sweep that it takes."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """The hashes that the study file commits to."""

    @property
    def is_as_published(self) -> bool:
        """Whether it pretrains with no part or factor of the recipe changed, at the period of the preset."""
        changed = without_defaults(asdict(self.config)).keys() & {"optim", "scale", "backward_side", "update_proj_gap"}
        return isinstance(self.config, PretrainConfig) and not changed

    def cell(self, config: PretrainConfig | FinetuneConfig, seed: int) -> "Cell":
        """Return the run of this row with some settings and a seed."""
        return Cell(self.name, replace(config, seed=seed), self.hashes)


@dataclass(frozen=True)
class Cell:
    """One run."""

    row: str
    config: PretrainConfig | FinetuneConfig
    hashes: Mapping[str, str] = field(default_factory=dict)
    """The hashes that the study file commits to."""

    @functools.cached_property
    def key(self) -> str:
        """A hash of the meaning of the run, equal for runs of any study that compute the same."""
        return key_of(meaning_of(self.config, self.hashes))


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
    seeds = found.get("seeds")
    if not are_seeds(seeds):
        wrong(f"seeds={seeds!r}: expected a list of different whole numbers >= 0", "seeds")
    given = found.get("sweep")
    sweep = None if given is None else read_sweep(document, given, seeds, CONFIGS[command])
    hashes = found.get("hashes") or {}
    if not isinstance(hashes, dict) or not all(isinstance(h, str) for pair in hashes.items() for h in pair):
        wrong(f"hashes={hashes!r}: expected names of files as the settings give them, with their hashes", "hashes")
    expanded = tuple(
        replace(row, hashes=hashes)
        for name, given in rows.items()
        for row in _rows(document, command, name, given, base, rows, sweep)
    )
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
    folder = path.resolve().parent.parent / "results"
    return Study(
        path.stem, str(found.get("about", "")), expanded, tuple(seeds), sweep, reference, folder / f"{path.stem}.jsonl"
    )


def with_rows(study: Study, names: list[str]) -> Study:
    """Return the study with only the rows of these names; those of a grid have one name in front of the bracket.

    Raises:
        InputError: there is no row of a name; or the reference, or a row that another is tested against, is left out.
    """
    known = [row.name for row in study.rows]
    for name in names:
        if name not in known and name not in [row.partition("[")[0] for row in known]:
            raise InputError(f"rows={name!r}: no row of {study.name}; {near_names(name, known)}")
    kept = tuple(row for row in study.rows if row.name in names or row.name.partition("[")[0] in names)
    left = {row.name for row in kept}
    for needed in (study.reference, *(row.versus for row in kept if row.versus)):
        if needed not in left:
            raise InputError(f"rows={','.join(names)!r}: others are compared with {needed!r}; add it")
    return replace(study, rows=kept)


def _rows(
    document: Document,
    command: str,
    name: str,
    given: Any,
    base: Mapping[str, Any],
    others: Mapping[str, Any],
    sweep: Sweep | None,
) -> Iterator[Row]:
    where = f"{document.place('rows', name)}: rows.{name}"
    if not isinstance(given, dict):
        raise InputError(
            f"{where}={given!r}: expected settings of subspan {command}, such as {{optimizer: sara_adamw}}"
        )
    own = dict(given)
    versus, grid = own.pop("versus", None), own.pop("grid", {})
    stages = stages_of(sweep, own.pop("sweep", None), where)
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
        yield Row(name + label, config, f"{versus}{label}" if has_grid else versus, lr, stages)


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
