"""Shapes, models, gradients and meters that the tests share."""

import copy
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from subspan.parts import Selector
from subspan.recipes import RECIPES
from subspan.rules import RULES
from subspan.selectors import SELECTORS, Coordinates, Dominant, Gaussian, Importance, Lazy, OnlinePCA, Random, Switch
from subspan.storage.allocation import State

SHAPES = {"tall": (48, 20), "wide": (20, 48), "square": (32, 32)}
RANK = 4
METHODS = [name for name, recipe in RECIPES.items() if recipe.selector is not None]
EVERY_SELECTOR = [
    *(make() for make in SELECTORS.values()),
    Dominant("svd"),
    Importance(floor=0.2),
    Random(scaled=True),
    Coordinates("top"),
    Coordinates("norm"),
    Coordinates("norm", scaled=True),
    OnlinePCA(orthonormalise=False, weight_decay=0.01),
    Switch(Dominant(), Random(), at=3),
    Switch(Coordinates("top"), Gaussian(), at=3),
    Lazy(Importance()),
]
EVERY_RULE = [make() for make in RULES.values()]
SETTINGS: dict[str, dict[str, Any]] = {name: {"total_steps": 20} for name in METHODS if "hybrid" in name}
"""What a recipe needs besides the settings all share."""


def gradients(shape: Sequence[int], count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Gaussian matrices with a falling spectrum, so that leading singular vectors are well defined."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(tuple(shape), generator=generator, dtype=torch.float64) for _ in range(count)]
    if len(shape) == 2:
        matrices = [G * torch.linspace(2, 0.5, shape[1], dtype=torch.float64) for G in matrices]
    return [G.to(dtype) for G in matrices]


def parameter(shape: Sequence[int], seed: int = 99, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype))


def matrix_of(selector: Selector, state: State, n: int) -> Tensor:
    """The basis ``Q (n, r)``, however the selector keeps it."""
    return selector.project(torch.eye(n, dtype=torch.float64), state)


def part_of(state: State, part: Iterable[str]) -> State:
    """A copy of some entries of a parameter's state."""
    return {key: copy.deepcopy(state[key]) for key in part}


def feed(optimizer: torch.optim.Optimizer, p: Tensor, grads: Iterable[Tensor]) -> Tensor:
    """Steps on the given gradients; returns the parameter's value."""
    for G in grads:
        p.grad = G.clone()
        optimizer.step()
    return p.detach().clone()


def oriented_side(shape: Sequence[int], proj_type: str) -> str:
    """Which side is compressed, by the words of galore_torch: std the shorter, reverse_std the longer, ties to the
    columns.
    """
    m, n = shape
    return {
        "std": "right" if m >= n else "left",
        "reverse_std": "left" if m >= n else "right",
        "right": "right",
        "left": "left",
    }[proj_type]


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """A tall and a wide matrix, a norm and biases."""
    torch.manual_seed(seed)
    layers = OrderedDict(up=nn.Linear(24, 40), norm=nn.LayerNorm(40), down=nn.Linear(40, 12))
    return nn.Sequential(layers).to(dtype)


def set_gradients(model: nn.Module, seed: int) -> None:
    """Gradients that depend on the seed and the parameter's name alone."""
    for name, p in model.named_parameters():
        generator = torch.Generator().manual_seed(seed * 1000 + sum(name.encode()))
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def walk(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """One optimizer step for every seed in ``steps``."""
    for seed in steps:
        set_gradients(model, seed)
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal in structure, type, dtype and every bit."""
    assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{index}]")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        assert a.shape == b.shape, where
        assert torch.equal(
            a.detach().view(torch.uint8) if a.ndim else a, b.detach().view(torch.uint8) if b.ndim else b
        ), where
    else:
        assert a == b, f"{where}: {a!r} and {b!r}"


class NoSync(TorchDispatchMode):
    """Fails where the host would wait for the value of a tensor, or for a shape that depends on values."""

    WAITS = frozenset(
        getattr(torch.ops.aten, name)
        for name in (
            "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "argwhere", "masked_select", "_unique",
            "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount", "repeat_interleave",
        )
    )  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
        by_mask = masks and any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if func.overloadpacket in self.WAITS or by_mask:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class FullSizeMeter(TorchDispatchMode):
    """The largest number of storages of at least ``size`` bytes, made under it, that are alive at once."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.peak = size, 0
        self.alive: list[weakref.ref[Tensor]] = []
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.alive = [ref for ref in self.alive if ref() is not None]
        made = {ref().untyped_storage()._cdata for ref in self.alive}  # type: ignore[union-attr]
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= self.size:
                key = x.untyped_storage()._cdata
                if key in made or key not in before:
                    self.alive.append(weakref.ref(x))
                    made.add(key)
        self.peak = max(self.peak, len(made))
        return out
