"""The papers' names: what they are made of, that they train, and the bytes they hold."""

import re
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from support.helpers import METHODS, RANK, SETTINGS, SHAPES, net, parameter, set_gradients
from torch import nn

import subspan
from subspan import create, list_optimizers, state_bytes
from subspan.costs.describe import describe
from subspan.recipes import RECIPES
from subspan.residuals import Discard, ErrorFeedback, Fira, Sketch
from subspan.rules import SGD, Adafactor, AdamMini, AdamW, Lion
from subspan.selectors import (
    Coordinates,
    Dominant,
    Gaussian,
    Importance,
    Lazy,
    OnlinePCA,
    PowerIteration,
    Random,
    Switch,
)
from subspan.storage.allocation import tensor_bytes

SIX = ("adamw", "adafactor", "adam_mini", "sgd", "lion", "adamw_8bit")
TABLE = {
    # method: selector, transfer, residual, scale, rules
    "galore": (Dominant(), "keep", Discard(), 0.25, SIX),
    "sara": (Importance(), "keep", Discard(), 0.25, SIX),
    "golore": (Random(), "rotate", Discard(), 1.0, ("adamw", "sgd", "adamw_8bit")),
    "golore_hybrid": (Switch(Dominant(), Random(), at=0.8), "rotate", Discard(), 1.0, ("adamw", "sgd", "adamw_8bit")),
    "fira": (Dominant(), "keep", Fira("orthogonal", 1.01), 0.25, ("adamw", "adamw_8bit")),
    "fira_sara": (Importance(), "keep", Fira("orthogonal", 1.01), 0.25, ("adamw", "adamw_8bit")),
    "sara_sketch": (Importance(), "keep", Sketch(None, "norms", "unbiased", 1.01), 0.25, ("adamw", "adamw_8bit")),
    "golore_sketch": (Random(), "rotate", Sketch(None, "norms", "unbiased", 1.01), 1.0, ("adamw", "adamw_8bit")),
    "galore_lazy": (Lazy(Dominant()), "keep", Discard(), 0.25, ("adamw",)),
    "online_pca": (OnlinePCA(5e-3), "keep", Discard(), 0.25, ("adamw",)),
    "flora": (Gaussian(), "rotate", Discard(), 1.0, ("adamw", "adafactor", "sgd")),
    "rso": (Random(scaled=True), "reset", Discard(), 1.0, ("adamw", "sgd", "adamw_8bit")),
    "grass": (Coordinates("top"), "reset", Discard(), 1.0, ("adamw",)),
    "gasare": (Coordinates("top"), "rotate", Discard(), 1.0, ("adamw", "sgd")),
    "gosare": (Coordinates("uniform"), "rotate", Discard(), 1.0, ("adamw", "sgd")),
    "ldadam": (PowerIteration(0.908), "moments", ErrorFeedback(), 1.0, ("adamw",)),
}
STEP = {
    # rule: itself with its paper's settings, and lr * scale
    "adamw": (AdamW((0.9, 0.999), 1e-8), 2.5e-3),
    "adafactor": (Adafactor(0.9, 0.8, 1e-30, 1.0), 2.5e-3),
    "adam_mini": (AdamMini((0.9, 0.95), 1e-8), 2.5e-3),
    "sgd": (SGD(0.9, 0.0), 0.5),
    "lion": (Lion((0.9, 0.99)), 1e-3),
}
PROJECTING = [(method, rule) for method, row in TABLE.items() for rule in row[-1]]


def build(name, model, **settings):
    return create(name, model, **{"rank": RANK, **SETTINGS.get(name, {}), **settings})


def test_the_table_is_complete():
    """Every name has its row here, full-rank ones included, and the list holds them all."""
    assert set(METHODS) == {f"{method}_{rule}" for method, rule in PROJECTING}
    assert set(list_optimizers()) == set(RECIPES) == {*METHODS, *SIX}
    assert set(list_optimizers("*sara_adamw")) == {"sara_adamw", "fira_sara_adamw"}
    assert all(list_optimizers().values())


