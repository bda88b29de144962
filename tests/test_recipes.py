"""The papers' names: what they are made of, that they train, and the bytes they hold."""

import re
from collections import OrderedDict

import pytest
import torch
from helpers import METHODS, RANK, SETTINGS, SHAPES, net, parameter, set_gradients
from torch import nn

import subspan
from subspan import create, list_optimizers, state_bytes
from subspan.recipes import defaults_of
from subspan.residuals import Discard, Fira
from subspan.rules import AdamW
from subspan.selectors import Dominant, Importance, Random, Switch

TABLE = {
    # name: selector, transfer, residual, lr, scale
    "galore_adamw": (Dominant(), "keep", Discard(), 1e-2, 0.25),
    "sara_adamw": (Importance(), "keep", Discard(), 1e-2, 0.25),
    "golore_adamw": (Random(), "rotate", Discard(), 2.5e-3, 1.0),
    "golore_hybrid_adamw": (Switch(Dominant(), Random(), at=0.8, total_steps=20), "rotate", Discard(), 2.5e-3, 1.0),
    "fira_adamw": (Dominant(), "keep", Fira("orthogonal", 1.01), 1e-2, 0.25),
    "fira_sara_adamw": (Importance(), "keep", Fira("orthogonal", 1.01), 1e-2, 0.25),
}


def build(name, model, **settings):
    return create(name, model, **{"rank": RANK, **SETTINGS.get(name, {}), **settings})


def test_the_table_is_complete():
    """Every recipe has its row here, and the list holds them and the baseline."""
    assert set(METHODS) == set(TABLE)
    assert set(list_optimizers()) == {*TABLE, "adamw"}
    assert set(list_optimizers("*sara*")) == {"sara_adamw", "fira_sara_adamw"}
    assert all(list_optimizers().values())


@pytest.mark.parametrize("name", TABLE)
def test_defaults(name):
    """Parts and defaults of each paper."""
    selector, transfer, residual, lr, scale = TABLE[name]
    optimizer = build(name, net())
    assert (optimizer.selector, optimizer.transfer, optimizer.residual) == (selector, transfer, residual)
    assert optimizer.rule == AdamW((0.9, 0.999), 1e-8)
    assert defaults_of(name) == (lr, scale, transfer)
    for group in optimizer.param_groups:
        settings = {key: group[key] for key in ("lr", "scale", "update_proj_gap", "proj_type", "weight_decay")}
        assert settings == {"lr": lr, "scale": scale, "update_proj_gap": 200, "proj_type": "std", "weight_decay": 0.0}


@pytest.mark.parametrize("name", ["adamw", *TABLE])
def test_every_name_learns(name):
    """On a small regression 100 steps leave less than a tenth of the loss."""
    torch.manual_seed(0)
    x = torch.randn(64, 24)
    y = x @ torch.randn(24, 12) / 24**0.5
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 12))
    optimizer = build(name, model, lr=3e-2, rank=8, update_proj_gap=10, scale=1.0, total_steps=100)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_the_baseline_is_torch_adamw():
    """``adamw`` is torch's own class, with its usual learning rate."""
    optimizer = create("adamw", net(), betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        vectors = all(p.ndim == 1 for p in group["params"])
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
            1e-3,
            (0.8, 0.9),
            1e-6,
            0.0 if vectors else 0.1,
        )
        assert "rank" not in group


@pytest.mark.parametrize("name", ["adamw", *TABLE])
def test_vectors_are_never_decayed(name):
    """With weight decay alone at work (zero gradients) matrices shrink by 1 - lr * wd, biases and norms stay."""
    model = net()
    optimizer = build(name, model, lr=0.1, weight_decay=0.5)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[key] * (0.95 if p.ndim == 2 else 1.0), rtol=1e-6, atol=0)


