"""The inspection of a run: what its subspaces did, from its ``probes.jsonl`` and its checkpoints.

For each subspace it gives means over the refreshes of the run: the overlap of adjacent bases and the overlap with the
anchor, principal angles, and the share of the gradient that is held (see ``training/monitor/probes.py``).
``frozen_since`` is the first step from which the overlap of adjacent bases stays at ``FROZEN`` or above until the end,
for at least three refreshes. It is ``null`` if there is no such step.

Without probes the bases in the checkpoints are compared, each of them once. ``steps_apart`` is the median number of
steps between them. It may be several periods, and then ``overlap_adjacent`` is not of neighbours.

Between two checkpoints it gives the singular values sigma of the change of each weight, divided by the largest (SARA,
arXiv 2502.05790, figures 4 to 12), and two numbers that follow from them:

    effective rank = exp(-sum p_i log p_i),  p_i = sigma_i / sum sigma      (Roy and Vetterli 2007)
    stable rank    = sum sigma_i² / sigma_1²
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from subspan.checkpoints.directory import holds_shards, list_checkpoints, load_part, step_of
from subspan.inspection import angles, overlap
from subspan.linalg import orthonormalise
from subspan.study.records import parse_line
from subspan.utils.errors import InputError, first_line
from subspan.utils.tables import aligned


class NothingToSeeError(InputError):
    """The run is sound, but nothing of it can be compared."""


FROZEN = 0.9
_LEAST = 3
Row = dict[str, Any]


def inspect(run: Path, begin: int | None = None, end: int | None = None) -> dict[str, Any]:
    """Return the findings, in primitives as JSON has them.

    Args:
        run: the directory of a run.
        begin, end: steps of two of its checkpoints; ``None`` stands for the first and the last that are there.

    Raises:
        NothingToSeeError: the run has neither probes nor two checkpoints that can be compared.
        InputError: the directory holds no run, or a line of it is broken; the message names the file.
    """
    if not (run / "config.yaml").exists():
        raise InputError(f"run={str(run)!r}: holds no run; give a directory that subspan pretrain has written to")
    rows = _read(run / "probes.jsonl")
    found = list_checkpoints(run / "checkpoints")
    asked = begin is not None or end is not None
    pair = (_checkpoint(run, found, begin, 0), _checkpoint(run, found, end, -1)) if asked or len(found) > 1 else None
    if (not rows or pair is not None) and any(map(holds_shards, pair if rows and pair else found)):
        raise NothingToSeeError(
            f"run={str(run)!r}: its checkpoints hold the parts of several ranks (parallel='fsdp'), which are not "
            "compared; to inspect it train with --parallel ddp, or in one process"
        )
    if not rows and pair is None:
        raise NothingToSeeError(
            f"run={str(run)!r}: no probes.jsonl, and {len(found)} checkpoint{'s' * (len(found) != 1)} where two are "
            "needed; train with --probes.subspace true, or with --checkpoint.keep 10"
        )
    layers = _layers(rows) if rows else _layers(_from_checkpoints(found))
    noise = _noise(rows)
    result: dict[str, Any] = {
        "run": str(run),
        "source": "probes.jsonl" if rows else "checkpoints",
        "frozen_threshold": FROZEN,
    }
    result |= {"layers": layers, "types": _types(layers)}
    if noise:
        result["noise"] = noise
    if pair is not None:
        result["update"] = _update(*pair)
    return result


def _read(path: Path) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n") and number == len(lines):  # cut short by a kill
            continue
        row = parse_line(line)
        if not _is_row(row):
            raise InputError(f"{path}:{number}: is no row of a probe; mend or remove that line")
        rows.append(row)
    return rows


_NUMBERS = {"subspace": ("step",), "noise": ("step", "noise", "signal")}
_OPTIONAL = ("overlap", "anchor", "captured", "captured_before", "step_seconds", "usual_seconds")


def _is_row(row: Any) -> TypeGuard[Row]:
    """Whether everything is there that is read from a row, and of its kind."""
    if not isinstance(row, dict) or not isinstance(row.get("name"), str) or row.get("kind") not in list(_NUMBERS):
        return False
    angles = row.get("angles", [0, 0, 0])
    if not isinstance(angles, list) or len(angles) != 3:
        return False
    numbers = [*(row.get(key) for key in _NUMBERS[row["kind"]]), *angles]
    numbers += [row[key] for key in _OPTIONAL if row.get(key) is not None]
    return all(isinstance(value, int | float) for value in numbers)


def _checkpoint(run: Path, found: Sequence[Path], step: int | None, place: int) -> Path:
    known = {step_of(path): path for path in found}
    if step is None and found:
        return found[place]
    if step not in known:
        have = ", ".join(map(str, known)) or "none"
        raise InputError(
            f"step={step}: run {run} has no checkpoint of it; it has {have} (--checkpoint.keep keeps more)"
        )
    return known[step]


def module_type(name: str) -> str:
    """Return the type of a module, such as ``q_proj`` for ``model.layers.0.self_attn.q_proj.weight``."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _layers(rows: Iterable[Row]) -> list[Row]:
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] == "subspace":
            by_name.setdefault(row["name"], []).append(row)
    return [_layer(name, sorted(own, key=lambda row: row["step"])) for name, own in by_name.items()]


