"""Backward-side layers with ranks by share and by pattern, and which of them share a basis then."""

import copy
import logging
import re
from typing import Any

import pytest
import torch
from support.backward_side import batches, layers_of, train
from torch import nn

import subspan
from subspan.backward import Handle, project_backward
from subspan.utils.errors import SettingError

QUARTERS = {"down_proj": 12, ".": 8}
"""A quarter of the inputs of every layer: 32, and 48 of the MLP's last."""
SPLIT = {"q_proj": 0.5, r"layers\.1\..*up_proj": 4}


def ranks(handle: Handle) -> dict[str, int]:
    """The rank of each layer, from its carrier."""
    return {layer.weight_name.removesuffix(".weight"): layer.carrier.shape[1] for layer in handle.layers}


def groups(handle: Handle) -> list[list[str]]:
    """The own names of the layers of each basis."""
    return [[layer.weight_name.split(".")[-2] for layer in one.layers] for one in handle.projections]


@pytest.mark.parametrize("share", ["auto", "none"])
@pytest.mark.parametrize("name", ["sara_adamw", "golore_adamw", "rso_adamw", "sara_adamw_8bit"])
def test_a_share_is_the_number_that_it_stands_for(llama: Any, name: str, share: str) -> None:
    """Twelve steps over refreshes have the same losses and states, bit for bit."""
    found = []
    for given in ({"rank": 0.25}, {"rank": 9, "rank_pattern": QUARTERS}):
        model = llama()
        handle = project_backward(model, share=share, **given)
        assert set(ranks(handle).values()) == {8, 12}
        optimizer = subspan.create(name, model, lr=1e-2, update_proj_gap=5, stagger=False, min_8bit_size=64)
        losses = train(model, optimizer, batches(12))
        states = {layer.weight_name: optimizer.state[layer.carrier] for layer in handle.layers}
        found.append((losses, states))
    assert found[0][0] == found[1][0]
    for weight, state in found[0][1].items():
        for key, value in state.items():
            other = found[1][1][weight][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, (weight, key)


@pytest.mark.parametrize("name", ["sara_adamw", "golore_adamw", "galore_sgd"])
def test_both_executions_agree(llama: Any, name: str) -> None:
    """Ranks by share and by pattern are those of the optimizer-side method with right bases, and so are the losses."""
    given: dict[str, Any] = {"rank": 0.25, "rank_pattern": SPLIT}
    settings: dict[str, Any] = {"lr": 1e-3, "update_proj_gap": 5, "seed": 4}
    twin, model = llama().double(), llama().double()
    expected = train(twin, subspan.create(name, twin, proj_type="right", **given, **settings), batches(20))
    project_backward(model, share="none", **given)
    losses = train(model, subspan.create(name, model, stagger=False, **given, **settings), batches(20))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=3e-7, atol=0)


def test_a_share_keeps_one_group(llama: Any) -> None:
    """Whatever ranks it stands for; the table shows them."""
    model = llama()
    project_backward(model, rank=0.25)
    optimizer = subspan.create("sara_adamw", model)
    assert [group["rank"] for group in optimizer.param_groups] == [0.25, None, None]
    assert optimizer.defaults["rank"] == 0.25
    lines = [line for line in optimizer.summary().splitlines() if "backward-side" in line]
    assert [line.split()[-8:-3] for line in lines] == [
        ["8", "(0.25", "of", "32)", "12"],
        ["12", "(0.25", "of", "48)", "2"],
    ]


# --- who shares -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["auto", "inputs"])
def test_a_pattern_divides_layers_with_one_input(llama: Any, share: str, caplog: pytest.LogCaptureFixture) -> None:
    """Layers of one rank still share. A warning says which do not, once for all."""
    model = llama()
    given: Any = share if share == "auto" else dict(model.dummy_inputs)
    with caplog.at_level(logging.WARNING, "subspan"):
        handle = project_backward(model, rank=0.25, rank_pattern=SPLIT, share=given)
    block = [["q_proj"], ["k_proj", "v_proj"], ["o_proj"]]
    assert groups(handle) == [
        *block,
        ["gate_proj", "up_proj"],
        ["down_proj"],
        *block,
        ["gate_proj"],
        ["up_proj"],
        ["down_proj"],
    ]
    assert [one.rank for one in handle.projections] == [16, 8, 8, 8, 12, 16, 8, 8, 8, 4, 12]
    assert (
        [record.getMessage() for record in caplog.records]
        == [handle.divided]
        == [
            "rank_pattern: layers with the same input share a basis and one x Q only where they have one rank; apart are, for "
            "example, model.layers.0.self_attn.q_proj (rank 16); model.layers.0.self_attn.k_proj, "
            "model.layers.0.self_attn.v_proj (rank 8)"
        ]
    )
    assert train(model, subspan.create("golore_adamw", model, lr=1e-2), batches(2))


