"""What a weight does is found from the module that it belongs to, and not from its class or name."""

import logging

import pytest
import torch
from support.families import FAMILIES
from torch import nn
from transformers.pytorch_utils import Conv1D

from subspan import create, param_groups
from subspan.groups import EXCLUDED
from subspan.roles import Role, roles_of

RANK = 4


def projected(model, **settings):
    """The names of what is projected, and whether it is transposed."""
    groups = param_groups(model, rank=RANK, **settings)
    return {
        name: group.get("transposed", False)
        for group in groups
        if group["rank"] is not None
        for name, _ in group["params"]
    }


class Pair(nn.Module):
    """Two layers in which both sides differ, and a square one, of ``nn.Linear`` or of ``Conv1D``."""

    def __init__(self, transposed):
        super().__init__()
        sizes = {"up": (12, 20), "mix": (20, 20), "down": (20, 8)}
        for name, (inputs, outputs) in sizes.items():
            self.add_module(name, Conv1D(outputs, inputs) if transposed else nn.Linear(inputs, outputs))

    def forward(self, x):
        return self.down(torch.tanh(self.mix(torch.tanh(self.up(x)))))


def twins():
    """Return one model twice, in fp64: with weights (out, in), and with weights (in, out)."""
    torch.manual_seed(3)
    straight, transposed = Pair(False).double(), Pair(True).double()
    with torch.no_grad():
        for name, p in straight.named_parameters():
            other = transposed.get_parameter(name)
            other.copy_(p.mT if p.ndim == 2 else p)
    return straight, transposed


def train(model, optimizer, steps=7):
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x, y = (torch.randn(16, width, generator=generator, dtype=torch.float64) for width in (12, 8))
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(straight, transposed):
    for name, p in straight.named_parameters():
        other = transposed.get_parameter(name)
        torch.testing.assert_close(other, p.mT if p.ndim == 2 else p, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left"])
@pytest.mark.parametrize(
    "name", ["sara_adamw", "sara_adam_mini", "adam_mini", "sara_adafactor", "fira_adamw", "golore_adamw"]
)
def test_a_conv1d_is_trained_as_its_linear_twin_is(name, proj_type):
    """Bases, moments and blocks follow what is in and what is out: square weights and Adam-mini would show it."""
    straight, transposed = twins()
    for model in (straight, transposed):
        settings = {} if name == "adam_mini" else {"rank": RANK, "update_proj_gap": 3, "proj_type": proj_type}
        train(model, create(name, model, lr=1e-2, **settings))
    assert_same(straight, transposed)


def test_the_side_of_a_conv1d():
    """`right` compresses the inputs, so the basis has a row for each input."""
    _, model = twins()
    optimizer = create("sara_adamw", model, rank=RANK, proj_type="right")
    assert optimizer.state[model.up.weight]["basis"].shape == (12, RANK)
    assert optimizer.state[model.down.weight]["basis"].shape == (20, RANK)


class Experts(nn.Module):
    """Stacks of six experts between ``hidden`` and ``inner``, in either order."""

    def __init__(self, transposed, hidden=16, inner=24, bias=False, said=None):
        super().__init__()
        up, down = (hidden, inner), (inner, hidden)
        self.w1 = nn.Parameter(torch.randn(6, *(up if transposed else up[::-1])))
        self.w2 = nn.Parameter(torch.randn(6, *(down if transposed else down[::-1])))
        if bias:
            self.b1, self.w2_bias = nn.Parameter(torch.zeros(6, inner)), nn.Parameter(torch.zeros(6, hidden))
        for name, value in (said or {}).items():
            setattr(self, name, value)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "signs",
    [
        {"bias": True},
        {"said": {"hidden_size": 16}},
        {"said": {"d_model": 16, "hidden_dim": 24}},
        {"hidden": 12},  # the widths differ, but nothing says which is which; the default is (out, in)
    ],
    ids=str,
)
def test_the_order_of_a_stack(transposed, signs):
    model = Experts(transposed, **signs)
    known = "hidden" not in signs
    assert projected(model) == dict.fromkeys(("w1", "w2"), transposed and known)


def test_a_module_may_say_its_order():
    model = Experts(True, said={"is_transposed": True}, hidden=16, inner=16)
    assert projected(model) == {"w1": True, "w2": True}


