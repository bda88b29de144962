"""What the weights of a model do: which are those of linear layers, stacks of experts, embeddings, heads or routers."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from subspan.utils.names import canonical_name

Kind = Literal["linear", "stack", "embedding", "head", "router", "convolution", "vector", "other"]

_WIDTHS = (("in_features", "out_features"), ("nx", "nf"), ("input_size", "output_size"), ("in_dim", "out_dim"))
"""Attributes in which a linear layer keeps the number of its inputs and that of its outputs."""
_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "model_dim", "hidden_dim")
"""Attributes of configs and modules that hold the width of the hidden states. Of the last one some mean another."""
_DOWN = re.compile(r"down|w2$|fc2|\bwo\b|wo$|out|c_proj|4h_to_h|linear_?2|lin2")
"""The second matrix of an expert by its name: it leads to the hidden states, and the others come from them."""
_BIAS = re.compile(r"b\d*(_|$)|.*bias")
_NO_STACK = re.compile(r"emb|pos|token|query|bias|mask|prompt|prefix|latent")
_ROUTING = re.compile(r"rout|gat(e|ing)$|^wg$|switch|classifier")
_ROUTER = re.compile(r"Router|Gating|TopK?Gate|MoEGate|MoeGate")


OF_EMBEDDINGS_AND_NORMS = (r"embed|(\b|_)emb", r"\bw[tp]e\b", r"norm[^.]*(\.[^.]+)?$")
"""The expressions of ``EXCLUDED`` for names of embeddings and norms, which a module says itself."""
EXCLUDED = (
    *OF_EMBEDDINGS_AND_NORMS,
    r"unembed|embed(ding)?s?_out|out(put)?_embed",
    r"\b(lm_)?head\b",
    r"\bscore\b",
    r"\bclassifier\b",
    r"^(\D*\.)?output\.weight$",
    r"router",
    r"lora_",
)
"""Regular expressions for names that stay full rank: embeddings, norms, heads, routers and adapters.

Where a module is given, embeddings and norms are found by what they do, and the expressions for these, which are the
first three, are not asked: ``norm1.linear`` of a diffusion transformer is a linear layer.
"""


class Role(NamedTuple):
    """What a parameter does."""

    kind: Kind
    transposed: bool = False
    """Whether a matrix is ``(in, out)``, as in transformers' ``Conv1D``, and not ``(out, in)``, as in ``nn.Linear``."""

    @property
    def is_projected(self) -> bool:
        """Whether ``"all-linear"`` means it."""
        return self.kind in ("linear", "stack")


def roles_of(model: nn.Module) -> dict[int, Role]:
    """Return the role of every parameter of ``model``, by the ``id`` of the parameter.

    A parameter that several modules have in common, such as the weight of a head that is tied to the embedding, has the
    role of an embedding.

    Where a stack says nowhere in which order its matrices are, they count as ``(out, in)``.
    """
    named = [(canonical_name(name), p) for name, p in model.named_parameters()]
    routers = _routers(named)
    widths = _hidden_sizes(model)
    found: dict[int, Role] = {}
    for path, module in model.named_modules():
        found |= _own_roles(module, path, widths)
    for name, p in named:
        if name in routers:
            found[id(p)] = Role("router")
    for module in model.modules():
        if _ROUTER.search(type(module).__name__):
            for p in module.parameters():
                if found[id(p)].is_projected:
                    found[id(p)] = Role("router")
    for kind, ask in (("head", "get_output_embeddings"), ("embedding", "get_input_embeddings")):
        for module in model.modules():
            weight = None if (answer := _answer(module, ask)) is None else answer._parameters.get("weight")
            if weight is not None and weight.ndim == 2:
                found[id(weight)] = Role(kind)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            found |= {id(p): Role("embedding") for p in module._parameters.values() if p is not None}
    return found


def roles_by_name(named: Iterable[tuple[str, Tensor]]) -> dict[int, Role]:
    """Return what names and shapes alone tell: which parameters are routers, or vectors in spite of their shape."""
    named = list(named)
    routers = _routers(named)
    found = {id(p): Role("router") for name, p in named if name in routers}
    return found | {id(p): Role("vector") for name, p in named if is_vector(name, p)}


