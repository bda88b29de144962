"""Some layers frozen, unused, run twice, added later or named one by one."""

import weakref
from typing import Any

import pytest
import torch
from support.backward_side import RANK, backward_side, layers_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import subspan


class Pair(nn.Module):
    """Two layers fed by one tensor, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.a(x) + self.b(x)))
        return out


def pair(name: str = "sara_adamw", **settings: Any) -> tuple[Pair, torch.optim.Optimizer]:
    model = Pair().double()
    return model, backward_side(model, name, share=[["a", "b"]], **settings)[0]


def data(seed: int = 0) -> Tensor:
    return torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_checkpointing_of_two_passes_at_a_refresh() -> None:
    """A pass that is repeated after another has chosen the basis saves what it saved before; gradients are those
    without.
    """
    grads = []
    for recompute in (False, True):
        model, optimizer = pair(update_proj_gap=1)
        run = (lambda x, model=model: checkpoint(model, x, use_reentrant=False)) if recompute else model
        for step in range(2):
            optimizer.zero_grad()
            (run(data(step)) + run(data(step + 10))).square().sum().backward()
            optimizer.step()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for expected, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_inputs_are_let_go() -> None:
    """Where a sibling is frozen or not called, the shared input lives no longer than the step."""
    for name in ("frozen", "not called"):
        model, optimizer = pair("golore_adamw")
        if name == "frozen":
            model.b.carrier.requires_grad_(False)
        x = data()
        seen = weakref.ref(x)
        y = model(x) if name == "frozen" else model.out(torch.tanh(model.a(x)))
        y.sum().backward()
        optimizer.step()
        del x, y
        assert seen() is None, name


def test_a_frozen_sibling() -> None:
    """A frozen layer of a shared basis stays as it is, and the other gets the gradient it would get alone."""
    model, optimizer = pair("golore_sgd")
    model.b.carrier.requires_grad_(False)
    before = model.b.weight.clone()
    model(data()).square().sum().backward()
    assert model.b.carrier.grad is None
    plain = Pair().double()
    plain(data()).square().sum().backward()
    Q = model.a.projection.down(torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(model.a.carrier.grad, plain.a.weight.grad @ Q, rtol=1e-10, atol=1e-12)
    optimizer.step()
    assert torch.equal(model.b.weight, before)


def test_the_keeper_of_a_basis_is_frozen() -> None:
    model = Pair()
    subspan.project_backward(model, rank=RANK, share=[["a", "b"]])
    model.a.carrier.requires_grad_(False)
    with pytest.raises(ValueError, match=r"carrier of b.weight is here, and that of a.weight.*unfreeze it"):
        subspan.create("sara_adamw", model)


def test_groups_added_later() -> None:
    """Carriers of a group that comes later are bound, and train."""
    model = Pair().double()
    subspan.project_backward(model, rank=RANK, share="none")
    groups = [{"params": [module.carrier], "rank": RANK} for module in (model.a, model.b, model.out)]
    optimizer = subspan.SubspaceAdamW(groups[:1], lr=1e-2)
    for group in groups[1:]:
        optimizer.add_param_group(group)
    before = model.out.weight.clone()
    model(data()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.out.weight, before)


def test_targets_that_name_layers_made_backward_side() -> None:
    """They are matched, and the others stay full rank."""
    model = Pair()
    subspan.project_backward(model, rank=4, targets=["a", "b"], share="none")
    assert set(layers_of(model)) == {"a", "b"}
    groups = subspan.param_groups(model, rank=4, targets=["a", "b"])
    ranks = {name: group["rank"] for group in groups for name, _ in group["params"]}
    assert ranks["a.carrier"] == ranks["b.carrier"] == 4
    assert ranks["out.weight"] is None


def test_decay_by_name() -> None:
    """Names of weights are those of their carriers too."""
    model = Pair()
    subspan.project_backward(model, rank=4, share="none")
    groups = subspan.param_groups(model, rank=4, weight_decay=0.1, decayed=["a.weight"])
    decays = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    assert decays["a.carrier"] == 0.1
    assert decays["b.carrier"] == 0.0


def test_data_parallel_is_refused() -> None:
    with pytest.raises(ValueError, match="DataParallel has wrapped it"):
        subspan.project_backward(nn.DataParallel(Pair()), rank=4)
