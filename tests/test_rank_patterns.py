"""Ranks by share and by pattern: what they stand for, which matrices they reach, and what is refused."""

import functools
import io
import logging
import re

import pytest
import torch
from support.helpers import (
    METHODS,
    RANK,
    SETTINGS,
    SHAPES,
    assert_same,
    feed,
    gradients,
    net,
    parameter,
    snapshot,
    walk,
    weights,
)
from torch import nn

import subspan
from subspan import SubspaceAdamW, create, param_groups
from subspan.utils.errors import SettingError
from subspan.utils.ranks import rank_of_side

OF_EACH = {"std": {"up": 6, "down": 3}, "right": {"up": 6, "down": 10}}
"""A quarter of the compressed side of each matrix of ``net``: (40, 24) and (12, 40)."""


def ranks(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """The rank of each projected matrix that has a basis, from the basis itself."""
    return {
        name: optimizer.state[p]["basis"].shape[-1]
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
        if "basis" in optimizer.state[p]
    }


# --- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proj_type", OF_EACH)
@pytest.mark.parametrize("method", METHODS)
def test_a_share_is_the_number_that_it_stands_for(method, proj_type):
    """Eight steps over refreshes have the same weights and states, bit for bit."""
    settings = {"lr": 1e-2, "update_proj_gap": 3, "proj_type": proj_type, **SETTINGS.get(method, {})}
    model, twin = net(), net()
    optimizer = create(method, model, rank=0.25, **settings)
    other = create(method, twin, rank=99, rank_pattern=OF_EACH[proj_type], **settings)
    walk(model, optimizer, range(8))
    walk(twin, other, range(8))
    assert_same(weights(model), weights(twin))
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_same(optimizer.state[p], other.state[q], name)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_share_is_of_the_side_that_the_basis_spans(shape, proj_type):
    """Whatever side that is, and for a single group of galore_torch's form."""
    grads, p, q = gradients(shape, 8), parameter(shape), parameter(shape)
    group = {"update_proj_gap": 3, "proj_type": proj_type}
    ours = SubspaceAdamW([{"params": [p], "rank": 0.2, **group}], 1e-2, selector="dominant")
    n, r = ours.state[p]["basis"].shape
    assert r == round(0.2 * n) in (4, 6, 10)
    theirs = SubspaceAdamW([{"params": [q], "rank": r, **group}], 1e-2, selector="dominant")
    assert torch.equal(feed(ours, p, grads), feed(theirs, q, grads))


def test_shares_are_rounded():
    """To the nearest whole number, a half upwards, and to no less than 1."""
    assert [rank_of_side(share, 10) for share in (0.01, 0.14, 0.15, 0.25, 0.34, 0.35, 0.999)] == [1, 1, 2, 3, 3, 4, 10]
    assert rank_of_side(0.25, 172) == 43


def test_a_share_that_reaches_the_shorter_side_is_full_rank():
    """As a whole number does: two thirds of 40 columns are 27, and there are 12 rows."""
    model = net()
    optimizer = create("sara_adamw", model, rank=2 / 3, proj_type="right")
    assert ranks(optimizer) == {"up.weight": 16}
    assert "full (side <= 0.6666666666666666 of a side)" in optimizer.summary()


def test_a_share_keeps_one_group():
    """Schedulers and logs see one projected group, whatever the sides; it holds the share."""
    groups = param_groups(net(), rank=0.25)
    assert [group["rank"] for group in groups] == [0.25, None]
    assert [group["rank"] for group in create("sara_adamw", net(), rank=0.25).param_groups] == [0.25, None]


@pytest.mark.parametrize("constructor", [lambda model, rank: SubspaceAdamW(model, rank=rank),
                                         lambda model, rank: SubspaceAdamW(model.named_parameters(), rank=rank),
                                         lambda model, rank: create("sara_adamw", model, rank=rank)])  # fmt: skip
def test_every_constructor_takes_a_share(constructor):
    assert ranks(constructor(net(), 0.25)) == {"up.weight": 6, "down.weight": 3}


def test_stacks_and_convolutions():
    """The share is of a side of each matrix of a stack, and of a filter's flattened matrix."""
    stack, kernel = nn.Parameter(torch.randn(3, 16, 12)), nn.Parameter(torch.randn(24, 6, 3, 3))
    optimizer = SubspaceAdamW([stack, kernel], rank=0.5)
    assert optimizer.state[stack]["basis"].shape == (3, 12, 6)
    assert optimizer.state[kernel]["basis"].shape == (24, 12)


# --- patterns ---------------------------------------------------------------------------------------------------------


def test_the_first_pattern_that_is_found_wins():
    """Numbers and shares mix; what no pattern finds has the common rank; vectors and full-rank matrices are left."""
    model = nn.ModuleDict({"a": net(), "b": net(), "lm_head": nn.Linear(24, 40)})
    optimizer = create("sara_adamw", model, rank=4, rank_pattern={r"a\.up": 7, r"\bup": 0.5, "b": 3, "[.]bias|a": 5})
    assert ranks(optimizer) == {"a.up.weight": 7, "b.up.weight": 12, "b.down.weight": 3, "a.down.weight": 5}
    assert [group["rank"] for group in optimizer.param_groups] == [0.5, 3, 5, 7, None, None]


def test_matrices_of_one_rank_are_one_group():
    """A pattern that asks for the common rank changes nothing, and two that ask for the same make one group."""
    model = nn.ModuleDict({name: net() for name in "abc"})
    plain, other = (param_groups(model, rank=4, rank_pattern=pattern) for pattern in (None, {"a": 4, "up": 4}))
    assert [group["rank"] for group in plain] == [group["rank"] for group in other] == [4, None]
    assert [name for name, _ in plain[0]["params"]] == [name for name, _ in other[0]["params"]]


def test_wrappers_change_no_pattern():
    """It is the canonical name that a pattern is looked for in."""
    named = [(f"_orig_mod.{name}", p) for name, p in net().named_parameters()]
    groups = param_groups(named, rank=4, rank_pattern={"^up": 2})
    assert {name: group["rank"] for group in groups[:2] for name, _ in group["params"]} == {
        "up.weight": 2,
        "down.weight": 4,
    }


def test_a_rank_in_overrides_wins():
    """Their other settings and a pattern's rank hold together."""
    overrides = {"up": {"rank": 8}, "down": {"lr": 0.5}}
    optimizer = create("sara_adamw", net(), rank=4, rank_pattern={"weight": 2}, overrides=overrides)
    assert ranks(optimizer) == {"up.weight": 8, "down.weight": 2}
    assert {group["lr"] for group in optimizer.param_groups if group["rank"] == 2} == {0.5}


def test_full_rank_methods_ignore_patterns():
    """As they ignore the rank."""
    optimizer = create("adamw", net(), rank=0.25, rank_pattern={"nothing": 3})
    assert all(group.get("rank") is None for group in optimizer.param_groups)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_the_table_shows_the_ranks_that_are_used():
    model = nn.ModuleDict({"a": net(), "b": net()})
    table = create("sara_adamw", model, rank=0.25, rank_pattern={r"b\.up": 5}).summary()
    lines = [line.split() for line in table.splitlines()]
    assert [line[-8:-3] for line in lines if "of" in line] == [
        ["6", "(0.25", "of", "24)", "1"],
        ["3", "(0.25", "of", "12)", "2"],
    ]
    assert ["5", "1"] in [line[-5:-3] for line in lines]


# --- what is refused --------------------------------------------------------------------------------------------------

BAD = [0, 0.0, 1.0, 1.5, 16.0, -1, -0.25, float("nan"), float("inf"), True, "8", (8,)]
WHERE = {
    "rank": lambda rank: create("sara_adamw", net(), rank=rank),
    "a pattern": lambda rank: create("sara_adamw", net(), rank=4, rank_pattern={"up": rank}),
    "a group": lambda rank: SubspaceAdamW([{"params": [parameter((20, 12))], "rank": rank}]),
    "overrides": lambda rank: create("sara_adamw", net(), rank=4, overrides={"up": {"rank": rank}}),
    "project_backward": lambda rank: subspan.project_backward(net(), rank=rank),
    "its pattern": lambda rank: subspan.project_backward(net(), rank=4, rank_pattern={"up": rank}),
}


@pytest.mark.parametrize("rank", BAD, ids=repr)
@pytest.mark.parametrize("where", WHERE)
def test_ranks_that_are_none(where, rank):
    """The error names the argument, its value and what is allowed."""
    name = "rank_pattern['up']" if "pattern" in where else "rank"
    words = f"{name}={rank!r}: expected a whole number >= 1, or a share of each compressed side, above 0 and below 1"
    with pytest.raises(SettingError, match=re.escape(words)):
        WHERE[where](rank)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ({"(": 4}, r"rank_pattern: '\(' is no regular expression: .*; mend or escape it"),
        ({"upp": 4}, r"rank_pattern: 'upp' matches no projected matrix; the names look like 'up\.weight'"),
        ({"norm": 4}, r"rank_pattern: 'norm' matches no projected matrix; the names look like"),
        ({"bias": 4}, r"rank_pattern: 'bias' matches no projected matrix; the names look like"),
        ({"weight": 4, "up": 3}, r"rank_pattern: 'up' comes after 'weight', which matches 'up\.weight' first; put it before"),
        (["up"], r"rank_pattern=\['up'\]: expected ranks by regular expression, such as"),
        ("up", r"rank_pattern='up': expected ranks by regular expression, such as"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backward_side", [False, True])
def test_patterns_that_are_none(backward_side, pattern, words):
    """Nothing has been built or changed then."""
    model = net()
    build = subspan.project_backward if backward_side else functools.partial(create, "sara_adamw")
    with pytest.raises(SettingError, match=words):
        build(model, rank=4, rank_pattern=pattern)
    assert type(model.up) is nn.Linear


def test_a_pattern_that_overrides_make_void():
    with pytest.raises(SettingError, match=r"rank_pattern: 'up' gives no matrix .* overrides give one to 'up\.weight'"):
        create("sara_adamw", net(), rank=4, rank_pattern={"up": 2}, overrides={"up": {"rank": 8}})


def test_a_pattern_without_a_rank():
    """With no rank nothing is projected, so there is nothing for a pattern to reach."""
    with pytest.raises(SettingError, match=r"rank_pattern=.*: rank=None projects nothing; give the rank of the others"):
        param_groups(net(), rank=None, rank_pattern={"up": 2})


# --- checkpoints ------------------------------------------------------------------------------------------------------


def through_a_file(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("settings", [{"rank": 0.25}, {"rank": 0.25, "rank_pattern": {"down": 4}}, {}], ids=str)
def test_a_resumed_run_is_the_unbroken_one(settings):
    """Through a file that is loaded without running code; groups hold plain numbers, also that of the default."""
    model = net()
    optimizer = create("sara_adamw", model, lr=1e-2, update_proj_gap=3, **settings)
    walk(model, optimizer, range(5))
    saved, kept = through_a_file(optimizer), weights(model)
    walk(model, optimizer, range(5, 9))
    other = net(seed=1)
    resumed = create("sara_adamw", other, lr=1e-2, update_proj_gap=3, **settings)
    other.load_state_dict(kept)
    resumed.load_state_dict(saved)
    walk(other, resumed, range(5, 9))
    assert_same(weights(other), weights(model))
    assert_same(snapshot(resumed), snapshot(optimizer))
    assert {type(group["rank"]) for group in optimizer.param_groups} <= {int, float, type(None)}


def test_a_share_and_its_number_are_one_checkpoint():
    """What is held is the same; as with every setting, the checkpoint's spelling is taken over."""
    squares = [nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)]
    first, second = (create("sara_adamw", model, rank=rank) for model, rank in zip(squares, (0.25, 4), strict=True))
    walk(squares[0], first, range(3))
    second.load_state_dict(through_a_file(first))
    assert_same(snapshot(second), snapshot(first))


@pytest.mark.parametrize(
    "settings", [{"rank": 0.5}, {"rank": RANK}, {"rank": 0.25, "rank_pattern": {"up": 4}}], ids=str
)
def test_a_checkpoint_of_other_ranks_is_refused(settings):
    model = net()
    optimizer = create("sara_adamw", model, rank=0.25)
    before = snapshot(optimizer)
    with pytest.raises(SettingError, match=r"shape|parameter groups of \[1, 1, 4\] parameters"):
        optimizer.load_state_dict(create("sara_adamw", net(), **settings).state_dict())
    assert_same(snapshot(optimizer), before)


def test_no_warning(caplog):
    """A pattern divides nothing where nothing is shared."""
    with caplog.at_level(logging.WARNING, "subspan"):
        create("sara_adamw", net(), rank=0.25, rank_pattern={"up": 4})
    assert not caplog.records
