"""The step's contract: schedule, learning rate, closures, groups, copies and randomness."""

import copy
import logging
import pickle

import pytest
import torch
from support.helpers import (
    METHODS,
    RANK,
    SETTINGS,
    assert_same,
    feed,
    gradients,
    net,
    parameter,
    set_gradients,
    snapshot,
    walk,
    weights,
)
from torch import nn

import subspan
from subspan import SubspaceAdamW, SubspaceOptimizer, create
from subspan.utils.checks import LARGEST, SMALLEST

methods = pytest.mark.parametrize("method", METHODS)


def build(method, model, **settings):
    return create(
        method, model, **{"rank": RANK, "update_proj_gap": 5, "lr": 1e-2, **SETTINGS.get(method, {}), **settings}
    )


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_refreshes_at_multiples_of_the_gap():
    """A basis changes at steps 0, gap, 2 gap ... and at no other."""
    p = parameter((48, 20))
    optimizer = SubspaceAdamW([p], rank=RANK, selector="random", update_proj_gap=5)
    changed, old = [], torch.zeros(20, RANK, dtype=p.dtype)
    for step, G in enumerate(gradients((48, 20), 23)):
        feed(optimizer, p, [G])
        if not torch.equal(optimizer.state[p]["basis"], old):
            changed.append(step)
            assert optimizer.state[p]["refresh_step"] == step
        old = optimizer.state[p]["basis"].clone()
    assert changed == [0, 5, 10, 15, 20]


def test_stagger_spreads_the_refreshes():
    """After the first step every matrix is refreshed once in each period, and no step pays for more than its share
    plus one.
    """
    gap, count = 10, 20
    params = [parameter((8, 6), seed) for seed in range(count)]
    optimizer = SubspaceAdamW(params, rank=2, selector="random", update_proj_gap=gap, stagger=True)
    refreshed = []
    for _ in range(4 * gap):
        before = [optimizer.state[p]["refresh_step"] for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        refreshed.append([i for i, p in enumerate(params) if optimizer.state[p]["refresh_step"] != before[i]])
    assert len(refreshed[0]) == count
    for period in range(1, 4):
        steps = refreshed[period * gap : (period + 1) * gap]
        assert sorted(i for step in steps for i in step) == list(range(count))
        assert max(len(step) for step in steps) <= count // gap + 1


@methods
def test_the_order_of_parameters_does_not_matter(method):
    """A choice depends on seed, name and step: the same names in another order give the same weights, bit for bit."""
    results = []
    for order in (1, -1):
        model = net()
        named = list(model.named_parameters())[::order]
        groups = [
            {"params": [(n, p) for n, p in named if p.ndim == 2], "rank": RANK},
            {"params": [x for x in named if x[1].ndim < 2]},
        ]
        recipe = build(method, net())
        optimizer = SubspaceOptimizer(
            groups[::order],
            1e-2,
            selector=recipe.selector,
            rule=recipe.rule,
            residual=recipe.residual,
            update_proj_gap=5,
        )
        walk(model, optimizer, range(12))
        results.append(weights(model))
    assert_same(*results)


@pytest.mark.parametrize("method", ["sara_adamw", "golore_adamw"])
def test_the_seed_decides(method):
    """Equal seeds give equal runs whatever the process's generator does, and leave it alone; another seed gives
    another run.
    """
    runs = []
    for seed in (0, 0, 1):
        model = net()
        torch.manual_seed(len(runs))
        before = torch.get_rng_state()
        walk(model, build(method, model, seed=seed), range(7))
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(weights(model))
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0]["up.weight"], runs[2]["up.weight"])


# --- learning rate, closures, hooks -----------------------------------------------------------------------------------


@methods
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lr_may_be_a_tensor(method, weight_decay):
    """A tensor lr gives the step of a float lr, is read at every step and never replaced (contract R7)."""
    lr = torch.tensor(0.01, dtype=torch.float64)
    a, b = net(), net()
    one, two = build(method, a, lr=0.01, weight_decay=weight_decay), build(method, b, lr=lr, weight_decay=weight_decay)
    for step in range(7):
        if step == 3:
            lr.mul_(0.5)
            for group in one.param_groups:
                group["lr"] *= 0.5
        walk(a, one, [step])
        walk(b, two, [step])
    assert all(group["lr"] is lr for group in two.param_groups)
    assert lr.item() == 0.005
    torch.testing.assert_close(weights(b), weights(a), rtol=0, atol=1e-6)