@pytest.mark.parametrize(("method", "rule"), PROJECTING)
def test_defaults(method, rule):
    """Parts and defaults of each paper."""
    selector, transfer, residual, scale, _ = TABLE[method]
    if isinstance(selector, Switch):
        selector = replace(selector, total_steps=20)
    kind, step = STEP[rule.removesuffix("_8bit")]
    kind = AdamW((0.908, 0.99)) if method == "ldadam" else kind
    step = 5e-3 if method.endswith("_sketch") else step
    optimizer = build(f"{method}_{rule}", net())
    assert (optimizer.selector, optimizer.transfer, optimizer.residual) == (selector, transfer, residual)
    assert optimizer.rule == kind
    for group in optimizer.param_groups:
        settings = {key: group[key] for key in ("scale", "update_proj_gap", "proj_type", "weight_decay", "state_dtype")}
        eight = "int8" if rule.endswith("_8bit") else "float32"
        expected = {
            "scale": scale,
            "update_proj_gap": 200,
            "proj_type": "std",
            "weight_decay": 0.0,
            "state_dtype": eight,
        }
        assert settings == expected
        assert group["lr"] * scale == pytest.approx(step)


@pytest.mark.parametrize("rule", SIX[1:])
def test_full_rank_names(rule):
    """A rule's own name trains every parameter at full rank."""
    kind, step = STEP[rule.removesuffix("_8bit")]
    optimizer = create(rule, net())
    assert optimizer.rule == kind
    assert {group["rank"] for group in optimizer.param_groups} == {None}
    assert {group["lr"] for group in optimizer.param_groups} == {step}


@pytest.mark.parametrize("name", RECIPES)
def test_every_name_learns(name):
    """On a small regression 100 steps leave less than a tenth of the loss."""
    torch.manual_seed(0)
    x = torch.randn(64, 24)
    y = x @ torch.randn(24, 12) / 24**0.5
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 12))
    lr = 0.1 if name.endswith("sgd") else 3e-2
    optimizer = build(name, model, lr=lr, rank=8, update_proj_gap=10, scale=1.0, total_steps=100)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_the_baseline_is_torch_adamw():
    """``adamw`` is torch's own class, at the family's learning rate."""
    optimizer = create("adamw", net(), betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        vectors = all(p.ndim == 1 for p in group["params"])
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
            2.5e-3,
            (0.8, 0.9),
            1e-6,
            0.0 if vectors else 0.1,
        )
        assert "rank" not in group


@pytest.mark.parametrize("name", RECIPES)
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
    assert build("galore_adamw", net(), selector={"name": "importance", "power": 0.0}).selector == Importance(power=0.0)
    assert build("rso_adamw", net(), selector={"name": "gaussian"}).selector == Gaussian()
    optimizer = build("golore_hybrid_adamw", net(), selector={"at": 0.5}, total_steps=40)
    assert optimizer.selector == Switch(Dominant(), Random(), at=0.5, total_steps=40)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("sara_adam", {}, "'sara_adam' is unknown; did you mean .*sara_adamw"),
        ("galore", {}, "did you mean .*galore_adamw"),
        ("xyz", {}, "known are adamw, .*galore_adamw"),
        (
            "sara_adamw",
            {"selector": {"temperature": 1.0}},
            "selector setting 'temperature'=1.0: Importance has power, floor, method",
        ),
        ("flora_adamw", {"selector": {"power": 1.0}}, "selector setting 'power'=1.0: Gaussian has no settings"),
        ("sara_adamw", {"selector": {"name": "cyclc"}}, "selector='cyclc': did you mean cyclic"),
        ("sara_adamw", {"selector": {"name": 3}}, "selector='3': known are dominant"),
        ("sara_adamw", {"selector": {"name": "random", "power": 1.0}}, "'power'=1.0: Random has scaled"),
        ("fira_adamw", {"residual": {"gamma": 1.0}}, "residual setting 'gamma'=1.0: Fira has mode, limiter"),
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