@pytest.mark.parametrize(
    ("pattern", "share"),
    [
        ({"q_proj": 0.25, "mlp": 8}, "auto"),  # the common rank, in other words
        ({"self_attn": 4, "gate|up": 0.5}, "auto"),
        ({"q_proj": 16}, "none"),
        ({"q_proj": 16}, [["k_proj", "v_proj"]]),
    ],
)
def test_what_is_not_divided_is_not_warned_of(
    llama: Any, pattern: Any, share: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, plain = llama(), llama()
    with caplog.at_level(logging.WARNING, "subspan"):
        handle = project_backward(model, rank=8, rank_pattern=pattern, share=share)
    assert not caplog.records
    assert handle.divided is None
    assert groups(handle) == groups(project_backward(plain, rank=8, share=share))


def test_lists_that_a_pattern_contradicts(llama: Any) -> None:
    """Who lists layers together wants one basis for them; the model is not changed."""
    model = llama()
    words = (
        r"rank_pattern: layers that share lists together get different ranks, .*q_proj \(rank 16\); .*k_proj, .*v_proj "
        r"\(rank 8\); give them one rank, or list them apart"
    )
    with pytest.raises(SettingError, match=words):
        project_backward(model, rank=8, rank_pattern={"q_proj": 16}, share=[["q_proj", "k_proj", "v_proj"]])
    assert not layers_of(model)


# --- what the optimizer is told ---------------------------------------------------------------------------------------


def of_three() -> nn.Module:
    """Layers of rank 16 (by pattern), 8 (a quarter) and 4 (by pattern)."""
    model = nn.ModuleDict({name: nn.Linear(32, 32) for name in "qku"})
    project_backward(model, rank=0.25, rank_pattern={"q": 16, "u": 0.125}, share="none")
    return model


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"rank": 8},
        {"rank": 0.25},
        {"rank": 8, "rank_pattern": {"q": 16}},
        {"rank": 0.25, "rank_pattern": {"q": 16, "u": 0.125}},
        {"rank_pattern": {r"q\.weight$": 0.5, "k": 8}},
        {"overrides": {"q": {"rank": 0.5, "lr": 0.1}}},
    ],
    ids=str,
)
def test_what_the_layers_were_made_with_may_be_said_again(given: Any) -> None:
    """As a number or as a share, of all or of some of the layers, or not at all. Names are those of the weights."""
    optimizer = subspan.create("sara_adamw", of_three(), **given)
    found = {
        (p.shape[1], group["rank"], group["lr"])
        for group in optimizer.param_groups
        for p in group["params"]
        if p.ndim > 1
    }
    overridden = "overrides" in given
    assert found == {(16, 0.5 if overridden else 16, 0.1 if overridden else 0.01), (8, 0.25, 0.01), (4, 0.125, 0.01)}


WRONG = {
    "rank": ({"rank": 16}, "rank=16: the backward-side layer of k.weight was made with rank=0.25; give that, or another"),
    "share": ({"rank": 0.5}, "rank=0.5: the backward-side layer of k.weight was made with rank=0.25; give that"),
    "pattern": ({"rank_pattern": {"q": 8}}, "rank_pattern['q']=8, but the backward-side layer of 'q.carrier' was made with"),
    "another pattern": ({"rank_pattern": {"k": 0.75}}, "rank_pattern['k']=0.75, but the backward-side layer of 'k.carrier'"),
    "override": ({"overrides": {"q": {"rank": 0.25}}}, "overrides['q']: rank=0.25, but the backward-side layer of 'q.carrier'"),
    "no rank": ({"overrides": {"q": {"rank": None}}}, "overrides['q']: rank=None, but the backward-side layer of 'q.carrier'"),
    "no layer": ({"rank_pattern": {"v": 8}}, "rank_pattern: 'v' matches no projected matrix; the names look like"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "words"), WRONG.values(), ids=WRONG)
def test_other_ranks_than_those_of_the_layers_are_refused(given: Any, words: str) -> None:
    with pytest.raises(SettingError, match=re.escape(words)):
        subspan.create("sara_adamw", of_three(), **given)


def test_a_pattern_reaches_layers_and_other_matrices() -> None:
    """Where both are projected, the rank of the optimizer is that of the others."""
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32), "c": nn.Linear(32, 32)})
    project_backward(model, rank=0.25, targets=["a"])
    optimizer = subspan.create("sara_adamw", model, rank=4, rank_pattern={"a": 8, "b": 2})
    found = {
        name: optimizer.state[p]["basis"].shape[1]
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
        if "basis" in optimizer.state[p]
    }
    assert found == {"a.carrier": 8, "b.weight": 2, "c.weight": 4}


def test_a_rank_above_the_inputs_of_a_pattern() -> None:
    with pytest.raises(
        SettingError, match=r"rank_pattern\['down'\]=49: above the 48 input features of 'down'; lower it"
    ):
        project_backward(nn.ModuleDict({"down": nn.Linear(48, 32)}), rank=4, rank_pattern={"down": 49}, share="none")


# --- checkpoints and copies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", ["step", "refresh"])
def test_resume_is_exact(llama: Any, merge: Any) -> None:
    """A run that is saved and loaded into a fresh model goes on as if it had not stopped."""

    def start() -> tuple[nn.Module, Any]:
        model = llama()
        project_backward(model, rank=0.25, rank_pattern=SPLIT, merge=merge)
        return model, subspan.create("sara_adamw", model, lr=1e-2, update_proj_gap=4, stagger=False)

    model, optimizer = start()
    data = list(batches(12))
    train(model, optimizer, data[:8])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, resumed = start()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    losses, expected = train(other, resumed, data[8:]), train(model, optimizer, data[8:])
    assert losses == expected if merge == "step" else losses == pytest.approx(expected, rel=1e-5)


def test_copies_keep_their_ranks(llama: Any) -> None:
    """A copy of the model can have an optimizer of its own."""
    model = llama()
    project_backward(model, rank=0.25, rank_pattern=SPLIT)
    other = copy.deepcopy(model)
    one, two = (subspan.create("sara_adamw", each, lr=1e-2) for each in (model, other))
    assert train(model, one, batches(3)) == train(other, two, batches(3))
