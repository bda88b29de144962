"""The table of a study: its rows, compared over the seeds.

    gap            mean over seeds of row - reference
    gap_reduction  (versus - row) / (versus - reference), with Fieller's interval: the share that a row closes of the
                   gap of the row it is paired with
    difference     mean over seeds of row - versus, with its interval, paired t-test, Wilcoxon, and p adjusted by Holm
                   over the pairs of the table

Runs that are missing or diverged are counted and shown. A diverged run takes part in no mean, and its row says so.
Where two rows do not have the same seeds, they are compared over the seeds that both have, which is marked
``(3 of 5)``.
"""

import json
import statistics as stdlib
from collections.abc import Mapping
from typing import Any

from subspan.study.missing_runs import choose_lr
from subspan.study.records import Record, read_records
from subspan.study.statistics import compare_pairs, holm, interval, share_interval
from subspan.study.study_file import Row, Study
from subspan.training.scores import SCORES
from subspan.utils.errors import InputError
from subspan.utils.tables import aligned

Table = dict[str, Any]


def compare(study: Study, metric: str = "val_loss") -> Table:
    """Return the table, in primitives as JSON has them.

    Args:
        study: the study, whose records are read.
        metric: ``val_loss``, ``val_ppl``, or a score of fine-tuning. A higher score is better.

    Raises:
        InputError: runs of the study have no such measurement.
    """
    records = read_records(study.results)
    values = {row.name: _values(study, row, records, metric) for row in study.rows}
    reference = values[study.reference]
    rows = [_row(study, row, records, values, reference, metric) for row in study.rows]
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


def _values(study: Study, row: Row, records: Mapping[str, Record], metric: str) -> dict[int, float]:
    """Return the measurement for each seed whose run finished."""
    return {
        seed: _measured(record, metric, study)
        for seed in study.seeds
        if (record := _record(study, row, records, seed)) and record["status"] == "finished"
    }


def _measured(record: Record, metric: str, study: Study) -> float:
    if record.get(metric) is None:
        known = [name for name in ("val_loss", "val_ppl", *SCORES) if record.get(name) is not None]
        raise InputError(
            f"metric={metric!r}: the runs of {study.name} were not measured by it; they have {', '.join(known)}"
        )
    return record[metric]


def _record(study: Study, row: Row, records: Mapping[str, Record], seed: int) -> Record | None:
    lr = choose_lr(study, row, records).lr
    return None if lr is None else records.get(row.cell(lr, seed).key)


def _row(
    study: Study,
    row: Row,
    records: Mapping[str, Record],
    values: Mapping[str, Mapping[int, float]],
    reference: Mapping[int, float],
    metric: str,
) -> dict[str, Any]:
    own = values[row.name]
    choice = choose_lr(study, row, records)
    runs = [record for seed in study.seeds if (record := _record(study, row, records, seed))]
    versus = row.versus if row.versus is not None else study.reference if row.name != study.reference else None
    other = values[versus] if versus else {}
    shared = [seed for seed in own if seed in other]
    pair = compare_pairs([own[seed] for seed in shared], [other[seed] for seed in shared]) if shared else None
    low, high = interval(list(own.values()))
    commits = [str(record.get("commit")) for record in runs]
    seconds = [record["seconds"] for record in runs if record.get("seconds")]
    closes, closes_interval = None, None
    if versus is not None and versus != study.reference:
        closes, closes_interval = _reduction(own, other, reference, 1 if metric in SCORES else -1)
    return {
        "name": row.name,
        "optimizer": row.config.optimizer,
        "as_published": row.is_as_published,
        "lr": choice.lr,
        "lr_at_edge": choice.at_edge,
        "n": len(own),
        "missing": len(study.seeds) - len(runs),
        "diverged": sum(record["status"] == "diverged" for record in runs),
        "mean": stdlib.mean(own.values()) if own else None,
        "std": stdlib.stdev(own.values()) if len(own) > 1 else None,
        "low": low,
        "high": high,
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
        "state_bytes": next((record["state_bytes"] for record in runs if record.get("state_bytes")), None),
        "saved_activation_bytes": _mean_of(runs, "saved_activation_bytes"),
        "precisions": sorted({record.get("precision", "a precision not recorded") for record in runs}),
        "commits": sorted(set(commits)),
        "uncommitted": sum(commit.endswith("-dirty") for commit in commits),
        "seconds": stdlib.median(seconds) if seconds else None,
    }


def _mean_difference(a: Mapping[int, float], b: Mapping[int, float]) -> float | None:
    shared = a.keys() & b.keys()
    return stdlib.mean(a[seed] - b[seed] for seed in shared) if shared else None


def _mean_of(runs: list[Record], key: str) -> int | None:
    """Return the mean over the runs that counted ``key``, which differs from seed to seed as the batches do."""
    counted = [record[key] for record in runs if record.get(key)]
    return round(stdlib.mean(counted)) if counted else None


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
    "n",
    "mean (std)",
    "gap",
    "closes [95 %]",
    "versus",
    "difference [95 %]",
    "p",
    "p Holm",
    "state",
)
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
        number(row["lr"], ".3g") + ("*" if row["lr_at_edge"] else ""),
        n,
        number(row["mean"]) + ("" if row["std"] is None else f" ({row['std']:.4f})"),
        number(row["gap"], "+.4f") + part(row["gap_pairs"], row["n"]),
        number(row["gap_reduction"], ".0%") + share,
        row["versus"] or "",
        number(row["difference"], "+.4f") + reach + part(row["pairs"], row["n"]),
        number(row["p_value"], ".2g"),
        number(row["p_holm"], ".2g"),
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


def as_text(table: Table) -> str:
    """Return the table as text for a terminal."""
    head = f"{table['study']}: {table['metric']}, gaps to {table['reference']}"
    return "\n".join([head, aligned(_lines(table), numbers=False), *notes(table)])


def notes(table: Table) -> list[str]:
    """Return what a reader of the table must know."""
    found = []
    if any(row["lr_at_edge"] for row in table["rows"]):
        found.append("* the best learning rate is at an end of those tried")
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
