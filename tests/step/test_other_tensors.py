"""Parameters that are no ordinary tensors: they take the steps of ordinary ones, or are refused when they come."""

from typing import Any

import pytest
import torch
from support.helpers import gradients
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import subspan

SHAPES = [(32, 24), (24, 32), (16,), (3, 12, 8)]


class Quantised(Tensor):
    """A weight with the few operations that torchao's quantised training has: ``add_``, ``copy_``, new tensors."""

    ALLOWED = frozenset({"add_", "copy_", "detach", "sub", "mul", "clone", "_to_copy", "view"})
    data_: Tensor

    @staticmethod
    def __new__(cls, data: Tensor) -> "Quantised":
        made: Quantised = Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype, requires_grad=False)
        return made

    def __init__(self, data: Tensor) -> None:
        self.data_ = data

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name not in cls.ALLOWED:
            raise NotImplementedError(f"Quantised: {func}")
        out = func(*tree_map_only(cls, lambda t: t.data_, args), **(kwargs or {}))
        if name.endswith("_"):
            return args[0]
        return cls(out) if name in ("detach", "clone", "view") and isinstance(args[0], cls) else out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["sara_adamw", "galore_adafactor", "fira_adamw", "grass_adamw", "sara_adamw_8bit"])
def test_a_tensor_subclass_takes_the_steps_of_a_tensor(name: str, weight_decay: float, shape: tuple[int, ...]) -> None:
    plain = nn.Parameter(torch.randn(shape))
    other = nn.Parameter(Quantised(plain.detach().clone()))
    begun = plain.detach().clone()
    for p in (plain, other):
        model = nn.Module()
        model.w, model.v = p, nn.Parameter(torch.zeros(8, 8))
        optimizer = subspan.create(
            name, model, rank=4, targets=["w", "v"][len(shape) < 2 :], weight_decay=weight_decay, update_proj_gap=2
        )
        for G in gradients(shape, 5, dtype=torch.float32):
            p.grad = G
            optimizer.step()
    torch.testing.assert_close(other.data_, plain.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.equal(plain, begun)


def test_a_tensor_subclass_is_no_backward_side_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight = nn.Parameter(Quantised(torch.randn(8, 8)))
    with pytest.raises(ValueError, match=r"weight of '0' is a Quantised.*exclude it, and the optimizer projects it"):
        subspan.project_backward(model, rank=2, share="none")


REFUSED = {
    "complex": (torch.zeros(8, 8, dtype=torch.complex64), "'w' is complex .*view_as_real"),
    "a complex vector": (torch.zeros(8, dtype=torch.complex64), "'w' is complex"),
    "float8": (
        torch.zeros(8, 8).to(torch.float8_e4m3fn),
        "'w' is of torch.float8_e4m3fn; weights are trained in float32",
    ),
    "a stack of no experts": (torch.zeros(0, 4, 4), r"'w' of shape \(0, 4, 4\) has no entry"),
}


@pytest.mark.parametrize(("value", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_is_refused_when_it_comes(value: Tensor, words: str) -> None:
    """With the constructor, in a later group, and in the place of another parameter."""
    bad, good = nn.Parameter(value), nn.Parameter(torch.randn(8, 8))
    with pytest.raises(ValueError, match=words):
        subspan.SubspaceAdamW([("w", bad), ("v", good)], rank=2)
    optimizer = subspan.SubspaceAdamW([("v", good)], rank=2)
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": [("w", bad)], "rank": 2 if bad.ndim > 1 else None})
    assert list(optimizer.state) == [good]
    good.grad = torch.ones(8, 8)
    optimizer.step()


def test_a_cast_to_a_dtype_that_cannot_be_trained_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = subspan.create("sara_adamw", model, rank=2)
    model[0].weight.data = model[0].weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"'0.weight' is of torch.float8_e4m3fn"):
        optimizer.step()


def test_a_stack_whose_rows_are_sharded_is_refused_with_the_reason() -> None:
    stack = nn.Parameter(torch.randn(3, 12, 8))
    optimizer = subspan.SubspaceAdamW([("experts", stack)], rank=4)
    with pytest.raises(ValueError, match=r"stack of matrices \(3, 12, 8\) cannot be projected .*exclude it by name"):
        optimizer.check_shardable(stack, optimizer.param_groups[0])
