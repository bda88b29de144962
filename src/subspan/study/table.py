"""The table of a study: its rows, compared over the seeds.

    gap            mean over seeds of row - reference
    gap_reduction  (versus - row) / (versus - reference), with Fieller's interval: the share that a row closes of the
                   gap of the row it is paired with
    difference     mean over seeds of row - versus, with its interval, paired t-test, Wilcoxon, and p adjusted by Holm
                   over the pairs of the table

Runs that are missing or diverged are counted and shown. A diverged run takes part in no mean, and its row says so.
Where two rows do not have the same seeds, they are compared over the seeds that both have, which is marked
``(3 of 5)``.

    lr             learning rate that was chosen; matrices move at ``lr_matrices = lr * scale``
    lr_full        learning rate of embeddings, head, norms and biases
    choice         what the choice of the settings may have cost (``choice_cost``); see ``subspan.study.choice``
    tokens         the share of its own tokens after which a row's validation loss is that at which the reference ends,
                   between two evaluations on a straight line; the mean over the seeds that get there
"""

import json
import statistics as stdlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from subspan.study.choice import Choice, choose
from subspan.study.records import Record, is_of_committed_code, read_records
from subspan.study.statistics import compare_pairs, holm, interval, share_interval
from subspan.study.study_file import Row, Study
from subspan.study.sweep import chosen_of
from subspan.training.config.kinds import resolve_run
from subspan.training.scores import SCORES
from subspan.utils.errors import InputError
from subspan.utils.tables import aligned

Table = dict[str, Any]


@dataclass(frozen=True)
class Runs:
    """A row with the settings that were chosen for it, and the records of its seeds."""

    row: Row
    choice: Choice
    by_seed: Mapping[int, Record]

    @property
    def finished(self) -> dict[int, Record]:
        return {seed: record for seed, record in self.by_seed.items() if record["status"] == "finished"}


def runs_of(study: Study) -> dict[str, Runs]:
    """Read the records of a study, and return those of the seeds of each row, by its name."""
    records = read_records(study.results)
    found = {}
    for row in study.rows:
        choice, own = choose(study, row, records), {}
        if choice.config is not None:
            keys = {seed: row.cell(choice.config, seed).key for seed in study.seeds}
            own = {seed: records[key] for seed, key in keys.items() if key in records}
        found[row.name] = Runs(row, choice, own)
    return found


def compare(study: Study, metric: str | None = None, runs: Mapping[str, Runs] | None = None) -> Table:
    """Return the table, in primitives as JSON has them.

    Args:
        study: the study.
        metric: ``test_loss``, ``val_loss``, ``val_ppl``, or a score of fine-tuning. A higher score is better. The
            default is ``test_loss``, or ``val_loss`` where a run has no test text.
        runs: those of ``runs_of``, if they are read already.

    Raises:
        InputError: runs of the study have no such measurement.
    """
    runs = runs_of(study) if runs is None else runs
    if metric is None:
        every = [record for own in runs.values() for record in own.finished.values()]
        metric = "test_loss" if all(record.get("test_loss") is not None for record in every) else "val_loss"
    values = {
        name: {seed: _measured(record, metric, study) for seed, record in own.finished.items()}
        for name, own in runs.items()
    }
    rows = [_row(study, own, runs[study.reference], values, metric) for own in runs.values()]
    tested = [row for row in rows if row["p_value"] is not None]
    for row, adjusted in zip(tested, holm([row["p_value"] for row in tested]), strict=True):
        row["p_holm"] = adjusted
    return {
        "study": study.name,
        "about": study.about,
        "metric": metric,
        "seeds": list(study.seeds),
        "reference": study.reference,
        "pairs": len(tested),
        "precisions": sorted({precision for row in rows for precision in row["precisions"]}),
        "commits": sorted({commit for row in rows for commit in row["commits"]}),
        "uncommitted": sum(row["uncommitted"] for row in rows),
        "runs": sum(row["n"] + row["diverged"] for row in rows),
        "rows": rows,
    }


def _measured(record: Record, metric: str, study: Study) -> float:
    if record.get(metric) is None:
        known = [name for name in ("test_loss", "val_loss", "val_ppl", *SCORES) if record.get(name) is not None]
        raise InputError(
            f"metric={metric!r}: the runs of {study.name} were not measured by it; they have {', '.join(known)}"
        )
    return record[metric]