def is_vector(name: str, p: Tensor) -> bool:
    """Tell whether a parameter is no matrix, whatever its shape: biases ``(E, n)`` of experts, a token ``(1, 1, n)``.

    Vectors are not projected and not decayed.
    """
    own = name.rpartition(".")[2]
    return p.ndim < 2 or own.endswith("bias") or (p.ndim > 2 and p.numel() == max(p.shape))


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is transformers' ``Conv1D``: ``y = x W + b`` with ``W (in, out)``."""
    weight = module._parameters.get("weight")
    if type(module).__name__ != "Conv1D" or weight is None or weight.ndim != 2:
        return False
    return getattr(module, "nf", None) == weight.shape[1]


def inputs_of(layer: Any) -> int:
    """Return the number of input features of an ``nn.Linear`` or a ``Conv1D``."""
    return int(layer.weight.shape[0] if is_conv1d(layer) else layer.in_features)


def linear_like(module: nn.Module) -> Role | None:
    """Return the role of the ``weight`` of a linear layer of any class, and ``None`` if the module is none."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2:
        return None
    if isinstance(module, nn.Linear):
        return Role("linear")
    name = type(module).__name__
    sizes = _sizes(module)
    if is_conv1d(module):
        return Role("linear", transposed=True)
    if sizes is not None and tuple(weight.shape) == sizes[::-1]:
        return Role("linear")
    if sizes is not None and tuple(weight.shape) == sizes:
        return Role("linear", transposed=True)
    return Role("linear") if name.endswith("Linear") else None


def if_little_is_projected(rows: Iterable[tuple[str, str, int]]) -> str | None:
    """Return a warning if less than a tenth of a model is projected, because little memory is saved then.

    Args:
        rows: a name, ``"projected"`` or the kind of a role, and a number of entries for each parameter.
    """
    sizes: Counter[str] = Counter()
    largest: dict[str, tuple[int, str]] = {}
    for name, kind, size in rows:
        sizes[kind] += size
        largest[kind] = max(largest.get(kind, (0, "")), (size, name))
    total, share = sizes.total(), sizes.pop("projected", 0)
    if not share or share >= total / 10:
        return None
    kind = max(sizes, key=lambda kind: sizes[kind])
    name = largest[kind][1].removesuffix(".weight")
    words = {"convolution": "convolutions", "embedding": "embeddings", "head": "the head"}.get(kind, "other parameters")
    return (
        f"only {share:,} of {total:,} parameters ({share / total:.1%}) are projected, and the rest is trained full rank. "
        f"Most of it is {words}, such as {name!r}. To project it too, name it with targets, as in targets=[{name!r}]: a "
        "list says everything that is to be projected, and its names may be parts of names"
    )


def _own_roles(module: nn.Module, path: str, widths: list[int]) -> dict[int, Role]:
    """The roles of the parameters that belong to a module itself, and not to a module in it."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    found = {id(p): Role("vector" if is_vector(name, p) else "other") for name, p in own.items()}
    if isinstance(module, nn.modules.conv._ConvNd):
        return found | {id(module.weight): Role("convolution")}
    if (role := linear_like(module)) is not None:
        return found | {id(own["weight"]): role}
    stacks = {}
    for name, p in own.items():
        if p.ndim == 2 and name.endswith("proj_weight"):
            found[id(p)] = Role("linear")  # nn.MultiheadAttention, and what is built as it is
        elif p.ndim >= 3 and "Conv" in type(module).__name__:
            found[id(p)] = Role("convolution")
        elif p.ndim == 3 and _is_stack(f"{path}.{name}", p):
            stacks[name] = p
    counts = {p.shape[0] for p in stacks.values()}
    found |= {
        id(p): Role("vector") for name, p in own.items() if p.ndim == 2 and p.shape[0] in counts and _BIAS.match(name)
    }
    transposed = bool(stacks) and _is_transposed(module, stacks, own, widths)
    return found | {id(p): Role("stack", transposed) for p in stacks.values()}


def _is_stack(name: str, p: Tensor) -> bool:
    """Tell whether a parameter of three dimensions is a stack of matrices, such as experts."""
    if min(p.shape[1:]) < 2 or "parametrizations" in name:
        return False
    return "expert" in name or (p.shape[0] > 1 and not _NO_STACK.search(name.rpartition(".")[2]))