@methods
def test_lr_schedulers(method):
    """A scheduler of torch drives every group: weights equal those of a run whose lr is set by hand."""
    a, b = net(), net()
    one, two = build(method, a), build(method, b)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(one, T_max=10)
    for step in range(10):
        for group in two.param_groups:
            group["lr"] = scheduler.get_last_lr()[0]
        walk(a, one, [step])
        walk(b, two, [step])
        scheduler.step()
    assert scheduler.get_last_lr()[0] < 1e-6
    assert_same(weights(a), weights(b))


def test_closure():
    """The closure runs once, with gradients enabled, and its loss is returned (contract R9)."""
    model = net()
    optimizer, x, calls = build("sara_adamw", model), torch.ones(3, 24), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    before = weights(model)
    loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() > 0
    assert not torch.equal(before["up.weight"], model.up.weight)
    assert optimizer.step() is None


@methods
def test_gradients_are_never_written(method):
    """A step leaves every .grad as it was, object and value (contract R9)."""
    model = net()
    optimizer = build(method, model)
    for step in range(7):
        set_gradients(model, step)
        given = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            assert p.grad is given[name][0]
            assert torch.equal(p.grad, given[name][1])


def test_step_hooks_run_once():
    """Step hooks of torch are called once for each step (contract R15)."""
    model, calls = net(), []
    optimizer = build("sara_adamw", model)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    walk(model, optimizer, range(2))
    assert calls == ["before", "after"] * 2


# --- groups -----------------------------------------------------------------------------------------------------------


def test_foreign_keys_and_empty_groups():
    """Keys that other libraries inject, and groups without parameters, change nothing (contract R8)."""
    results = []
    for foreign in (False, True):
        model = net()
        groups = [{"params": [p], "rank": RANK if p.ndim == 2 else None} for p in model.parameters()]
        if foreign:
            for group in groups:
                group |= {"fused": None, "foreach": True, "initial_lr": 3.0, "capturable": False}
            groups += [{"params": []}, {"params": [], "rank": RANK}]
        walk(model, SubspaceAdamW(groups, selector="dominant", update_proj_gap=5), range(7))
        results.append(weights(model))
    assert_same(*results)


def test_parameters_without_a_gradient_are_skipped():
    """Weight, moments and schedule of a parameter without a gradient stay; its first refresh comes with its first
    gradient.
    """
    model = net()
    optimizer = build("sara_adamw", model, weight_decay=0.1)
    for step in range(3):
        set_gradients(model, step)
        model.up.weight.grad = None
        before, state = model.up.weight.detach().clone(), copy.deepcopy(optimizer.state[model.up.weight])
        optimizer.step()
        assert torch.equal(model.up.weight, before)
        assert_same(optimizer.state[model.up.weight], state)
    walk(model, optimizer, [3])
    assert optimizer.state[model.up.weight]["refresh_step"] == 3


def test_add_param_group():
    """A later group is trained like one given at the start, with its own settings; a bad one adds nothing (contract
    R15).
    """
    model, other = net(), nn.Linear(24, 40)
    optimizer = build("sara_adamw", model)
    optimizer.add_param_group({"params": [("other.weight", other.weight)], "rank": 2, "lr": 0.5})
    assert optimizer.state[other.weight]["basis"].shape == (24, 2)
    before = snapshot(optimizer)
    for bad in (
        {"rank": 0},
        {"lr": -1.0},
        {"update_proj_gap": 0},
        {"betas": (0.9, 2.0)},
        {"proj_type": "up"},
        {"rank": 2},
    ):
        with pytest.raises(ValueError, match=r"rank=0|lr=-1|update_proj_gap=0|betas=|proj_type='up'|fully_shard"):
            optimizer.add_param_group({"params": [("vector", nn.Parameter(torch.zeros(7)))], **bad})
    assert_same(snapshot(optimizer), before)
    weight = other.weight.detach().clone()
    other.weight.grad = torch.ones_like(weight)
    walk(model, optimizer, [0])
    assert not torch.equal(other.weight, weight)


