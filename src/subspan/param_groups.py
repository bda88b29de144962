"""Which parameter is projected, and on which side."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

EXCLUDED = (
    r"embed|(\b|_)emb",
    r"\bw[tp]e\b",
    r"norm",
    r"\b(lm_)?head\b",
    r"\bscore\b",
    r"\bclassifier\b",
    r"^output\b",
    r"lora_",
)
"""Regular expressions, searched in a parameter's name: embeddings, norms and heads stay full rank."""

FLATTENED = "Parameters flattened by FSDP1 or DeepSpeed have lost their shape: shard with fully_shard (FSDP2) instead"

Side = Literal["right", "left"]
PROJ_TYPES = {"std": "short", "reverse_std": "long", "right": "right", "left": "left", "short": "short", "long": "long"}
"""The names of galore_torch, and what they mean: which side of the matrix is compressed to the rank."""


def projection_side(shape: Sequence[int], rank: int | None, proj_type: str) -> Side | None:
    """``"right"`` compresses the columns (``R = G Q``), ``"left"`` the rows (``R = Gᵀ Q``), ``None`` is full rank.

    Only matrices are projected, and only where the rank is below both sides.
    """
    if rank is None or len(shape) != 2 or rank >= min(shape):
        return None
    side = PROJ_TYPES[proj_type]
    if side in ("right", "left"):
        return side  # type: ignore[return-value]  # narrowed by the line above
    wide = shape[0] < shape[1]
    return "left" if wide == (side == "short") else "right"


def split_parameters(
    parameters: nn.Module | Iterable[tuple[str, Tensor]],
    *,
    rank: int | None,
    targets: str | Sequence[str] = "all-linear",
    exclude: Sequence[str] = EXCLUDED,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    decay_vectors: bool = True,
) -> list[dict[str, Any]]:
    """Sort named parameters into groups: projected matrices, full-rank matrices, vectors. Each lands in exactly one.

    Args:
        parameters: a module, or pairs as ``module.named_parameters()`` gives them. Frozen ones are left out.
        rank: of the projected group; the others get ``None``.
        targets: ``"all-linear"`` (every matrix that ``exclude`` does not name; of a module, every ``nn.Linear`` weight), a
            list of strings (a name that contains one of them), or a regular expression for the whole name of a parameter
            or its module. A list or an expression that names a parameter wins over ``exclude``.
        exclude: regular expressions; a name in which one is found stays full rank.
        overrides: group settings by regular expression, such as ``{r"k_proj": {"rank": 64}}``; the first match wins.
        decay_vectors: False sets ``weight_decay=0`` for parameters of one dimension (biases, norms).

    Returns:
        Parameter groups with names, in the order above; empty ones are left out.

    Raises:
        ValueError: a target or override that matches nothing.
    """
    if isinstance(exclude, str):
        exclude = (exclude,)
    if not isinstance(targets, str) and not all(isinstance(target, str) for target in targets):
        raise ValueError(f"targets={targets!r}: expected 'all-linear', a list of strings, or a regular expression")
    named = list(parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters)
    named = [(name, p) for name, p in named if p.requires_grad]
    if not named:
        raise ValueError("parameters: no trainable parameter; pass model.named_parameters() of an unfrozen model")
    projected = _projected_names(parameters, named, targets, exclude) if rank is not None else set()

    rows = [(_compiled(pattern, "overrides"), dict(settings)) for pattern, settings in (overrides or {}).items()]
    used: set[str] = set()
    groups: dict[tuple[int, str], dict[str, Any]] = {}
    for name, p in named:
        kind = 0 if name in projected else 1 if p.ndim > 1 else 2
        pattern, settings = next(((row.pattern, s) for row, s in rows if row.search(name)), ("", {}))
        used.add(pattern)
        if (kind, pattern) not in groups:
            group: dict[str, Any] = {"params": [], "rank": rank if kind == 0 else None}
            if kind == 2 and not decay_vectors:
                group["weight_decay"] = 0.0
            # A pattern for a matrix often names its bias too, which has no rank.
            groups[kind, pattern] = group | {key: value for key, value in settings.items() if kind < 2 or key != "rank"}
        groups[kind, pattern]["params"].append((name, p))
    for row, _ in rows:
        if row.pattern not in used:
            raise ValueError(f"overrides: {row.pattern!r} matches no parameter; {_names_like(row.pattern, named)}")
    return [groups[key] for key in sorted(groups)]


def _projected_names(
    parameters: object, named: list[tuple[str, Tensor]], targets: str | Sequence[str], exclude: Sequence[str]
) -> set[str]:
    matrices = [name for name, p in named if p.ndim > 1]
    if targets == "all-linear":
        if isinstance(parameters, nn.Module):
            modules = list(parameters.modules())
            # By identity: a head tied to the embedding is one parameter under two names.
            linear = {id(m.weight) for m in modules if isinstance(m, nn.Linear)}
            linear -= {id(m.weight) for m in modules if isinstance(m, nn.Embedding)}
            matrices = [name for name, p in named if id(p) in linear]
        kept = [_compiled(pattern, "exclude") for pattern in exclude]
        found = {name for name in matrices if not any(pattern.search(name) for pattern in kept)}
        if not found:
            why = "no weight of an nn.Linear is left" if any(p.ndim > 1 for _, p in named) else "there is no matrix"
            raise ValueError(
                f"targets='all-linear': {why} to project among {len(named)} parameters; {_names_like('', named)}. "
                + ("Name others with targets" if any(p.ndim > 1 for _, p in named) else FLATTENED)
            )
        return found
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise ValueError("targets=[]: nothing would be projected; give names, an expression, or 'all-linear'")
    found = set()
    for pattern in patterns:
        if isinstance(targets, str):
            whole = _compiled(pattern, "targets")
            hits = {n for n in matrices if whole.fullmatch(n) or whole.fullmatch(n.removesuffix(".weight"))}
        else:
            hits = {n for n in matrices if pattern in n}
        if not hits:
            how = "; an expression must match a whole name" if isinstance(targets, str) else ""
            raise ValueError(f"targets: {pattern!r} matches no matrix; {_names_like(pattern, named)}{how}")
        found |= hits
    return found


def _compiled(pattern: str, argument: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is no regular expression: {error}; mend or escape it") from error


def _names_like(pattern: str, named: list[tuple[str, Tensor]]) -> str:
    names = [name for name, p in named if p.ndim > 1] or [name for name, _ in named]
    near = difflib.get_close_matches(pattern, names, n=4, cutoff=0.2) or names[:4]
    return "names here look like " + ", ".join(repr(name) for name in near)
