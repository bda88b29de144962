"""Weights of any shape: orientation is undone, a stack is its matrices, a convolution is its flattened matrix."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import RANK, feed, gradients, oriented_side, parameter
from support.pairs import every_pair

from subspan import SubspaceAdamW
from subspan.residuals import ErrorFeedback, Fira
from subspan.selectors import Coordinates, Dominant, OnlinePCA, PowerIteration
from subspan.step.layout import PROJ_TYPES, layout_of

dimensions = st.lists(st.integers(1, 7), min_size=0, max_size=5)


@settings(max_examples=200, deadline=None)
@given(
    dimensions, st.none() | st.integers(1, 5) | st.floats(0.2, 0.9), st.sampled_from(sorted(PROJ_TYPES)), st.booleans()
)
def test_leave_undoes_enter(shape, rank, proj_type, flatten):
    A = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    layout = layout_of(shape, rank, proj_type, flatten)
    G = layout.enter(A)
    assert torch.equal(layout.leave(G, A.shape), A)
    assert (layout.side is None) == (layout.rank is None)
    if layout.rank is not None:
        exact = rank if isinstance(rank, int) else rank * G.shape[-1]
        assert layout.rank == 1 > exact or abs(layout.rank - exact) <= (0.5 if isinstance(rank, float) else 0)
        assert layout.rank < min(G.shape[-2:])
        assert G.ndim == (3 if len(shape) == 3 and not flatten else 2)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (32, 32)], ids=str)
def test_the_compressed_side(shape, proj_type):
    """As galore_torch names it."""
    assert layout_of(shape, 4, proj_type).side == oriented_side(shape, proj_type)


@pytest.mark.parametrize("rank", [4, 0.2])
@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (32, 32)], ids=str)
def test_sharded_rows_leave_the_columns(shape, rank):
    """No rank has all rows, so std is right, also for what a share is of."""
    assert layout_of(shape, rank, "std", sharded=True) == layout_of(shape, rank, "right")
    assert layout_of(shape, rank, "right").of_rows(7) == (
        (7, shape[1]),
        "right",
        4 if rank == 4 else round(shape[1] / 5),
    )


STACKED = product(
    [Dominant(), Coordinates("top"), PowerIteration(), OnlinePCA()], ["discard", Fira(), ErrorFeedback()],
    ["keep", "rotate", "moments", "reset"], [(48, 20), (20, 48)],
)  # fmt: skip


@every_pair("selector, residual, transfer, shape", [*STACKED])
def test_a_stack_is_its_matrices(selector, residual, transfer, shape):
    """Three experts in one parameter, one of them far larger, step as three parameters do."""
    parts = [[10.0**index * G for G in gradients(shape, 8, seed=index)] for index in range(3)]
    stack = torch.nn.Parameter(torch.stack([parameter(shape, index).detach() for index in range(3)]))
    chosen = {"selector": selector, "residual": residual, "transfer": transfer, "update_proj_gap": 3}
    together = feed(
        SubspaceAdamW([stack], 1e-2, RANK, **chosen), stack, [torch.stack(Gs) for Gs in zip(*parts, strict=True)]
    )
    for index, grads in enumerate(parts):
        p = parameter(shape, index)
        alone = feed(SubspaceAdamW([p], 1e-2, RANK, **chosen), p, grads)
        torch.testing.assert_close(together[index], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("selector", [Dominant(), Coordinates("norm"), PowerIteration()], ids=repr)
def test_an_idle_expert_keeps_its_basis(selector):
    """An expert that saw no token at a refresh keeps the subspace it has."""
    stack = torch.nn.Parameter(torch.zeros(2, 24, 16, dtype=torch.float64))
    optimizer = SubspaceAdamW([stack], 1e-2, RANK, selector=selector, update_proj_gap=2)
    grads = [torch.stack(Gs) for Gs in zip(gradients((24, 16), 4), gradients((24, 16), 4, seed=1), strict=True)]
    feed(optimizer, stack, grads[:2])
    key = "indices" if "indices" in optimizer.state[stack] else "basis"
    before = optimizer.state[stack][key].clone()
    idle = grads[2].clone()
    idle[1] = 0
    feed(optimizer, stack, [idle])
    after = optimizer.state[stack][key]
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize(
    ("shape", "flatten"), [((24, 6, 3, 3), False), ((24, 6, 2, 3, 3), False), ((24, 8, 5), True)], ids=str
)
def test_a_convolution_is_its_flattened_matrix(shape, flatten):
    """A weight of (out, in, ...) steps as one of (out, in * ...) does."""
    grads, p = gradients(shape, 8), parameter(shape)
    q = torch.nn.Parameter(p.detach().reshape(shape[0], -1).clone())
    group = {"params": [p], "rank": RANK, "flatten": flatten}
    ours = feed(SubspaceAdamW([group], 1e-2, update_proj_gap=3, selector="dominant"), p, grads)
    matrix = SubspaceAdamW([q], 1e-2, RANK, update_proj_gap=3, selector="dominant")
    theirs = feed(matrix, q, [G.reshape(shape[0], -1) for G in grads])
    torch.testing.assert_close(ours.reshape(shape[0], -1), theirs, rtol=0, atol=1e-12)


def test_weights_of_every_kind_in_one_model():
    """Tied, frozen and unused parameters, a convolution, experts, a wide and a rank-1 matrix, a scalar: one step, no
    more state than trained.
    """

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(30, 16)
            self.tied = torch.nn.Linear(16, 30, bias=False)
            self.tied.weight = self.embedding.weight
            self.frozen = torch.nn.Linear(16, 16).requires_grad_(False)
            self.unused = torch.nn.Linear(16, 16)
            self.wide = torch.nn.Linear(40, 12)
            self.experts = torch.nn.Parameter(torch.randn(3, 16, 12))
            self.filter = torch.nn.Conv1d(12, 8, 3)
            self.thin = torch.nn.Linear(16, 1)
            self.gain = torch.nn.Parameter(torch.ones(()))

    torch.manual_seed(0)
    model = Model()
    optimizer = SubspaceAdamW(model, 1e-2, RANK)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(named) == sorted(trained)
    based = {
        name for group in optimizer.param_groups for name, p in zip(group["param_names"], group["params"], strict=True)
        if "basis" in optimizer.state[p]
    }  # fmt: skip
    assert based == {"unused.weight", "wide.weight", "experts"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in trained.items():
        p.grad = None if name.startswith("unused") else torch.randn_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith(("unused", "frozen")), name


@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (32, 32), (3, 16, 24)], ids=str)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_a_weight_that_is_transposed_keeps_what_is_in_and_what_is_out(shape, proj_type):
    """The gradient of a weight (in, out) is oriented as that of the same weight (out, in), and so is its state."""
    plain = layout_of(shape, 4, proj_type)
    transposed = layout_of((*shape[:-2], shape[-1], shape[-2]), 4, proj_type, transposed=True)
    G = torch.randn(shape)
    assert torch.equal(plain.enter(G), transposed.enter(G.mT.contiguous()))
    assert plain.row_dim == transposed.row_dim
    assert layout_of(shape, None, proj_type).row_dim - layout_of(shape, None, proj_type, transposed=True).row_dim == -1


@pytest.mark.parametrize("proj_type", ["std", "right", "left"])
def test_sharded_rows_of_a_transposed_weight_leave_the_columns_too(proj_type):
    """Its rows are the inputs, and no rank has all of them."""
    assert layout_of((20, 48), 4, proj_type, sharded=True, transposed=True).side == "right"
    assert layout_of((20, 48), 4, proj_type, sharded=True, transposed=True).of_rows(5).row_dim == -2
