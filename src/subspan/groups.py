"""Which parameters are projected, and to which rank: they are sorted into groups by their names."""

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from subspan.roles import EXCLUDED as EXCLUDED
from subspan.roles import OF_EMBEDDINGS_AND_NORMS, Role, if_little_is_projected, is_conv1d, roles_by_name, roles_of
from subspan.step.carriers import CarriedLayer, layer_of
from subspan.step.settings import check_settings
from subspan.utils.errors import SettingError
from subspan.utils.missing_matrices import FLATTENED, names_like, nothing_to_project, quantised
from subspan.utils.names import canonical_name, canonical_names
from subspan.utils.rank_patterns import RankPattern as RankPattern
from subspan.utils.rank_patterns import check_rank as check_rank
from subspan.utils.rank_patterns import compiled
from subspan.utils.ranks import Rank, is_rank, rank_of_side

logger = logging.getLogger(__name__)


def param_groups(
    model: nn.Module | Iterable[tuple[str, Tensor]],
    *,
    rank: Rank | None,
    rank_pattern: Mapping[str, Rank] | None = None,
    targets: str | Sequence[str] = "all-linear",
    exclude: Sequence[str] = EXCLUDED,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    lr_full: float | Tensor | None = None,
    weight_decay: float | None = None,
    decayed: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Sort named parameters into groups: projected matrices, full-rank matrices, and vectors.

    Every parameter is in exactly one group. Wrappers around the model or a part of it (DistributedDataParallel,
    torch.compile, activation checkpointing) change no name.

    Args:
        model: a module, or pairs as ``module.named_parameters()`` gives them. Frozen parameters are left out. Carriers
            of backward-side layers (``subspan.project_backward``) are projected, at their own rank.
        rank: rank of the projected group, as a whole number or as a share of each compressed side; the others get
            ``None``. With ``rank=None`` nothing is projected.
        rank_pattern: other ranks by regular expression, such as ``{r"q_proj": 32, r"mlp": 0.5}``, whole numbers or
            shares. The first one that is found in the canonical name of a projected matrix gives its rank.
        targets: which matrices are projected. ``"all-linear"`` means every matrix that ``exclude`` does not name; in a
            module, these are the weights of linear layers (``nn.Linear``, transformers' ``Conv1D``, the projections of
            ``nn.MultiheadAttention``) and stacks of matrices, such as experts. Embeddings, heads and
            routers are none of these, whatever their class and name; see ``subspan.roles``. Any other string is a
            regular expression for the whole name of a parameter or its module. Of a list of strings each is a part of
            names, or such an expression. A list or an expression wins over ``exclude``.
        exclude: regular expressions; a name in which one is found stays full rank. One that begins with ``+``, such as
            ``"+mlp"``, is added to the default list, which the others replace.
        overrides: group settings by regular expression, such as ``{r"k_proj": {"rank": 64}}``; the first match wins.
            A rank among them wins over ``rank_pattern``.
        lr_full: learning rate of the parameters that ``targets`` does not name (embeddings, heads, norms, biases), also
            with ``rank=None``, so that full rank may have two rates as well. ``None`` means that of the optimizer.
        weight_decay: weight decay of matrices; parameters of one dimension (biases, norms) get 0. ``None`` leaves it to
            the optimizer.
        decayed: names of the parameters that get ``weight_decay``, if these are not the matrices.

    Weights that are ``(in, out)`` are in groups with ``transposed=True``, which only a module tells. The biases
    ``(E, n)`` of experts, and tokens ``(1, 1, n)``, are vectors. A warning says so if less than a tenth of a module is
    projected.

    Returns:
        Parameter groups with names, in the order above, without empty ones. An optimizer that is built from them prints
        a table of them.

    Raises:
        SettingError: a target, a rank pattern or an override matches nothing, or a setting is out of range.
    """
    if not isinstance(targets, str) and not all(isinstance(target, str) for target in targets):
        raise SettingError(f"targets={targets!r}: expected 'all-linear', a list of strings, or a regular expression")
    given = {"rank": rank, "lr": lr_full, "weight_decay": weight_decay}
    check_settings({key: value for key, value in given.items() if value is not None}, {"lr": "lr_full"})
    ranks = RankPattern(rank_pattern)
    if rank is None and ranks.ranks:
        raise SettingError(
            f"rank_pattern={rank_pattern!r}: rank=None projects nothing; give the rank of the others too"
        )
    named = list(model.named_parameters() if isinstance(model, nn.Module) else model)
    frozen = [p for _, p in named if not p.requires_grad]
    named = [(name, p) for name, p in named if p.requires_grad]
    canonical = canonical_names(name for name, _ in named)
    given_names = {short: name for name, short in canonical.items()}
    named = [(canonical[name], p) for name, p in named]
    if flat := next((name for name, _ in named if "_flat_param" in name), None):
        raise SettingError(f"model: {flat!r} is many weights in one. {FLATTENED}")
    if not named:
        raise SettingError(
            "model: no trainable parameter; give a model, or the named_parameters() of one, that is not frozen"
            + quantised(frozen)
        )
    carriers = {name: layer for name, p in named if (layer := layer_of(p)) is not None}
    others = [(name, p) for name, p in named if name not in carriers]
    # A target may name backward-side layers; these are projected already.
    made = {layer.weight_name for _, p in named if (layer := layer_of(p)) is not None}
    projected = set()
    roles = roles_of(model) if isinstance(model, nn.Module) else roles_by_name(named)
    if rank is not None or lr_full is not None:
        projected = _projected_names(
            model, roles, others, targets, exclude, given_names, made, frozen, needed=rank is not None
        )
    decayed = None if decayed is None else {canonical_name(name) for name in decayed}

    for pattern, settings in (overrides or {}).items():
        if not isinstance(settings, Mapping):
            raise SettingError(f"overrides[{pattern!r}]={settings!r}: expected group settings, such as {{'rank': 64}}")
    rows = [(compiled(pattern, "overrides"), dict(settings)) for pattern, settings in (overrides or {}).items()]
    used: set[str] = set()
    matrices: list[str] = []
    overridden: set[str] = set()
    groups: dict[tuple[int, Rank, bool, bool, bool, str], dict[str, Any]] = {}
    for name, p in named:
        role = _role(roles, p)
        is_vector = p.ndim < 2 or role.kind == "vector"
        kind = 0 if name in projected or name in carriers else 2 if is_vector else 1
        pattern, settings = next(((row.pattern, s) for row, s in rows if _finds(row, name, given_names)), ("", {}))
        own_rank = rank if kind == 0 else None
        if kind == 0:
            matrices.append(name if name not in carriers else f"{name.rpartition('.')[0]}.weight")
            if "rank" in settings:
                overridden.add(matrices[-1])
            elif rank is not None:
                own_rank = ranks.of(matrices[-1], rank)
        # Three dimensions look like a stack of matrices, but those of a convolution are none.
        has_rank = own_rank is not None or settings.get("rank") is not None
        flatten = has_rank and p.ndim == 3 and role.kind == "convolution"
        used.add(pattern)
        if (layer := carriers.get(name)) is not None:
            own_rank = layer.projection.asked
            if "rank" in settings:
                _check_made(f"overrides[{pattern!r}]: rank", settings["rank"], layer, name)
            elif (found := ranks.finds(matrices[-1])) is not None:
                _check_made(f"rank_pattern[{found!r}]", ranks.ranks[found], layer, name)
        decay = kind < 2 if decayed is None else name in decayed or (layer is not None and layer.weight_name in decayed)
        place = (kind, own_rank or 0, flatten, role.transposed, not decay, pattern)
        if place not in groups:
            group: dict[str, Any] = {"params": [], "rank": own_rank}
            if flatten:
                group["flatten"] = True
            if role.transposed:
                group["transposed"] = True
            if kind > 0 and lr_full is not None:
                group["lr"] = lr_full
            if weight_decay is not None:
                group["weight_decay"] = weight_decay if decay else 0.0
            # A pattern for a matrix often matches its bias too, which has no rank.
            group |= {key: value for key, value in settings.items() if key != "rank" or kind < 2}
            groups[place] = group
        groups[place]["params"].append((name, p))
    for row, _ in rows:
        if row.pattern not in used:
            if hidden := next((name for name, _ in named if _finds(row, name, given_names)), None):
                first = next(other.pattern for other, _ in rows if _finds(other, hidden, given_names))
                raise SettingError(
                    f"overrides: {row.pattern!r} comes after {first!r}, which matches {hidden!r} first; put it before"
                )
            raise SettingError(f"overrides: {row.pattern!r} matches no parameter; {names_like(row.pattern, named)}")
    ranks.check_used(matrices, overridden)
    if rank is not None and targets == "all-linear" and isinstance(model, nn.Module):
        sizes = [(name, "projected", p.numel()) for name, p in named if name in projected]
        sizes += [(name, "projected", layer.weight.numel()) for name, layer in carriers.items()]
        sizes += [(name, _role(roles, p).kind, p.numel()) for name, p in others if name not in projected]
        if (words := if_little_is_projected(sizes)) is not None:
            logger.warning("%s", words)
    return [groups[key] for key in sorted(groups)]


def _check_made(what: str, asked: object, layer: CarriedLayer, name: str) -> None:
    """Raise unless the rank that is ``asked`` of a backward-side layer is the one that it was made with."""
    made = layer.projection
    if not is_rank(asked) or rank_of_side(asked, layer.weight.shape[1]) != made.rank:
        raise SettingError(
            f"{what}={asked!r}, but the backward-side layer of {name!r} was made with rank={made.asked}; leave the rank "
            "out, or give it to project_backward"
        )


def select_linear(model: nn.Module, targets: str | Sequence[str], exclude: Sequence[str]) -> dict[str, Any]:
    """Return the layers of ``model`` that ``targets`` names, by their canonical names; see ``param_groups``.

    They are of class ``nn.Linear`` or transformers' ``Conv1D``. Other layers and stacks of matrices that
    ``"all-linear"`` means too are left out, and one line of the log names them.

    Raises:
        SettingError: a target matches nothing, or a parameter that is not the weight of one of these classes.
    """
    raw = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    canonical = canonical_names(name for name, _ in raw)
    named: list[tuple[str, Tensor]] = [(canonical[name], p) for name, p in raw]
    found: dict[str, Any] = {}
    left: list[str] = []
    frozen = [p for p in model.parameters() if not p.requires_grad]
    given = {short: name for name, short in canonical.items()}
    chosen = _projected_names(model, roles_of(model), named, targets, exclude, given, (), frozen, needed=True)
    for (name, _), (raw_name, _) in zip(named, raw, strict=True):
        if name not in chosen:
            continue
        owner, _, own = raw_name.rpartition(".")
        module = model.get_submodule(owner)
        if own != "weight" or not (type(module) is nn.Linear or is_conv1d(module)):
            if targets == "all-linear":
                left.append(name)  # a stack of experts, or a layer of a class of its own
                continue
            raise SettingError(
                f"targets: {name!r} belongs to a {type(module).__name__}; only the weight of an nn.Linear, or of "
                "transformers' Conv1D, can be made in the backward pass; exclude it, and the optimizer projects it"
            )
        found[name.rpartition(".")[0]] = module
    if not found:
        raise SettingError(f"targets={targets!r}: no nn.Linear among them; {names_like('', named)}")
    if left:
        logger.info(
            "backward-side: %d stacks of matrices and layers of other classes are left out, such as %s; they keep their "
            "gradients, and the optimizer projects them",
            len(left),
            left[0],
        )
    return found


def _excluded(exclude: Sequence[str]) -> tuple[str, ...]:
    """The expressions that are meant: those that begin with a plus are added to the default ones."""
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    if not any(pattern.startswith("+") for pattern in exclude):
        return exclude
    return (*EXCLUDED, *(pattern.removeprefix("+") for pattern in exclude if pattern not in EXCLUDED))


def _projected_names(
    parameters: object,
    roles: Mapping[int, Role],
    named: list[tuple[str, Tensor]],
    targets: str | Sequence[str],
    exclude: Sequence[str],
    given: Mapping[str, str],
    made: Collection[str],
    frozen: Sequence[Tensor],
    *,
    needed: bool,
) -> set[str]:
    """The canonical names of what is to be projected. A pattern may also mean a name as a wrapper has ``given`` it.

    Where they are ``needed``, it is an error if all-linear finds none.
    """
    matrices = [name for name, p in named if p.ndim > 1 and _role(roles, p).kind != "vector"]
    if targets == "all-linear":
        expressions = _excluded(exclude)
        if isinstance(parameters, nn.Module):
            matrices = [name for name, p in named if _role(roles, p).is_projected]
        else:
            matrices = [name for name, p in named if name in matrices and _role(roles, p).kind != "router"]
        kept = [compiled(pattern, "exclude") for pattern in expressions]
        known = {name for name, p in named if _role(roles, p).kind == "linear"}
        found = {
            name
            for name in matrices
            if not any(
                _finds(pattern, name, given)
                for pattern in kept
                if name not in known or pattern.pattern not in OF_EMBEDDINGS_AND_NORMS
            )
        }
        if needed and not found and not made:
            raise SettingError(nothing_to_project(named, frozen, kept))
        return found
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise SettingError("targets=[]: nothing would be projected; give names, an expression, or 'all-linear'")
    found = set()
    for pattern in patterns:
        hits: set[str] = set()
        if not isinstance(targets, str):
            hits = {name for name in (*matrices, *made) if pattern in name or pattern in given.get(name, name)}
        if not hits:
            whole = compiled(pattern, "targets")
            hits = {
                name
                for name in (*matrices, *made)
                if any(
                    whole.fullmatch(spelled) or whole.fullmatch(spelled.removesuffix(".weight"))
                    for spelled in (name, given.get(name, name))
                )
            }
        if not hits:
            raise SettingError(
                f"targets: {pattern!r} matches no matrix; {names_like(pattern, named)}; an expression must match a whole "
                "name"
            )
        found |= hits.difference(made)
    return found


def _role(roles: Mapping[int, Role], p: Tensor) -> Role:
    return roles.get(id(p), Role("other"))


def _finds(pattern: re.Pattern[str], name: str, given: Mapping[str, str]) -> bool:
    """Tell whether ``pattern`` is found in a canonical name, or in the name as it is given."""
    return bool(pattern.search(name) or pattern.search(given.get(name, name)))