def _layer(name: str, rows: Sequence[Row]) -> Row:
    known = [(row["step"], row["overlap"]) for row in rows if "overlap" in row]
    frozen = len(known)
    while frozen and known[frozen - 1][1] >= FROZEN:
        frozen -= 1
    apart = [b["step"] - a["step"] for a, b in pairwise(rows)]
    extra = [max(0.0, row["step_seconds"] - row["usual_seconds"]) for row in rows if row.get("usual_seconds")]
    return {
        "name": name,
        "type": module_type(name),
        "refreshes": len(rows),
        "steps_apart": statistics.median(apart) if apart else None,
        "overlap_adjacent": _mean(value for _, value in known),
        "overlap_anchor": _mean(row["anchor"] for row in rows if "anchor" in row),
        "angles": [_mean(row["angles"][i] for row in rows if "angles" in row) for i in range(3)],
        "captured": _mean(row["captured"] for row in rows if "captured" in row),
        "captured_before": _mean(row["captured_before"] for row in rows if "captured_before" in row),
        "frozen_since": known[frozen][0] if len(known) - frozen >= _LEAST else None,
        "skipped": rows[-1].get("skipped"),
        "refresh_step_seconds": statistics.median(extra) if extra else None,
        "overlaps": [[step, round(value, 5)] for step, value in known],
    }


def _types(layers: Iterable[Row]) -> dict[str, Row]:
    by_type: dict[str, list[Row]] = {}
    for layer in layers:
        by_type.setdefault(layer["type"], []).append(layer)
    measured = ("overlap_adjacent", "overlap_anchor", "captured", "captured_before")
    return {
        kind: {"layers": len(own), **{key: _mean(row[key] for row in own if row[key] is not None) for key in measured}}
        for kind, own in by_type.items()
    }


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.fmean(found) if found else None


def _noise(rows: Iterable[Row]) -> list[Row]:
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] == "noise":
            by_name.setdefault(row["name"], []).append(row)
    found = []
    for name, own in by_name.items():
        noise, signal = (statistics.fmean(row[key] for row in own) for key in ("noise", "signal"))
        # The ratio of the means: a mean of ratios would be ruled by the steps whose signal is near zero.
        ratio = noise / signal if signal > 0 else None
        found.append(
            {"name": name, "type": module_type(name), "noise": noise, "signal": signal, "noise_to_signal": ratio}
        )
    return found