def test_flattened_parameters_are_an_error():
    """A rank for a group without a matrix names fully_shard; nothing falls back to full rank in silence (contract
    R13).
    """
    flat = nn.Parameter(torch.zeros(100))
    with pytest.raises(ValueError, match="fully_shard"):
        SubspaceAdamW([flat], rank=RANK)
    with pytest.raises(ValueError, match="fully_shard"):
        SubspaceAdamW([("flat_param", flat)], rank=RANK)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank=0"), ({"rank": 2.0}, "rank=2.0"), ({"rank": True}, "rank=True"), ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"), ({"update_proj_gap": 0}, "update_proj_gap=0"), ({"scale": -1.0}, "scale=-1.0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"), ({"proj_type": "full"}, "proj_type='full'"),
        ({"transfer": "project"}, "transfer='project'"), ({"selector": "svd"}, "selector='svd'"),
        ({"residual": "add"}, "residual='add'"),
        ({"betas": (0.9, 1.0)}, "betas="), ({"eps": -1.0}, "eps=-1.0"),
        # fp32 rounds it to zero, and 0 / 0 is no number.
        ({"eps": 1e-300}, r"eps=1e-300: expected 0, or a number from 1e-30 to 1e\+18"),
        ({"eta": 1e-300}, r"eta=1e-300: expected a number > 0, from 1e-30 to 1e\+18, or None"),
        # torch takes no whole number beyond 64 bits.
        ({"eps": 10**30}, r"eps=10{30}: expected 0, or a number from 1e-30 to 1e\+18"),
        ({"eta": 10**30}, r"eta=10{30}: expected a number > 0, from 1e-30 to 1e\+18"),
        ({"scale": 10**30}, r"scale=10{30}: expected a number >= 0, and at most 1e\+18"),
        ({"weight_decay": 10**400}, r"weight_decay=10{400}: expected a number >= 0, and at most 1e\+18"),
        ({"lr": 10**30}, r"lr=10{30}: expected a number >= 0, as a float if beyond 1e\+18"),
    ],
)  # fmt: skip
def test_settings_are_checked(settings, words):
    """A setting out of range raises ValueError with the argument and its value."""
    with pytest.raises(ValueError, match=words):
        SubspaceAdamW([parameter((8, 8))], **{"rank": 2, **settings})


@pytest.mark.parametrize("name", ["eps", "eta"])
@pytest.mark.parametrize("size", [SMALLEST, LARGEST])
@pytest.mark.parametrize("proximal", ["coupled", "decoupled"])
def test_the_ends_of_a_range_can_be_used(name, size, proximal):
    """Weights stay numbers where a gradient has zeros, and at a refresh."""
    W = parameter((12, 8), dtype=torch.float32)
    optimizer = SubspaceAdamW([W], rank=2, selector="random", update_proj_gap=2, proximal=proximal, **{name: size})
    for G in gradients((12, 8), 5, dtype=torch.float32):
        G[0] = 0
        feed(optimizer, W, [G])
    feed(optimizer, W, [torch.zeros(12, 8)])
    assert W.isfinite().all()


@pytest.mark.parametrize("value", [1e-300, 1e300, 10**30, 10**400, float("nan")])
def test_parts_refuse_what_fp32_cannot_use(value):
    """Every number of every part: refused by its name, or the step goes on in numbers."""
    refusals: list[tuple[str, str]] = []
    tables = {
        "selector": subspan.selectors.SELECTORS,
        "rule": subspan.rules.RULES,
        "residual": subspan.residuals.RESIDUALS,
    }
    for kind, table in tables.items():
        for name, make in table.items():
            for key, own in vars(make()).items():
                if not isinstance(own, float):
                    continue
                try:
                    part = type(make())(**{key: value})
                except ValueError as error:
                    refusals.append((str(error), f"{key}={value!r}: expected"))
                    continue
                model = net()
                optimizer = subspan.create("sara_adamw", model, rank=2, update_proj_gap=2, **{kind: part})
                walk(model, optimizer, range(4))
                assert all(p.isfinite().all() for p in model.parameters()), (name, key)
    assert refusals
    assert all(message.startswith(words) for message, words in refusals), refusals


@methods
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on_alike(method, clone):
    """A copy of model and optimizer continues bit for bit, and independently (contract R15)."""
    model = net()
    optimizer = build(method, model)
    walk(model, optimizer, range(7))
    twin, other = clone((model, optimizer))
    before = snapshot(optimizer)
    walk(twin, other, range(7, 12))
    assert_same(snapshot(optimizer), before)
    walk(model, optimizer, range(7, 12))
    assert_same(weights(twin), weights(model))
    assert_same(snapshot(other), snapshot(optimizer))


