"""The page of a report: jinja2 fills ``page.html`` with tables and figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import subspan
from subspan.study.report import figures
from subspan.study.report.gather import MemoryPart, Parts, RunPart, StudyPart
from subspan.study.reported import SIZES, SOURCE, perplexities
from subspan.study.table import notes, part


def render(parts: Parts, title: str = "subspan report") -> str:
    """Return the whole page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": _number, "of": part}
    return environment.get_template("page.html").render(
        title=title,
        version=subspan.__version__,
        studies=[_study(study) for study in parts.studies],
        overview=figures.run_losses(parts.runs, "losses of the runs") if parts.runs else None,
        runs=[_run(run) for run in parts.runs],
        memory=[_memory(memory) for memory in parts.memory],
        papers=SOURCE,
        sizes=SIZES,
    )


def _number(value: float | None, form: str = ".4f") -> str:
    return "" if value is None else format(value, form)


def _study(study: StudyPart) -> Mapping[str, Any]:
    table, name = study.table, study.table["study"]
    rows = [row | {"reported": perplexities(row["optimizer"], row["as_published"])} for row in table["rows"]]
    compared = any(row["difference"] is not None for row in rows)
    return {
        "table": table | {"rows": rows},
        "notes": notes(table),
        "command": study.command,
        "versions": study.versions,
        "curves": figures.loss_bands(study.curves, f"{name}: validation loss") if study.curves else None,
        "differences": figures.differences(rows, f"{name}: differences") if compared else None,
        "reported": any(value is not None for row in rows for value in row["reported"]),
    }


def _run(run: RunPart) -> Mapping[str, Any]:
    found = run.found
    overlaps = bool(found) and any(layer["overlaps"] for layer in found["layers"])  # type: ignore[index]  # found is not None
    return {
        "path": run.path,
        "optimizer": run.config.get("optimizer"),
        "seed": run.config.get("seed"),
        "command": run.command,
        "made_by": run.made_by,
        "validation": run.validation[-1][1] if run.validation else None,
        "types": found["types"] if found else {},
        "overlaps": figures.overlap_map(found["layers"], f"{run.path}: overlap") if found and overlaps else None,
        "spectra": figures.spectra(found["update"], f"{run.path}: spectra") if found and "update" in found else None,
        "change": found.get("update") if found else None,
    }


def _memory(memory: MemoryPart) -> Mapping[str, Any]:
    return {
        "rows": memory.rows,
        "command": memory.command,
        "made_by": memory.made_by,
        "bars": figures.memory_bars(memory, "memory of a step"),
    }