def _from_checkpoints(found: Sequence[Path]) -> list[Row]:
    """Return rows as a probe would have written them: one for each basis in the checkpoints, at the step of its choice.

    There are none where the optimizer keeps no basis, as in full rank.
    """
    rows: list[Row] = []
    before: dict[str, tuple[int, Tensor]] = {}
    for path in found:
        for name, (step, Q) in _bases(path).items():
            chosen, old = before.get(name, (None, Q))
            if chosen == step and torch.equal(old, Q):
                continue
            # A basis that moves at every step, as online PCA's, is chosen only once: its step is the checkpoint's.
            row: Row = {"kind": "subspace", "name": name, "step": step if chosen != step else step_of(path)}
            if chosen is not None and old.shape == Q.shape:
                turned = angles(old, Q)
                row |= {"overlap": overlap(old, Q), "angles": [float(turned[i]) for i in (0, len(turned) // 2, -1)]}
            rows.append(row)
            before[name] = step, Q
    return rows


def _bases(checkpoint: Path) -> dict[str, tuple[int, Tensor]]:
    """Return for each weight the step (the first is 1) that chose its basis, and the basis, orthonormal in fp64."""
    saved = load_part(checkpoint, "optimizer")
    names = {
        number: name
        for group in saved["param_groups"]
        for number, name in zip(group["params"], group.get("param_names", map(str, group["params"])), strict=True)
    }
    return {
        names[number].replace(".carrier", ".weight"): (
            int(state["refresh_step"]) + 1,
            orthonormalise(state["basis"].double()),
        )
        for number, state in saved["state"].items()
        if "basis" in state and bool((state["basis"] != 0).any())
    }


def _update(begin: Path, end: Path) -> dict[str, Any]:
    first, last = _weights(begin), _weights(end)
    layers = []
    for name, W in last.items():
        if W.ndim != 2 or name not in first or first[name].shape != W.shape:
            continue
        sigma = torch.linalg.svdvals((W - first[name]).double())
        if not bool(sigma[0] > 0):  # nothing has moved
            continue
        share = sigma / sigma.sum()
        layers.append(
            {
                "name": name,
                "type": module_type(name),
                "singular_values": [round(float(value), 6) for value in sigma / sigma[0]],
                "effective_rank": float(torch.exp(-torch.xlogy(share, share).sum())),
                "stable_rank": float((sigma / sigma[0]).square().sum()),
            }
        )
    return {"from": step_of(begin), "to": step_of(end), "layers": layers}


def _weights(checkpoint: Path) -> dict[str, Tensor]:
    try:
        return load_file(checkpoint / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(f"checkpoint {checkpoint}: model.safetensors cannot be read: {first_line(error)}") from error


def as_text(found: Mapping[str, Any]) -> str:
    """Return the findings as text for a terminal, by module type."""

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    if not found["layers"]:
        return "\n".join(["its checkpoints hold no basis to compare", *_changes(found)])
    rows = [["module", "subspaces", "overlap adjacent", "with anchor", "captured", "before refresh"]]
    for kind, row in found["types"].items():
        rows.append([kind, str(row["layers"]), *(cell(row[key]) for key in list(row)[1:])])
    lines = [aligned(rows, numbers=False)]
    frozen = sum(layer["frozen_since"] is not None for layer in found["layers"])
    still = f"adjacent overlap >= {FROZEN} to the end, over three refreshes or more"
    lines.append(f"{frozen} of {len(found['layers'])} subspaces stand still ({still})")
    if found["source"] == "checkpoints":
        apart = [layer["steps_apart"] for layer in found["layers"] if layer["steps_apart"] is not None]
        far = f"chosen {statistics.median(apart):g} steps apart" if apart else "of which each subspace has one"
        lines.append(
            f"no probes.jsonl: compared are the bases of checkpoints, {far}; every refresh, and what a basis "
            "captures, need --probes.subspace true"
        )
    return "\n".join([*lines, *_changes(found)])


def _changes(found: Mapping[str, Any]) -> list[str]:
    if "update" not in found:
        return []
    update = found["update"]
    by_type: dict[str, list[float]] = {}
    for layer in update["layers"]:
        by_type.setdefault(layer["type"], []).append(layer["effective_rank"])
    return [
        f"effective rank of the change from step {update['from']} to {update['to']}:",
        aligned([[kind, f"{statistics.fmean(ranks):.1f}"] for kind, ranks in by_type.items()], numbers=False),
    ]