def _is_transposed(
    module: nn.Module, stacks: Mapping[str, Tensor], own: Mapping[str, Tensor], widths: list[int]
) -> bool:
    """Tell whether the matrices of a module's stacks are ``(in, out)``. The first sign that one of them gives decides.

    The signs are what the module says itself, the sizes that it keeps, the width of a bias, which is that of the
    outputs, and the width of the hidden states.
    """
    said = getattr(module, "is_transposed", None)  # transformers' experts have it
    if isinstance(said, bool):
        return said
    own_widths = [value for name in _HIDDEN if isinstance(value := getattr(module, name, None), int)]
    signs = [
        *(_by_sizes(p, _sizes(module)) for p in stacks.values()),
        *(_by_bias(name, p, own) for name, p in stacks.items()),
        *(_by_width(name, p, width) for width in (*widths, *own_widths) for name, p in stacks.items()),
        _by_chain(stacks),
    ]
    return next((sign for sign in signs if sign is not None), False)


def _by_sizes(p: Tensor, sizes: tuple[int, int] | None) -> bool | None:
    shape = tuple(p.shape[1:])
    if sizes is None or sizes[0] == sizes[1] or shape not in (sizes, sizes[::-1]):
        return None
    return shape == sizes


def _by_bias(name: str, p: Tensor, own: Mapping[str, Tensor]) -> bool | None:
    names = (f"{name}_bias", name.replace("weight", "bias"), re.sub(r"^w(?=\d|$)", "b", name), f"bias_{name}")
    bias = next((own[other] for other in names if other != name and other in own), None)
    if bias is None or bias.ndim != 2 or p.shape[1] == p.shape[2] or bias.shape[1] not in p.shape[1:]:
        return None
    return bias.shape[1] == p.shape[2]


def _by_width(name: str, p: Tensor, width: int) -> bool | None:
    if (p.shape[1] == width) == (p.shape[2] == width):
        return None
    # Hidden states enter the first matrix and leave the second.
    return (p.shape[1] == width) != bool(_DOWN.search(name))


def _by_chain(stacks: Mapping[str, Tensor]) -> bool | None:
    """What the first matrix takes and the second one gives is of one width."""
    first = next((p for name, p in stacks.items() if not _DOWN.search(name)), None)
    second = next((p for name, p in stacks.items() if _DOWN.search(name)), None)
    if first is None or second is None:
        return None
    straight, transposed = first.shape[2] == second.shape[1], first.shape[1] == second.shape[2]
    return None if straight == transposed else transposed


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """The numbers of inputs and outputs that a module keeps."""
    for names in _WIDTHS:
        inputs, outputs = (getattr(module, name, None) for name in names)
        if isinstance(inputs, int) and isinstance(outputs, int):
            return inputs, outputs
    return None


def _hidden_sizes(model: nn.Module) -> list[int]:
    """The widths of hidden states that the config of a transformers model names."""
    config: Any = getattr(model, "config", None)
    configs = [config, *(getattr(config, name, None) for name in ("text_config", "decoder", "encoder"))]
    found = [getattr(one, name, None) for one in configs if one is not None for name in _HIDDEN[:3]]
    return [width for width in found if isinstance(width, int)]


def _answer(module: nn.Module, ask: str) -> nn.Module | None:
    """What a module of transformers answers when it is asked for its embeddings, if it has any."""
    method = getattr(module, ask, None)
    try:
        found = method() if callable(method) else None
    except (NotImplementedError, AttributeError, TypeError):
        return None
    return found if isinstance(found, nn.Module) else None


def _routers(named: Iterable[tuple[str, Tensor]]) -> set[str]:
    """The names of the matrices that choose experts: they stand beside experts, and have an output for each."""
    experts: dict[str, set[int]] = {}  # the numbers of experts, by what is before ".experts" in their names
    numbered: dict[str, set[str]] = {}
    named = list(named)
    for name, p in named:
        parts = name.split(".")
        for place, part in enumerate(parts[:-1]):
            if "expert" in part and "shared" not in part and not _ROUTING.search(part):
                before = ".".join(parts[:place])
                if p.ndim == 3:
                    experts.setdefault(before, set()).add(p.shape[0])
                if parts[place + 1].isdecimal():
                    numbered.setdefault(before, set()).add(parts[place + 1])
        if p.ndim == 3 and parts[-1] != "weight" and _is_stack(name, p):
            experts.setdefault(".".join(parts[:-1]), set()).add(p.shape[0])
    for before, numbers in numbered.items():
        experts.setdefault(before, set()).add(len(numbers))
    found = set()
    for name, p in named:
        parts = name.split(".")
        for place, part in enumerate(parts[:-1]):
            counts = experts.get(".".join(parts[:place]), set())
            if (
                p.ndim == 2
                and counts
                and _ROUTING.search(part)
                and (p.shape[0] in counts | {1} or p.shape[1] in counts)
            ):
                found.add(name)
    return found