def _row(
    study: Study, runs: Runs, reference_runs: Runs, values: Mapping[str, Mapping[int, float]], metric: str
) -> dict[str, Any]:
    row, choice, records = runs.row, runs.choice, list(runs.by_seed.values())
    own, reference = values[row.name], values[study.reference]
    versus = row.versus if row.versus is not None else study.reference if row.name != study.reference else None
    other = values[versus] if versus else {}
    shared = [seed for seed in own if seed in other]
    pair = compare_pairs([own[seed] for seed in shared], [other[seed] for seed in shared]) if shared else None
    low, high = interval(list(own.values()))
    seconds = [record["seconds"] for record in records if record.get("seconds")]
    closes, closes_interval = None, None
    if versus is not None and versus != study.reference:
        closes, closes_interval = _reduction(own, other, reference, 1 if metric in SCORES else -1)
    return {
        "name": row.name,
        "optimizer": row.config.optimizer,
        "as_published": row.is_as_published,
        **_settings(row, choice),
        "sweep_runs": len(choice.cells),
        "choice_cost": choice.cost,
        "n": len(own),
        "missing": len(study.seeds) - len(records),
        "diverged": sum(record["status"] == "diverged" for record in records),
        "mean": stdlib.mean(own.values()) if own else None,
        "std": stdlib.stdev(own.values()) if len(own) > 1 else None,
        "low": low,
        "high": high,
        "test_loss": _mean_of(runs, "test_loss"),
        "val_loss": _mean_of(runs, "val_loss"),
        "gap": _mean_difference(own, reference),
        "gap_pairs": len(own.keys() & reference.keys()),
        "versus": versus,
        "gap_reduction": closes,
        "gap_reduction_low": closes_interval and closes_interval[0],
        "gap_reduction_high": closes_interval and closes_interval[1],
        "pairs": len(shared),
        "difference": pair.difference if pair else None,
        "difference_low": pair.low if pair else None,
        "difference_high": pair.high if pair else None,
        "bootstrap_low": pair.bootstrap[0] if pair and pair.bootstrap else None,
        "bootstrap_high": pair.bootstrap[1] if pair and pair.bootstrap else None,
        "p_value": pair.p_value if pair else None,
        "p_wilcoxon": pair.p_wilcoxon if pair else None,
        "p_holm": None,
        **_tokens(runs, reference_runs),
        "state_bytes": next((record["state_bytes"] for record in records if record.get("state_bytes")), None),
        "saved_activation_bytes": None if (saved := _mean_of(runs, "saved_activation_bytes")) is None else round(saved),
        "precisions": sorted({record.get("precision", "a precision not recorded") for record in records}),
        "commits": sorted({str(record.get("commit")) for record in records}),
        "uncommitted": sum(not is_of_committed_code(record) for record in records),
        "seconds": stdlib.median(seconds) if seconds else None,
    }


def _settings(row: Row, choice: Choice) -> dict[str, Any]:
    """Return the rates that a row moves at, and the settings that its sweep has chosen."""
    names = ("lr", "lr_matrices", "lr_full", "lr_at_edge", "at_edge", "chosen")
    if choice.config is None:
        return dict.fromkeys(names)
    resolved = resolve_run(choice.config)
    lr_full = resolved.optim.lr_full
    values = (
        resolved.lr,
        resolved.lr * (1.0 if resolved.scale is None else resolved.scale),
        resolved.lr if lr_full is None else lr_full,
        "lr" in choice.at_edge,
        list(choice.at_edge),
        chosen_of(asdict(choice.config), row.stages),
    )
    return dict(zip(names, values, strict=True))


def _tokens(runs: Runs, reference: Runs) -> dict[str, Any]:
    """Return the tokens that a row has read when its validation loss is that at which the reference ends."""
    reached = {}
    for seed, record in runs.finished.items():
        target = reference.finished.get(seed)
        if target is not None and (tokens := tokens_at(curve_of(record), target["val_loss"])) is not None:
            reached[seed] = tokens
    pairs = len(runs.finished.keys() & reference.finished.keys())
    return {
        "tokens_to_reference": stdlib.mean(reached.values()) if reached else None,
        "tokens_share": stdlib.mean(reached[seed] / runs.finished[seed]["tokens"] for seed in reached)
        if reached
        else None,
        "tokens_reached": len(reached),
        "tokens_pairs": pairs,
    }


def curve_of(record: Record) -> list[tuple[float, float]]:
    """Return the validation loss of a run over the tokens it has read."""
    return [(record["tokens"] * step / record["steps"], loss) for step, loss in record.get("curve", [])]