def test_settings_are_passed_on():
    """Every argument reaches the optimizer."""
    optimizer = build(
        "sara_adamw", net(), lr=0.5, update_proj_gap=7, scale=2.0, proj_type="left", transfer="moments", betas=(0.8, 0.9),
        eps=1e-6, weight_decay=0.1, stagger=True, seed=3, targets=["down"], overrides={r"down\.weight": {"rank": 2}},
    )  # fmt: skip
    assert (optimizer.transfer, optimizer.stagger, optimizer.seed, optimizer.rule) == (
        "moments",
        True,
        3,
        AdamW((0.8, 0.9), 1e-6),
    )
    projected = optimizer.param_groups[0]
    expected = {
        "lr": 0.5, "rank": 2, "update_proj_gap": 7, "scale": 2.0, "proj_type": "left", "betas": (0.8, 0.9), "eps": 1e-6,
        "weight_decay": 0.1, "param_names": ["down.weight"],
    }  # fmt: skip
    assert {key: projected[key] for key in expected} == expected
    assert [group["rank"] for group in optimizer.param_groups] == [2, None, None]


def test_parts_as_settings_or_objects():
    """A mapping changes the recipe's own part, an object replaces it."""
    optimizer = build(
        "fira_sara_adamw", net(), selector={"power": 2.0, "floor": 0.1}, residual={"mode": "official", "limiter": None}
    )
    assert (optimizer.selector, optimizer.residual) == (Importance(power=2.0, floor=0.1), Fira("official", None))
    optimizer = build("galore_adamw", net(), selector=Random(), residual=Fira())
    assert (optimizer.selector, optimizer.residual) == (Random(), Fira())
    optimizer = build("golore_hybrid_adamw", net(), selector={"at": 0.5}, total_steps=40)
    assert optimizer.selector == Switch(Dominant(), Random(), at=0.5, total_steps=40)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("sara_adam", {}, "'sara_adam' is unknown; did you mean .*sara_adamw"),
        ("galore", {}, "did you mean .*galore_adamw"),
        ("xyz", {}, "known are adamw, galore_adamw"),
        (
            "sara_adamw",
            {"selector": {"temperature": 1.0}},
            "selector setting 'temperature': Importance has power, floor, method",
        ),
        ("golore_adamw", {"selector": {"power": 1.0}}, "selector setting 'power': Random has no settings"),
        ("fira_adamw", {"residual": {"gamma": 1.0}}, "residual setting 'gamma': Fira has mode, limiter"),
        ("sara_adamw", {"selector": {"floor": 2.0}}, "floor=2.0"),
        ("golore_hybrid_adamw", {"total_steps": None}, "pass total_steps"),
        ("sara_adamw", {"transfer": "project"}, "transfer='project'"),
        ("sara_adamw", {"rank": 0}, "rank=0"),
    ],
)
def test_errors(name, settings, words):
    """An unknown name or setting is an error that shows what there is."""
    with pytest.raises(ValueError, match=words):
        build(name, net(), **settings)


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_bytes(name, shape, dtype):
    """A matrix costs two moments of max(m, n) x r, a basis of min(m, n) x r and a step in fp32; Fira four bytes more."""
    model = nn.Linear(shape[1], shape[0], bias=False).to(dtype)
    m, n = max(shape), min(shape)
    expected = (2 * m * RANK + n * RANK) * 4 + 4 + (4 if name.startswith("fira") else 0)
    optimizer = build(name, model)
    assert state_bytes(optimizer) == expected
    set_gradients(model, 0)
    optimizer.step()
    assert state_bytes(optimizer) == expected


def test_state_bytes_of_torch():
    """The same count serves torch's optimizers: two fp64 moments and a step."""
    p = parameter((48, 20))
    optimizer = torch.optim.AdamW([p])
    assert state_bytes(optimizer) == 0
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert state_bytes(optimizer) == 2 * 48 * 20 * 8 + 4


def test_summary_counts():
    """What is printed at the start: parts, parameters by kind, and the bytes held (contract R16)."""
    optimizer = subspan.SubspaceAdamW(net().named_parameters(), rank=RANK)
    text = optimizer.summary()
    assert "Importance(power=1.0" in text
    assert f"2 matrices at rank {RANK}, refreshed every 200 steps: {24 * 40 + 40 * 12:,} parameters" in text
    assert f"4 vectors: {40 * 3 + 12} parameters" in text
    assert f"{state_bytes(optimizer):,} bytes" in text


