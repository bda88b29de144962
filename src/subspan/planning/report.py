"""Plans and comparisons as text, with bars."""

from collections.abc import Mapping
from typing import Any

from subspan.planning.plan import ALWAYS
from subspan.utils.tables import aligned

_WIDTH = 60
_LETTERS = {
    "weights": "W",
    "carriers": "C",
    "states": "S",
    "bases": "B",
    "buffers": "b",
    "communication": "c",
    "passing": ".",
}
_ABOUT = {
    "carriers": "carriers, which stand for weights in the backward pass",
    "communication": "buffers to send",
    "refresh_peak": "choosing a basis",
    "activations": "saved activations",
}


def text(found: Mapping[str, Any]) -> str:
    """Write one plan."""
    method = found["optimizer"] + (", backward-side" if found["backward_side"] else "")
    method += ", bases of their own" if found["share"] == "none" else ""
    method += "" if found["rank"] is None else f", {_ranks(found)}"
    cells = [["GiB", ""]]
    for kind, size in found["bytes"].items():
        if size or kind in ("weights", "gradients", "states", "activations"):
            cells.append([_ABOUT.get(kind, "peak of a step" if kind == "total" else kind), gib(size)])
    peak = "the backward pass" if found["peaks"]["backward"] >= found["peaks"]["step"] else "the optimizer's step"
    lines = [
        _head(found, method),
        aligned(cells),
        f"The peak is in {peak}. Gradients and activations are not all there at once.",
    ]
    lines += [f"Note: {note}." for note in found["notes"]]
    if found["gpu_bytes"] is not None:
        lines.append(_verdict(found))
    return "\n".join([*lines, "Assumptions:", *(f"- {line}" for line in found["assumptions"])])


def _head(found: Mapping[str, Any], method: str) -> str:
    """One line with everything that was set."""
    step = f"{found['batch']} x {found['seq']} tokens"
    step += f", {found['accumulate']} passes a step" if found["accumulate"] > 1 else ""
    step += ", checkpointing" if found["checkpointing"] else ""
    step += ", steps in the backward pass" if found["step_in_backward"] else ""
    each = found["per_rank"]
    step += f"; each of {each['world']} ranks, {each['parallel']}" if each["parallel"] else ""
    return f"{found['model']}, {method}, {found['dtype']}, {step} (*computed*)"


def _ranks(found: Mapping[str, Any]) -> str:
    """The rank, the patterns, and where one of them leaves it open the ranks that the matrices have."""
    rank, pattern = found["rank"], found["rank_pattern"]
    words = f"rank {rank}" + (f", rank_pattern {pattern}" if pattern else "")
    if not found.get("ranks") or (rank >= 1 and not pattern):
        return words
    return f"{words} ({', '.join(f'{own} for {count} matrices' for own, count in found['ranks'].items())})"


def _verdict(found: Mapping[str, Any]) -> str:
    total, budget = found["bytes"]["total"], found["gpu_bytes"]
    answer = "It fits" if found["fits"] else "It does not fit"
    line = f"{answer}: {gib(total)} of {gib(budget)} GiB."
    batch, rank = found["largest_batch"], found["largest_rank"]
    line += f" Largest batch at this rank: {batch or 'none fits'}."
    return line if rank is None else f"{line} Largest rank at this batch: {rank or 'none fits'}."


def gib(size: int) -> str:
    """Bytes as GiB with two decimals, and with more for a small size."""
    small = f"{size / 2**30:.5f}"
    return f"{size / 2**30:.2f}" if size >= 2**30 // 100 or not float(small) else small


def parts_of(row: Mapping[str, Any]) -> dict[str, int]:
    """The parts of the peak: what is always there, and ``passing`` (gradients, activations and temporaries)."""
    there = {kind: row["bytes"][kind] for kind in ALWAYS}
    return there | {"passing": row["bytes"]["total"] - sum(there.values())}


def name_of(row: Mapping[str, Any]) -> str:
    """The name of a method in a table."""
    return row["name"] + (" backward-side" if row["backward_side"] else "")


def comparison(found: Mapping[str, Any]) -> str:
    """Write the table over methods, bars, and what papers report beside the same sum as computed."""
    head = _head(found, _ranks(found))
    kinds = [
        "weights",
        "carriers",
        "gradients",
        "states",
        "bases",
        "activations",
        "refresh_peak",
        "communication",
        "total",
    ]
    cells = [["GiB", *(kind.replace("_", " ") for kind in kinds), *(["fits"] if found["gpu_bytes"] else [])]]
    for row in found["rows"]:
        fits = ["yes" if row["fits"] else "no"] if found["gpu_bytes"] else []
        cells.append([name_of(row), *(gib(row["bytes"][kind]) for kind in kinds), *fits])
    parts = [f"{head}\n{aligned(cells)}", _bars(found["rows"])]
    cells = [["weights and states in bf16, GB", "computed", "reported"]]
    for row in found["rows"]:
        if row["reported_bytes"] is not None:
            cells.append([name_of(row), f"{row['papers_way_bytes'] / 1e9:.2f}", f"{row['reported_bytes'] / 1e9:.2f}"])
    if len(cells) > 1:
        parts.append(f"{aligned(cells)}\nReported: {found['reported']}")
    return "\n\n".join([*parts, "Assumptions:\n" + "\n".join(f"- {line}" for line in found["assumptions"])])


def _bars(rows: list[dict[str, Any]]) -> str:
    widest, longest = max(row["bytes"]["total"] for row in rows), max(len(name_of(row)) for row in rows)
    lines = []
    for row in rows:
        bar, reached = "", 0
        for kind, size in parts_of(row).items():  # ends are rounded, not lengths, so that a bar is as long as its sum
            reached += size
            bar += _LETTERS[kind] * (round(_WIDTH * reached / widest) - len(bar))
        lines.append(f"{name_of(row):{longest}} {bar} {gib(row['bytes']['total'])}")
    legend = ", ".join(
        f"{letter} {'gradients, activations, temporaries' if k == 'passing' else k}" for k, letter in _LETTERS.items()
    )
    return "\n".join([*lines, f"At the peak: {legend}"])