def tokens_at(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Return the tokens after which a curve is at ``loss`` or below for the first time, if it ever is.

    Between two points the curve is a straight line.
    """
    before: tuple[float, float] | None = None
    for point in curve:
        if point[1] <= loss + 5e-6:  # a curve is kept to five digits
            if before is None or before[1] <= point[1]:
                return point[0]
            part = (before[1] - loss) / (before[1] - point[1])
            return before[0] + min(1.0, part) * (point[0] - before[0])
        before = point
    return None


def _mean_difference(a: Mapping[int, float], b: Mapping[int, float]) -> float | None:
    shared = a.keys() & b.keys()
    return stdlib.mean(a[seed] - b[seed] for seed in shared) if shared else None


def _mean_of(runs: Runs, key: str) -> float | None:
    """Return the mean over the runs that measured ``key``."""
    counted = [record[key] for record in runs.finished.values() if record.get(key) is not None]
    return stdlib.mean(counted) if counted else None


def _reduction(
    own: Mapping[int, float], other: Mapping[int, float], reference: Mapping[int, float], better: int
) -> tuple[float, tuple[float, float] | None] | tuple[None, None]:
    """Return the share of the gap that is closed, and its interval; ``None`` where the other row has no gap.

    ``better`` is the sign of a change for the better.
    """
    shared = own.keys() & other.keys() & reference.keys()
    closed = [better * (own[seed] - other[seed]) for seed in sorted(shared)]
    gap = [better * (reference[seed] - other[seed]) for seed in sorted(shared)]
    return (sum(closed) / sum(gap), share_interval(closed, gap)) if sum(gap) > 0 else (None, None)


def as_json(table: Table) -> str:
    """Return the table as one document of JSON."""
    return json.dumps(table, indent=1)


_COLUMNS = (
    "name",
    "lr",
    "matrices",
    "rest",
    "n",
    "mean (std)",
    "gap",
    "closes [95 %]",
    "versus",
    "difference [95 %]",
    "p",
    "p Holm",
    "choice",
    "tokens",
    "state",
)
_SHORT = ("name", "matrices", "rest", "mean (std)", "gap", "difference [95 %]", "p Holm", "state")
_OF_FINETUNING = "saved"
"""The column of bytes saved for the backward pass."""


def part(pairs: int, n: int) -> str:
    """Return a mark if only ``pairs`` of the ``n`` seeds of a row have something to be compared with."""
    return f" ({pairs} of {n})" if 0 < pairs < n else ""


def _cells(row: Mapping[str, Any]) -> list[str]:
    def number(value: float | None, form: str = ".4f") -> str:
        return "" if value is None else format(value, form)

    n = str(row["n"])
    if row["missing"] or row["diverged"]:
        lost = [f"{row[what]} {what}" for what in ("missing", "diverged") if row[what]]
        n += f" ({', '.join(lost)})"
    share = (
        ""
        if row["gap_reduction_low"] is None
        else f" [{row['gap_reduction_low']:.0%}, {row['gap_reduction_high']:.0%}]"
    )
    reach = "" if row["difference_low"] is None else f" [{row['difference_low']:+.4f}, {row['difference_high']:+.4f}]"
    return [
        row["name"],
        number(row["lr"], ".3g") + ("*" if row["at_edge"] else ""),
        number(row["lr_matrices"], ".3g"),
        number(row["lr_full"], ".3g"),
        n,
        number(row["mean"]) + ("" if row["std"] is None else f" ({row['std']:.4f})"),
        number(row["gap"], "+.4f") + part(row["gap_pairs"], row["n"]),
        number(row["gap_reduction"], ".0%") + share,
        row["versus"] or "",
        number(row["difference"], "+.4f") + reach + part(row["pairs"], row["n"]),
        number(row["p_value"], ".2g"),
        number(row["p_holm"], ".2g"),
        number(row["choice_cost"], ".4f"),
        number(row["tokens_share"], ".0%") + part(row["tokens_reached"], row["tokens_pairs"]),
        number(row["state_bytes"], ",d"),
    ]


def _lines(table: Table) -> list[list[str]]:
    """Return the names of the columns, then a line for each row."""
    rows = table["rows"]
    lines = [list(_COLUMNS), *map(_cells, rows)]
    if any(row["saved_activation_bytes"] for row in rows):
        lines[0].append(_OF_FINETUNING)
        for line, row in zip(lines[1:], rows, strict=True):
            line.append("" if (saved := row["saved_activation_bytes"]) is None else f"{saved:,d}")
    return lines


def as_text(table: Table, short: bool = False) -> str:
    """Return the table as text for a terminal; a ``short`` one has only the columns that answer the question."""
    head = f"{table['study']}: {table['metric']}, gaps to {table['reference']}"
    lines = _lines(table)
    if short:
        kept = [place for place, column in enumerate(lines[0]) if column in _SHORT]
        lines = [[line[place] for place in kept] for line in lines]
    return "\n".join([head, aligned(lines, numbers=False), *notes(table)])


def notes(table: Table) -> list[str]:
    """Return what a reader of the table must know."""
    found = []
    if any(row["at_edge"] for row in table["rows"]):
        edges = [f"{row['name']} ({', '.join(row['at_edge'])})" for row in table["rows"] if row["at_edge"]]
        found.append(f"* the best value is at an end of those tried: {'; '.join(edges)}")
    if len(table["precisions"]) > 1:
        found.append(f"! computed in {' and in '.join(table['precisions'])}: differences may be those of precision")
    if table["uncommitted"]:
        found.append(
            f"! {table['uncommitted']} of {table['runs']} runs were computed by code with changes that are in no commit"
        )
    return found


def as_latex(table: Table) -> str:
    """Return the table as a ``tabular``."""

    def escaped(cell: str) -> str:
        return cell.replace("_", r"\_").replace("%", r"\%")

    cells = _lines(table)
    lines = [" & ".join(map(escaped, line)) + r" \\" for line in cells]
    return "\n".join(
        [
            r"\begin{tabular}{" + "l" * len(cells[0]) + "}",
            r"\hline",
            lines[0],
            r"\hline",
            *lines[1:],
            r"\hline",
            r"\end{tabular}",
            *(f"% {note}" for note in notes(table)),
        ]
    )
