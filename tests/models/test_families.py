"""Each family of docs/models.md: what is projected, and six steps with an ordinary and a backward-side optimizer."""

import logging

import pytest
import torch
from support.families import FAMILIES

import subspan
from subspan.backward.layer import BackwardLinear

RANK = 8


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def names_of(optimizer, key):
    return {name for group in optimizer.param_groups if group.get(key) for name in group["param_names"]}


def six_losses(family, model, optimizer):
    batch, losses = family.batch(), []
    model.eval()  # no dropout, so that the loss falls from step to step
    for _ in range(6):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def assert_falls(losses):
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < losses[0] - 0.01 * abs(losses[0]), losses


def assert_exact(names, endings):
    """Every name ends as one of these does, and every ending is there."""
    ends = {name: next((ending for ending in endings if name.endswith(ending)), None) for name in names}
    assert None not in ends.values(), ends
    assert set(ends.values()) == set(endings), set(endings) - set(ends.values())


def test_create(family):
    """What is projected is exactly the linear layers of the blocks, in the order of their sides, and the loss falls."""
    model = family.build()
    optimizer = subspan.create("sara_adamw", model, rank=RANK, lr=1e-2, update_proj_gap=3)
    projected = names_of(optimizer, "rank")
    assert_exact(projected, family.projected)
    assert names_of(optimizer, "transposed") == {name for name in projected if name.endswith(family.transposed or "?")}
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert not biases & {name for group in optimizer.param_groups[:-1] for name in group["param_names"]}
    assert_falls(six_losses(family, model, optimizer))


def test_project_backward(family, caplog):
    """Linear layers of both classes are changed, and stacks are not. The model says itself who shares."""
    plain = {name for name, _ in family.build().named_parameters()}
    model = family.build()
    with caplog.at_level(logging.INFO, "subspan"):
        handle = subspan.project_backward(model, rank=RANK)
    layers = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, BackwardLinear)}
    assert_exact(layers, [name for name in family.projected if not name.endswith(family.stacks or "?")])
    assert ("left out" in caplog.text) == bool(family.stacks)
    assert ("a basis of its own" in caplog.text) == (family.kind in ("DiT", "ConvNet")), caplog.text
    assert (len(handle.projections) < len(layers)) == family.shares
    optimizer = subspan.create("sara_adamw", model, rank=RANK, lr=1e-2, update_proj_gap=3)
    assert names_of(optimizer, "rank") >= {name.replace(".weight", ".carrier") for name in layers}
    assert_falls(six_losses(family, model, optimizer))
    assert model.state_dict().keys() >= plain
    handle.remove()
    assert {name for name, _ in model.named_parameters()} == plain


def test_both_sides_agree(family):
    """Without shared bases the two ways choose the same bases from the same gradients, so they train alike."""
    losses = []
    for backward_side in (False, True):
        model = family.build().double()
        if family.stacks and family.kind != "DiT":
            model.set_experts_implementation("eager")  # the grouped kernels know no fp64
        batch = {
            key: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in family.batch().items()
        }
        if backward_side:
            subspan.project_backward(model, rank=RANK, share="none")
        optimizer = subspan.create(
            "galore_adamw", model, rank=RANK, lr=1e-2, update_proj_gap=3, proj_type="right", stagger=False
        )
        model.eval()
        losses.append([])
        for _ in range(4):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss))
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-6, atol=1e-8)