def test_biases_of_experts_are_vectors():
    """They are neither projected nor decayed, with a module or with names only."""
    groups = param_groups(Experts(False, bias=True), rank=1, weight_decay=0.1)
    plain = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    assert plain == {"w1": 0.1, "w2": 0.1, "b1": 0.0, "w2_bias": 0.0}
    assert "gate_up_bias" not in projected(
        [("gate_up_bias", nn.Parameter(torch.zeros(9, 24))), ("a", Experts(False).w1)]
    )


class Mixture(nn.Module):
    def __init__(self, router):
        super().__init__()
        self.add_module(router, nn.Linear(16, 12, bias=False))
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(12))
        self.gate_proj = nn.Linear(16, 12)


@pytest.mark.parametrize("router", ["gate", "router", "wg"])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_router_is_left_out(router, by_name):
    """Also with more experts than the rank; what only has a similar name is not."""
    model = Mixture(router)
    found = projected(model.named_parameters() if by_name else model)
    assert f"{router}.weight" not in found
    assert "gate_proj.weight" in found
    assert "experts.11.weight" in found


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.registers = nn.Parameter(torch.zeros(1, 8, 16))
        self.conv = nn.Conv1d(16, 16, 5)
        self.norm1 = nn.Module()
        self.norm1.linear = nn.Linear(16, 96)
        self.norm1.norm = nn.LayerNorm(16)
        self.context_embedder = nn.Linear(24, 16)
        self.attention = nn.MultiheadAttention(16, 2)
        self.unembed = nn.Linear(16, 99)


def test_names_do_not_decide():
    """A modulation is a linear layer inside of a norm; a token is no stack; a head may be called an embedding."""
    model = Vision()
    assert set(projected(model)) == {
        "norm1.linear.weight",
        "context_embedder.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    groups = param_groups(model, rank=RANK, weight_decay=0.1)
    decay = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    assert decay["cls_token"] == 0
    assert decay["registers"] == 0.1


def test_a_norms_own_weight_is_left_out_by_name():
    named = [(name, nn.Parameter(torch.zeros(9, 9))) for name in ("norm1.linear.weight", "q_norm.weight", "a.weight")]
    assert set(projected(named)) == {"norm1.linear.weight", "a.weight"}


class OwnLayer(nn.Module):
    def __init__(self, weight, **sizes):
        super().__init__()
        self.weight = nn.Parameter(weight)
        for name, size in sizes.items():
            setattr(self, name, size)


def test_a_linear_layer_of_another_class():
    """The sizes that it keeps say in which order its weight is."""
    straight = OwnLayer(torch.zeros(9, 12), in_features=12, out_features=9)
    transposed = OwnLayer(torch.zeros(12, 9), input_size=12, output_size=9)
    model = nn.ModuleDict({"a": straight, "b": transposed, "c": OwnLayer(torch.zeros(9, 12))})
    roles = roles_of(model)
    assert [roles[id(module.weight)] for module in model.values()] == [
        Role("linear"),
        Role("linear", transposed=True),
        Role("other"),
    ]


def test_a_head_by_role():
    """A head and an embedding that transformers names are left out, tied or not, whatever they are called."""
    for name in ("GPT-NeoX", "OPT", "BERT", "Whisper"):
        family = FAMILIES[name]
        model = family.build()
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        found = {id(p) for n, p in model.named_parameters() if n in projected(model)}
        assert not found & {id(module.weight) for module in (head, embedding) if module is not None}


def test_a_pattern_may_be_added():
    model = Vision()
    added = set(projected(model, exclude="+attention"))
    assert added == {"norm1.linear.weight", "context_embedder.weight"}
    assert added == set(projected(model, exclude=("attention", *EXCLUDED)))
    assert "unembed.weight" in projected(model, exclude="attention")


def test_little_that_is_projected_is_said_once(caplog):
    """A conv net of which only the head is projected is nearly full-rank training; targets are the way out."""
    model = nn.Sequential(nn.Conv2d(16, 64, 5), nn.Flatten(), nn.Linear(64, 20))
    with caplog.at_level(logging.WARNING, "subspan"):
        create("sara_adamw", model, rank=RANK)
    [message] = [record.getMessage() for record in caplog.records]
    assert "only 1,280 of 26,964 parameters (4.7%) are projected" in message
    assert "targets=['0']" in message
    caplog.clear()
    create("sara_adamw", model, rank=RANK, targets=["0", "2"])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
