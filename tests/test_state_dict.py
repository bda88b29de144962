"""Saving and restoring: what the state may hold, exactness, hooks, and refusal of a foreign checkpoint."""

from itertools import product

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.helpers import METHODS, RANK, SETTINGS, assert_same, net, set_gradients, snapshot, walk, weights
from support.pairs import every_pair
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from subspan import SubspaceAdamW, create

methods = pytest.mark.parametrize("method", METHODS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def build(method, model, **settings):
    return create(
        method, model, **{"rank": RANK, "update_proj_gap": 5, "lr": 1e-2, **SETTINGS.get(method, {}), **settings}
    )


def through_a_file(state_dict, path):
    torch.save(state_dict, path)
    return torch.load(path, weights_only=True)


def pointers(optimizer):
    return {
        (index, key): value.data_ptr()
        for index, state in enumerate(optimizer.state.values())
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


@methods
@dtypes
def test_all_state_exists_at_construction(method, dtype):
    """Every parameter has its full state before the first step; steps add, remove and replace nothing (contract R3)."""
    model = net(dtype)
    optimizer = build(method, model)
    assert set(optimizer.state) == set(model.parameters())
    keys, addresses = [list(state) for state in optimizer.state.values()], pointers(optimizer)
    walk(model, optimizer, range(7))
    assert [list(state) for state in optimizer.state.values()] == keys
    assert pointers(optimizer) == addresses


@methods
def test_state_keys_and_types(method):
    """Tensors of at least fp32 and integers, under the names of the contract; nothing else (contract R1)."""
    model = net(torch.bfloat16)
    optimizer = build(method, model)
    seen = {key for state in optimizer.state.values() for key in state}
    assert seen <= {
        "step", "exp_avg", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "basis", "refresh_step", "skipped_refreshes",
        "basis_seed", "basis_rows", "basis_rank", "basis_exp_avg", "basis_exp_avg_sq", "basis_step", "indices", "columns",
        "switched", "stretch", "residual_norm", "error",
    }  # fmt: skip
    for p, state in optimizer.state.items():
        assert ("refresh_step" in state) == (p.ndim == 2)
        for key, value in state.items():
            if key == "indices":
                assert value.dtype == torch.int64
            else:
                assert type(value) is int or (type(value) is torch.Tensor and value.dtype == torch.float32)
        assert state["step"].shape == ()
    for group in optimizer.param_groups:
        for key, value in group.items():
            assert key == "params" or isinstance(value, bool | int | float | str | tuple | list | None)


@every_pair("method, dtype, saved_at", [*product(METHODS, [torch.float32, torch.bfloat16], [3, 5, 7, 10])])
def test_resume_is_exact(method, dtype, saved_at, tmp_path):
    """Stopped at any step, before a refresh or between two, and resumed from a file, a run gives the same bits as one
    that was not stopped.
    """
    model = net(dtype)
    optimizer = build(method, model)
    walk(model, optimizer, range(saved_at))
    saved = through_a_file(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt"
    )
    walk(model, optimizer, range(saved_at, 14))

    again = net(dtype, seed=1)
    again.load_state_dict(saved["model"])
    resumed = build(method, again)
    resumed.load_state_dict(state_dict=saved["optimizer"])
    walk(again, resumed, range(saved_at, 14))
    assert_same(weights(again), weights(model))
    assert_same(snapshot(resumed), snapshot(optimizer))


@methods
def test_load_copies_into_the_same_tensors(method, tmp_path):
    """With bf16 parameters values, dtypes and tensors of the fp32 state are kept exactly (contract R2)."""
    model = net(torch.bfloat16)
    optimizer = build(method, model)
    walk(model, optimizer, range(3))
    for state in optimizer.state.values():
        state["step"].fill_(257)
        state["exp_avg"].add_(1 + 2**-20)
        if "refresh_step" in state:
            state["refresh_step"], state["skipped_refreshes"] = 257, 1001
    saved = through_a_file(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other = build(method, net(torch.bfloat16))
    tensors = {
        id(value) for state in other.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    }
    addresses = pointers(other)
    other.load_state_dict(state_dict=saved)
    assert_same(snapshot(other), snapshot(optimizer))
    assert pointers(other) == addresses
    assert tensors == {
        id(value) for state in other.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    }
    saved["state"][0]["exp_avg"].zero_()
    assert other.state_dict()["state"][0]["exp_avg"].any()


def test_a_state_dict_loads_into_its_own_optimizer():
    """Loading what state_dict has just returned changes nothing."""
    model = net()
    optimizer = build("fira_sara_adamw", model)
    walk(model, optimizer, range(7))
    before = snapshot(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same(snapshot(optimizer), before)


@methods
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_distributed_checkpoint(method, flat, tmp_path):
    """With ``torch.distributed.checkpoint``, which keys the state by name, a run is restored exactly, and no step is
    asked for (R2, R3).
    """
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = net(torch.bfloat16)
    optimizer = build(method, model)
    walk(model, optimizer, range(7))
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path)

    again = net(torch.bfloat16)
    resumed = build(method, again)
    state_dict = {"optimizer": get_optimizer_state_dict(again, resumed, options=options)}
    assert_same(weights(again), weights(net(torch.bfloat16)))
    dcp.load(state_dict, checkpoint_id=tmp_path)
    again.load_state_dict(model.state_dict())
    set_optimizer_state_dict(again, resumed, state_dict["optimizer"], options=options)
    walk(model, optimizer, range(7, 12))
    walk(again, resumed, range(7, 12))
    assert_same(weights(again), weights(model))


def other_model(method):
    return build(method, torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 12)))


def other_names(method):
    model = net()
    return SubspaceAdamW([(f"encoder.{name}", p) for name, p in model.named_parameters()], rank=RANK)


def missing_state(method):
    optimizer = build(method, net())
    optimizer.state.pop(next(iter(optimizer.state)))
    return optimizer


class Damaged:
    """Something whose ``state_dict`` is not what it should be."""

    def __init__(self, content):
        self.content = content

    def state_dict(self):
        return self.content


def damaged(method, change):
    content = snapshot(build(method, net()))
    change(content)
    return Damaged(content)


FOREIGN = {
    "another rank": (lambda method: build(method, net(), rank=RANK + 1), "shape"),
    "another side": (lambda method: build(method, net(), proj_type="reverse_std"), "shape"),
    "another method": (
        lambda method: build("galore_adamw" if method.startswith("fira") else "fira_adamw", net()),
        "the checkpoint is of .*, this optimizer is .*; build it alike",
    ),
    "another selector": (
        lambda method: build("galore_adamw" if method == "sara_adamw" else "fira_sara_adamw", net()),
        "the checkpoint is of selector (Dominant|Importance), .*, this optimizer is selector (Importance|Dominant), ",
    ),
    "a damaged integer": (
        lambda method: damaged(method, lambda d: d["state"][0].update(refresh_step="x")),
        "'refresh_step' is 'x'",
    ),
    "a damaged setting": (lambda method: damaged(method, lambda d: d["param_groups"][0].update(rank=0)), "rank=0"),
    "damaged betas": (
        lambda method: damaged(method, lambda d: d["param_groups"][0].update(betas=(2, 2))),
        r"betas=\(2, 2\)",
    ),
    "no state dict": (lambda method: Damaged({"model": {}}), r"state_dict has \['model'\]: expected"),
    "full rank": (lambda method: build("adamw", net()), "holds|groups"),
    "another model": (other_model, "groups|shape|parameter"),
    "missing state": (missing_state, "holds"),
}


@pytest.mark.parametrize("method", ["sara_adamw", "fira_adamw"])
@pytest.mark.parametrize(("foreign", "words"), FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_checkpoint_changes_nothing(method, foreign, words):
    """A checkpoint of another model, method, side or rank is refused, and not one bit of state or
    settings has changed.
    """
    model = net()
    optimizer = build(method, model)
    walk(model, optimizer, range(7))
    before, addresses = snapshot(optimizer), pointers(optimizer)
    checkpoint = foreign(method).state_dict()
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(checkpoint)
    assert_same(snapshot(optimizer), before)
    assert pointers(optimizer) == addresses
    walk(model, optimizer, range(7, 9))


def test_names_are_compared():
    """A checkpoint whose parameters have other names is refused, and the message shows the first that differs."""
    optimizer = SubspaceAdamW(net().named_parameters(), rank=RANK)
    with pytest.raises(ValueError, match=r"'encoder\.up\.weight' where this optimizer has 'up\.weight'"):
        optimizer.load_state_dict(other_names("sara_adamw").state_dict())


def test_hooks_of_others_run():
    """State-dict and load hooks run once, see the whole state, and a pre-hook may replace the checkpoint (contract
    R15).
    """
    model = net()
    optimizer = build("sara_adamw", model)
    walk(model, optimizer, range(3))
    seen = []

    def pre(opt, state_dict):
        seen.append(("pre", len(state_dict["state"])))
        for state in state_dict["state"].values():
            state["exp_avg"] = torch.full_like(state["exp_avg"], 7.0)
        return state_dict

    def post(opt):
        seen.append(("post", {float(state["exp_avg"].min()) for state in opt.state.values()}))

    other = build("sara_adamw", net())
    other.register_load_state_dict_pre_hook(pre)
    other.register_load_state_dict_post_hook(post)
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda opt, state_dict: seen.append("saved"))
    other.load_state_dict(snapshot(optimizer))
    assert seen == ["saving", "saved", ("pre", 6), ("post", {7.0})]
    other.load_state_dict(snapshot(optimizer))
    assert len(seen) == 8


def test_settings_of_the_checkpoint_are_taken():
    """As with torch's optimizers, group settings come from the checkpoint; keys it lacks keep this optimizer's
    defaults.
    """
    optimizer = build("sara_adamw", net(), lr=0.5, update_proj_gap=7)
    saved = snapshot(optimizer)
    for group in saved["param_groups"]:
        del group["clock"], group["scale"]
    other = build("sara_adamw", net())
    other.load_state_dict(saved)
    for group in other.param_groups:
        assert (group["lr"], group["update_proj_gap"], group["scale"], group["clock"]) == (0.5, 7, 0.25, 0)


def test_fresh_and_resumed_differ_where_they_should():
    """The comparison of these tests sees a difference: without loading, the runs part."""
    model = net()
    optimizer = build("sara_adamw", model)
    walk(model, optimizer, range(7))
    twin = net()
    twin.load_state_dict(model.state_dict())
    set_gradients(model, 7)
    set_gradients(twin, 7)
    optimizer.step()
    build("sara_adamw", twin).step()
    assert not torch.equal(model.up.weight, twin.up.weight)


def test_settings_a_checkpoint_lacks_stay_as_they_are():
    """Each group keeps its own value, not the constructor's default (contract R8)."""
    model = net()
    optimizer = create("sara_adamw", model, rank=RANK, overrides={"up": {"scale": 1.0, "update_proj_gap": 7}})
    walk(model, optimizer, range(3))
    checkpoint = snapshot(optimizer)
    for group in checkpoint["param_groups"]:
        for key in ("rank", "scale", "update_proj_gap", "clock", "method"):
            del group[key]
    before = snapshot(optimizer)
    optimizer.load_state_dict(checkpoint)
    assert_same(snapshot(optimizer), before)
    walk(model, optimizer, range(3, 5))


def test_parameters_swapped_in_the_groups():
    """A framework may replace the parameters in the groups and load the state dict (contract R6)."""
    model, other = net(), net()
    optimizer, reference = build("sara_adamw", model), build("sara_adamw", other)
    for m, o in ((model, optimizer), (other, reference)):
        walk(m, o, range(4))
    saved = snapshot(optimizer)
    fresh = net()
    fresh.load_state_dict(model.state_dict())
    new = dict(fresh.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[name] for name in group["param_names"]]
    optimizer.load_state_dict(saved)
    walk(fresh, optimizer, range(4, 12))
    walk(other, reference, range(4, 12))
    assert_same(weights(fresh), weights(other))
    assert len(optimizer.state) == len(new)