def test_a_selector_by_name():
    """create takes the names that SubspaceAdamW takes."""
    assert create("sara_adamw", net(), rank=4, selector="dominant").selector == Dominant()
    with pytest.raises(ValueError, match="selector='dominnt': did you mean dominant"):
        create("sara_adamw", net(), rank=4, selector="dominnt")


def test_names_are_found_whatever_their_case():
    assert list(list_optimizers("SARA")) == ["sara_adamw", "fira_sara_adamw"]
    with pytest.raises(ValueError, match="did you mean galore_adamw"):
        create("GaLore", net(), rank=4)


def test_a_hybrid_that_never_switches_says_so(caplog):
    """No refresh falls between the switch at step 16 and the end at 20 when the period is 50."""
    create("golore_hybrid_adamw", net(), rank=4, update_proj_gap=50, total_steps=20)
    assert "never switches" in caplog.text
    caplog.clear()
    create("golore_hybrid_adamw", net(), rank=4, update_proj_gap=9, total_steps=20)
    assert "never switches" not in caplog.text


LIKELY_MISTAKES = {
    "parameters for a model": (lambda m: create("sara_adamw", m.parameters(), rank=4), "model: got a generator"),
    "a tensor for parameters": (lambda m: subspan.SubspaceAdamW(m.up.weight, rank=4), "params: got a Parameter"),
    "a dict": (lambda m: subspan.SubspaceAdamW(dict(m.named_parameters()), rank=4), "params: got a dict"),
    "a group without params": (lambda m: subspan.SubspaceAdamW([{"param": [m.up.weight]}], rank=4), "is no parameter group"),
    "one beta": (lambda m: subspan.SubspaceAdamW(m, rank=4, betas=0.9), "betas=0.9: expected two numbers"),
    "betas as text": (lambda m: subspan.SubspaceAdamW(m, rank=4, betas=("0.9", "0.99")), "betas="),
    "eps as text": (lambda m: subspan.SubspaceAdamW(m, rank=4, eps="1e-8"), "eps='1e-8'"),
    "lr as text": (lambda m: subspan.SubspaceAdamW(m, "0.1", 4), "lr='0.1'"),
    "a class": (lambda m: subspan.SubspaceAdamW(m, rank=4, selector=Importance), "expected a selector, such as"),
    "another part": (lambda m: subspan.SubspaceAdamW(m, rank=4, selector=AdamW()), "expected a selector, such as"),
    "no residual": (lambda m: subspan.SubspaceAdamW(m, rank=4, residual=None), "expected a residual, such as"),
    "a number for targets": (lambda m: subspan.SubspaceAdamW(m, rank=4, targets=[3]), "targets=[3]"),
    "True for a number": (lambda m: subspan.SubspaceAdamW(m, rank=4, update_proj_gap=True), "update_proj_gap=True"),
    "no rank": (lambda m: create("sara_adamw", m, rank=None), "rank=None: sara_adamw needs"),
    "a setting as text": (lambda m: Importance(floor="0.1"), "floor='0.1'"),
}


@pytest.mark.parametrize(("call", "words"), LIKELY_MISTAKES.values(), ids=LIKELY_MISTAKES)
def test_likely_mistakes(call, words):
    """Each is a ValueError that names the argument and its value."""
    with pytest.raises(ValueError, match=re.escape(words)):
        call(net())


def test_a_module_is_enough():
    """Its nn.Linear weights are projected; embeddings of any name are not."""
    model = torch.nn.Sequential(OrderedDict(a=torch.nn.Embedding(50, 24), b=net()))
    optimizer = subspan.SubspaceAdamW(model, rank=4)
    projected = {name for g in optimizer.param_groups if g["rank"] for name in g["param_names"]}
    assert projected == {"b.up.weight", "b.down.weight"}


def test_nothing_projected_and_misspelt_keys_are_said(caplog):
    subspan.SubspaceAdamW(net())
    assert "no matrix is projected" in caplog.text
    subspan.SubspaceAdamW([{"params": [net().up.weight], "rank": 4, "update_projgap": 3, "fused": True, "initial_lr": 1.0}])
    assert "'update_projgap' is not used here; did you mean 'update_proj_gap'" in caplog.text
    assert "fused" not in caplog.text
    assert "initial_lr" not in caplog.text
