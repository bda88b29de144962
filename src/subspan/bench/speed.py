"""Measurements of speed as text."""

from collections.abc import Mapping
from typing import Any

from subspan.bench.report import text
from subspan.utils.tables import aligned


def refresh(found: Mapping[str, Any]) -> str:
    """Write the times of choosing a basis, and below them how far each way is from an SVD in fp64."""
    times = [
        ["choosing a basis, seconds", "rank", "refresh", "gram fp32", "svd fp32", "refresh / svd", "gram fp32 / svd"]
    ]
    errors = [
        [
            "against an SVD in fp64",
            "",
            "largest angle",
            "energy lost",
            "distance of probabilities",
            "largest error of one",
        ]
    ]
    for row in found["rows"]:
        seconds, ratios = row["seconds"], row["ratio_vs_svd"]
        times.append([
            row["shape"], str(row["rank"]), *(f"{seconds[name]:.3g}" for name in ("refresh", "gram_fp32", "svd_fp32")),
            _interval(ratios["refresh"]), _interval(ratios["gram_fp32"]),
        ])  # fmt: skip
        for name, error in row["accuracy"].items():
            errors.append([row["shape"], name.replace("_", " "), *(f"{error[key]:.1e}" for key in (
                "largest_angle", "energy_lost", "probability_distance", "probability_error"
            ))])  # fmt: skip
    lines = [aligned(times), "", aligned(errors), ""]
    lines.append(
        f"a refresh takes {_interval(found['ratio_vs_svd'])} of the time of svd, the geometric mean over shapes"
    )
    if share := found["share_of_training"]:
        lines.append(
            f"{share['model']}: refreshes of all layers take {share['refresh_seconds']:.3g} s, {share['share']:.2%} of "
            f"{share['period']} steps of {share['step_seconds']:.3g} s"
        )
    return "\n".join([*lines, machine(found)])


def step(found: Mapping[str, Any]) -> str:
    """Write times and memory of an optimizer's step."""
    cells = [
        ["milliseconds of a step", "ordinary", "refresh", "mean", "ours / its", "matmuls", "extra", "in a refresh"]
    ]
    for row in found["rows"]:
        ratio = found.get(f"ratio_vs_{row['name']}")
        cells.append([
            row["name"],
            *(_or_dash(row[f"{kind}_seconds"], _milliseconds) for kind in ("ordinary", "refresh", "amortised")),
            _or_dash(ratio, _interval),
            _or_dash(row["matmul_share"], lambda share: f"{share['median']:.0%}"),
            *(_or_dash(row[key], lambda value: f"{value:.2f}") for key in ("extra_weights", "refresh_extra_weights")),
        ])  # fmt: skip
    lines = [aligned(cells)]
    rate = f"{found['matmul_flops_per_second'] / 1e9:.1f} GFLOP/s"
    lines.append(f"matmuls: the share of a step that its two products take, at {rate}")
    lines.append(
        f"extra: what a step holds in addition, in largest weights ({found['largest_weight_bytes'] / 1e6:.1f} MB)"
    )
    if backward := found.get("backward_ratio_vs_adamw_fused"):
        lines.append(f"backward-side: a step takes {_interval(backward)} of fused AdamW's time")
    if found["not_installed"]:
        lines.append(f"not installed, so not measured: {', '.join(found['not_installed'])}")
    return "\n".join([*lines, machine(found)])


def grow(found: Mapping[str, Any]) -> str:
    """Write times beside their floors."""
    cells = [["milliseconds", "rank", "step", "floor", "step / floor", "choosing", "floor", "choosing / floor"]]
    for row in found["rows"]:
        line = [str(row["width"]), str(row["rank"])]
        for kind in ("step", "refresh"):
            taken, floor = row[f"{kind}_seconds"], row[f"{kind}_floor_seconds"]
            line += [f"{1e3 * taken:.3g}", f"{1e3 * floor:.3g}", f"{taken / floor:.1f}"]
        cells.append(line)
    lines = [aligned(cells)]
    for kind, exponents in (found["exponents"] or {}).items():
        powers = [f"{_or_dash(power, '{:.2f}'.format)} at r/d = {share}" for share, power in exponents.items()]
        lines.append(f"{kind}: grows with the power of the width {', '.join(powers)}")
    return "\n".join([*lines, machine(found)])


def together(found: Mapping[str, Any]) -> str:
    """Write every part, and at the end the ratios that matter."""
    parts = [text(found["train"]), refresh(found["refresh"]), step(found["step"])]
    if "grow" in found:
        parts.append(grow(found["grow"]))
    ratios = [[key, _interval(value)] for key, value in found.items() if ".ratio" in key]
    return "\n\n".join([*parts, aligned(ratios), f"{machine(found)}; {found['seconds']:.0f} s in all"])


def machine(found: Mapping[str, Any]) -> str:
    """Describe the machine on which it was measured."""
    about = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    load = "" if about["load"] is None else f", load {about['load']:.1f}"
    return f"{about['processor']}, {about['threads']} threads of {about['cores']} cores{load}; {versions}"


def _interval(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def _or_dash(value: Any, write: Any) -> str:
    return "-" if value is None else write(value)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"