def test_a_later_group_keeps_the_time_of_the_run():
    """A group added at step 4 switches with the others at step 6."""
    first, second = parameter((48, 20)), parameter((48, 20))
    selector = subspan.selectors.Switch(subspan.selectors.Dominant(), subspan.selectors.Random(), at=6)
    optimizer = subspan.SubspaceAdamW([{"params": [first], "rank": 4}], selector=selector, update_proj_gap=2)
    feed(optimizer, first, gradients((48, 20), 4))
    optimizer.add_param_group({"params": [second], "rank": 4})
    for G in gradients((48, 20), 3, seed=1):
        first.grad, second.grad = G.clone(), G.clone()
        optimizer.step()
    assert [optimizer.state[p]["switched"] for p in (first, second)] == [1, 1]


def test_the_table_is_shown_once_and_can_be_silenced(capsys, caplog, monkeypatch):
    """On stderr where nobody has set up logging; to the log, by its rules, where somebody has (contract R16)."""
    root, own = logging.getLogger(), logging.getLogger("subspan")
    monkeypatch.setattr(root, "handlers", [])
    subspan.SubspaceAdamW([parameter((48, 20))], rank=4)
    assert capsys.readouterr().err.count("bytes held") == 1
    monkeypatch.setattr(own, "level", logging.WARNING)
    own.manager._clear_cache()
    subspan.SubspaceAdamW([parameter((48, 20))], rank=4)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(own, "level", logging.NOTSET)
    monkeypatch.setattr(root, "handlers", [caplog.handler])
    own.manager._clear_cache()
    subspan.SubspaceAdamW([parameter((48, 20))], rank=4)
    assert "bytes held" not in caplog.text
    assert capsys.readouterr().err == ""


def test_groups_may_hold_generators():
    """As with torch's optimizers, params of a group are read once."""
    model = net()
    optimizer = SubspaceAdamW([{"params": (p for p in model.parameters()), "rank": 4}])
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_names_are_not_chosen_among_groups():
    p = nn.Parameter(torch.randn(16, 16))
    for params in ([{"params": [p], "rank": 4}], [p]):
        for settings in ({"targets": ["nonsense"]}, {"exclude": ("head",)}):
            with pytest.raises(ValueError, match=r"targets=.*exclude=.*are taken as they come; leave both out"):
                subspan.SubspaceAdamW(params, rank=4, **settings)


def test_a_parameter_that_was_swapped_in_is_named():
    model = nn.Linear(16, 16)
    optimizer = subspan.create("sara_adamw", nn.Sequential(model), rank=4)
    flat = nn.Parameter(torch.zeros(272))
    flat.grad = torch.ones(272)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match=r"'0.weight' \(272,\) has been put into its group since, and has no state"):
        optimizer.step()


@pytest.mark.parametrize("name", ["online_pca_adamw", "ldadam_adamw"])
def test_no_pull_to_a_basis_that_moves_at_every_step(name):
    with pytest.raises(ValueError, match=r"eta=0.5: pulls towards .* moves the basis at every step; use eta=None"):
        subspan.create(name, nn.Sequential(nn.Linear(16, 16)), rank=4, eta=0.5)


def test_momentum_that_comes_later_is_refused_at_a_refresh_too():
    for name, rule, later in (
        ("galore_sgd", {"momentum": 0.0}, {"momentum": 0.9}),
        ("sara_adafactor", {"beta1": 0.0}, {"beta1": 0.9}),
    ):
        for transfer in ("keep", "rotate", "reset"):
            model = nn.Sequential(nn.Linear(16, 16))
            optimizer = subspan.create(name, model, rank=4, rule=rule, transfer=transfer)
            optimizer.param_groups[0].update(later)
            model(torch.randn(3, 16)).sum().backward()
            with pytest.raises(ValueError, match="no momentum is kept; build the optimizer again"):
                optimizer.step()


def test_the_side_that_spread_rows_cannot_have_is_refused_by_any_name():
    """The longer side of a tall matrix is its rows, which are on several ranks."""
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16))
    optimizer = subspan.create("galore_adamw", model, rank=4, proj_type="reverse_std")
    (group,) = (group for group in optimizer.param_groups if group["rank"])
    tall, wide = group["params"]
    with pytest.raises(ValueError, match=r"proj_type='reverse_std', which is the rows of a matrix \(64, 16\)"):
        optimizer.check_shardable(tall, group)
    optimizer.check_shardable(wide, group)