def value(formula, **sizes):
    """What the formula says, with its conditional and its ``q``."""

    def q(a, b):  # in 8 bits: a code for each entry and four bytes for each 256 of a row; small moments stay fp32
        return 4 * a * b if a * b < 4096 else a * b + 4 * a * ((b + 255) // 256)

    return eval(formula, {"q": q}, sizes)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (1100, 20), (20, 1100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_bytes(name, shape, dtype):
    """A matrix costs what the formula of ``subspan list`` says, before and after a step; a bias likewise."""
    model = nn.Linear(shape[1], shape[0]).to(dtype)
    m, n = max(shape), min(shape)
    formula = describe(name)["state_formula"]
    expected = value(formula["projected"], m=m, n=n, r=RANK, rows=shape[0], columns=shape[1])
    expected += value(formula["vector"], k=shape[0])
    optimizer = build(name, model)
    assert state_bytes(optimizer) == expected
    set_gradients(model, 0)
    optimizer.step()
    assert state_bytes(optimizer) == expected


@pytest.mark.parametrize("rule", SIX[1:])
@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (80, 70)], ids=str)
def test_state_bytes_at_full_rank(rule, shape):
    """A full-rank name costs what its formula says."""
    formula = describe(rule)["state_formula"]
    expected = value(formula["matrix"], a=shape[0], b=shape[1]) + value(formula["vector"], k=shape[0])
    assert state_bytes(create(rule, nn.Linear(shape[1], shape[0]))) == expected


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("galore_adamw", "8*m*r + 4*n*r + 4"),
        ("golore_sgd", "4*m*r + 4*n*r + 4"),
        ("flora_adamw", "8*m*r + 4"),
        ("gosare_adamw", "8*m*r + 8*r + 4"),
        ("fira_adamw", "8*m*r + 4*n*r + 8"),
        ("galore_adamw_8bit", "2*q(m, r) + 4*n*r + 4"),
        ("galore_adafactor", "4*m*r + 4*m + 4*r + 4*n*r + 4"),
    ],
)
def test_formulas(name, formula):
    """The bytes of the papers' tables, in fp32 : moments of m x r, a basis of n x r unless a seed does."""
    sizes = {"m": 1000, "n": 300, "r": 7, "rows": 1000, "columns": 300}
    assert value(describe(name)["state_formula"]["projected"], **sizes) == value(formula, **sizes)


def test_state_bytes_of_torch():
    """One count serves torch's optimizers too: two fp64 moments and a step."""
    p = parameter((48, 20))
    optimizer = torch.optim.AdamW([p])
    assert state_bytes(optimizer) == 0
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert state_bytes(optimizer) == 2 * 48 * 20 * 8 + 4


def test_summary_counts():
    """What is printed at the start: parts, parameters by kind, and the bytes held (contract R16)."""
    optimizer = subspan.SubspaceAdamW(net().named_parameters(), rank=RANK)
    parts, head, projected, vectors, total = optimizer.summary().splitlines()
    assert "Importance(power=1.0" in parts
    assert head.split() == ["group", "rank", "count", "parameters", "bytes", "held", "AdamW's", "bytes"]
    held = [sum(tensor_bytes(s) for p, s in optimizer.state.items() if p.ndim == ndim) for ndim in (2, 1)]
    matrices, biases = 24 * 40 + 40 * 12, 40 * 3 + 12
    expected = [str(RANK), "2", f"{matrices:,}", f"{held[0]:,}", f"{8 * matrices + 4 * 2:,}"]
    assert projected.startswith("0: projected, refreshed every 200 steps")
    assert projected.split()[-5:] == expected
    assert vectors.split()[-5:] == ["-", "4", str(biases), f"{held[1]:,}", f"{8 * biases + 4 * 4:,}"]
    assert total.split()[-2] == f"{state_bytes(optimizer):,}"


def test_a_selector_by_name():
    """``create`` takes the names that SubspaceAdamW takes."""
    assert create("sara_adamw", net(), rank=4, selector="dominant").selector == Dominant()
    with pytest.raises(ValueError, match="selector='dominnt': did you mean dominant"):
        create("sara_adamw", net(), rank=4, selector="dominnt")


def test_names_are_found_whatever_their_case():
    assert list(list_optimizers("SARA_adamw")) == [
        "sara_adamw",
        "sara_adamw_8bit",
        "fira_sara_adamw",
        "fira_sara_adamw_8bit",
    ]
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
    "a group without params": (
        lambda m: subspan.SubspaceAdamW([{"param": [m.up.weight]}], rank=4),
        "is no parameter group",
    ),
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
    subspan.SubspaceAdamW(
        [{"params": [net().up.weight], "rank": 4, "update_projgap": 3, "fused": True, "initial_lr": 1.0}]
    )
    assert "'update_projgap' is not used here; did you mean 'update_proj_gap'" in caplog.text
    assert "fused" not in caplog.text
    assert "initial_lr" not in caplog.text
